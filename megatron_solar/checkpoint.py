"""Saving and loading a run's state: each rank writes what it owns while training goes on.

A save copies a rank's part to host memory, which is all that training waits for, and a thread writes
and hashes it. No rank waits for another: the supervisor marks the checkpoint as complete once every
rank's record is there. A load reads each element once over all ranks; every file that ranks of a node
read is verified by one of them first. Nothing in a step is random (no dropout), so that no random
state is needed; consumed samples follow from the step and stand in the marker.
"""

import contextlib
import dataclasses
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.checkpoint_files import (
    ELEMENT_BYTES,
    KINDS,
    CheckpointTensors,
    StagedPiece,
    tensor_name,
    write_part,
)
from megatron_solar.pieces import Rectangle, rectangles
from megatron_solar.weights import EMBEDDING, canonical_key, canonical_shape, part_of_tensor
from orchestrator.checkpoints import INDEX, Checkpoint, damage
from orchestrator.errors import CheckpointError, DiskFullError
from orchestrator.files import is_full
from orchestrator.model_shape import TransformerShape
from orchestrator.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnedPiece:
    """A rectangle of a whole tensor that this rank updates."""

    name: str
    """Of the whole tensor in a checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rectangle: Rectangle
    values: Tensor
    """Flat, as long as the rectangle has elements; writing to it sets the state."""
    is_written: bool
    """Whether this rank saves it; what several ranks hold, the first one saves."""


def owned_pieces(
    shape: TransformerShape, chunks: Sequence[Any], optimizer: Any, layer_offsets: Sequence[int], tensor_parallel: int
) -> list[OwnedPiece]:
    """Return weights and optimizer state of this rank as rectangles of the whole tensors.

    Args:
        layer_offsets: the model's number of the first layer of each chunk.
    """
    tensor_rank = compat.tensor_rank()
    found = []
    for owned in compat.owned_ranges(chunks, optimizer):
        key = canonical_key(owned.name, layer_offsets[owned.chunk], is_tied=shape.tie_embeddings)
        is_copy = key == EMBEDDING and owned.name != EMBEDDING
        part = part_of_tensor(key, canonical_shape(key, shape), tensor_rank, tensor_parallel)
        for rectangle in rectangles(part, owned.start, owned.stop):
            for kind in KINDS:
                found.append(
                    OwnedPiece(
                        name=tensor_name(kind, key),
                        shape=part.whole_shape,
                        rectangle=rectangle,
                        values=owned.states[kind][rectangle.start : rectangle.start + rectangle.elements],
                        is_written=not is_copy and (not part.is_replicated or tensor_rank == 0),
                    )
                )
    return found


class CheckpointWriter:
    """Writes one rank's part of a checkpoint in a thread; one save at a time."""

    def __init__(self, rank: int, watched: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        """Write the part of a rank.

        Args:
            watched: gives what surrounds the writing in the thread.
        """
        self._rank = rank
        self._watched = watched
        self._staging: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, folder: Path, pieces: Sequence[OwnedPiece]) -> float:
        """Copy the pieces, and have them written to a folder while the caller goes on.

        Returns:
            the seconds that the caller waited, an earlier save that was not done yet included.

        Raises:
            DiskFullError, OSError: an earlier save failed.
        """
        started = time.monotonic()
        self.wait()
        staged, first_byte = [], 0
        for piece in pieces:
            if piece.is_written:
                staged.append(
                    StagedPiece(name=piece.name, shape=piece.shape, rectangle=piece.rectangle, first_byte=first_byte)
                )
                first_byte += piece.rectangle.elements * ELEMENT_BYTES
        buffer = self._buffer(first_byte, pieces[0].values.device.type if pieces else "cpu")
        for target, piece in zip(staged, (piece for piece in pieces if piece.is_written), strict=True):
            end = target.first_byte + piece.rectangle.elements * ELEMENT_BYTES
            buffer[target.first_byte : end].view(torch.float32).copy_(piece.values, non_blocking=True)
        if buffer.is_pinned():
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._write, args=(folder, staged, buffer), name="checkpoint", daemon=True
        )
        self._thread.start()
        return time.monotonic() - started

    def check(self) -> None:
        """Raise what the writing thread met, if it met anything.

        Raises:
            DiskFullError: no space, no quota or no inodes are left.
            OSError: the file system refused otherwise.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, folder: Path, pieces: Sequence[StagedPiece], staged: Tensor) -> None:
        try:
            with self._watched():
                write_part(folder, self._rank, pieces, staged)
        except OSError as error:
            self._error = disk_full(folder, len(staged), error) if is_full(error) else error
        except BaseException as error:
            self._error = error

    def _buffer(self, size: int, device: str) -> Tensor:
        """Return the staging buffer, made once: page-locked where it is filled from a GPU."""
        if self._staging is None or len(self._staging) != size:
            self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")
        return self._staging


def disk_full(folder: Path, wanted: int, error: OSError | None = None) -> DiskFullError:
    """Return the error of a save for which there is no room."""
    there = folder if folder.exists() else folder.parent
    free = format_bytes(shutil.disk_usage(there).free)
    cause = f" ({error.strerror})" if error is not None else ""
    return DiskFullError(
        f"{folder} needs {format_bytes(wanted)}, {free} are free{cause}; free space or raise the quota, then "
        "`orchestrate resume`; the checkpoints before are whole"
    )


def load_newest(
    candidates: Sequence[Checkpoint],
    pieces: Sequence[OwnedPiece],
    on_damage: Callable[[Checkpoint, list[str]], None],
) -> Checkpoint:
    """Fill the pieces from the newest checkpoint that is whole; collective.

    Args:
        candidates: the newest last.
        on_damage: told of each checkpoint that is not whole, on every rank.

    Raises:
        CheckpointError: none of them is whole; nothing random takes their place.
        OSError: a file cannot be read, which is no damage: another start may find it readable.
    """
    found: list[str] = []
    for checkpoint in reversed(candidates):
        problems = _load(checkpoint, pieces)
        if not problems:
            return checkpoint
        on_damage(checkpoint, problems)
        found += problems
    raise CheckpointError(f"none of {len(candidates)} checkpoints is whole; nothing was loaded:", found[:20])


def _load(checkpoint: Checkpoint, pieces: Sequence[OwnedPiece]) -> list[str]:
    """Verify, then read; return what is wrong, the same on every rank."""
    problems = _all(damage(checkpoint, [INDEX]))
    if problems:
        return sorted(set(problems))
    tensors = CheckpointTensors(checkpoint)
    needed: set[str] = set()
    for piece in pieces:
        needed |= tensors.files_of(piece.name, piece.rectangle.offset, piece.rectangle.size)
    problems = _all(damage(checkpoint, share_of_files(checkpoint, sorted(needed))))
    if problems:
        return problems
    with torch.no_grad():
        for piece in pieces:
            rectangle = piece.rectangle
            tensors.read(piece.name, rectangle.offset, rectangle.size, piece.values.view(rectangle.size))
    return []


def share_of_files(checkpoint: Checkpoint, needed: Sequence[str]) -> list[str]:
    """Return the files that this rank verifies, of those that ranks of its node will read; collective.

    A node has one page cache: what one of its ranks has verified, the others read.
    """
    host = socket.gethostname()
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (host, list(needed)))
    together = [rank for rank, (other, _) in enumerate(every) if other == host]
    files = {name for other, names in every if other == host for name in names}
    loads = dict.fromkeys(together, 0)
    mine = []
    for name in sorted(files, key=lambda name: (-checkpoint.files[name].bytes, name)):
        rank = min(loads, key=lambda rank: (loads[rank], rank))
        loads[rank] += checkpoint.files[name].bytes
        if rank == torch.distributed.get_rank():
            mine.append(name)
    return mine


def _all(found: list[str]) -> list[str]:
    """Return what all ranks found, in the order of the ranks; collective."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, found)
    return [problem for part in parts for problem in part]
