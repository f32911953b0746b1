"""The files of a checkpoint: one safetensors file a rank, written in one pass with its hash, read by rectangle.

A file holds a rank's pieces under `NAME[offset:size]`; which pieces make which tensor says the
checkpoint's index. Names of whole tensors: `weight/KEY`, `exp_avg/KEY`, `exp_avg_sq/KEY` with canonical
keys (`megatron_solar/weights.py`), all in fp32: the weight is the optimizer's master copy.

The safetensors format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megatron_solar.pieces import Overlap, Rectangle, overlap
from orchestrator.checkpoints import (
    Checkpoint,
    FileFacts,
    Piece,
    RankPart,
    StoredTensor,
    damage,
    part_file,
    part_record,
    read_index,
)
from orchestrator.errors import CheckpointError
from orchestrator.files import sync_folder, write_json
from orchestrator.values import to_plain

WEIGHT = "weight"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
DTYPE = "F32"
ELEMENT_BYTES = 4
CHUNK_BYTES = 1 << 24
"""Hashed, then handed to the file system, at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPiece:
    """One rectangle of a whole tensor, waiting in memory to be written."""

    name: str
    """Of the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rectangle: Rectangle
    first_byte: int
    """In the staging buffer; pieces lie there in the order in which they are written."""


def tensor_name(kind: str, key: str) -> str:
    """Return the name of a whole tensor in a checkpoint."""
    return f"{kind}/{key}"


def write_part(folder: Path, rank: int, pieces: Sequence[StagedPiece], staged: Tensor) -> RankPart:
    """Write a rank's pieces and then its record; the record says that they are on disk.

    Args:
        staged: the pieces' bytes, one after another, uint8, in host memory.

    Raises:
        OSError: the file system refuses; what was written of the file is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / part_file(rank)
    temporary = folder / f".{path.name}.partial"
    started = time.monotonic()
    digest = hashlib.sha256()
    written, hash_seconds = 0, 0.0
    try:
        with temporary.open("xb", buffering=0) as stream:
            for chunk in _chunks(header_of(pieces), staged):
                before = time.monotonic()
                digest.update(chunk)
                hash_seconds += time.monotonic() - before
                done = 0
                while done < len(chunk):
                    done += stream.write(chunk[done:]) or 0
                written += done
            os.fsync(stream.fileno())
        temporary.rename(path)
        sync_folder(folder)
        part = RankPart(
            rank=rank,
            file=path.name,
            facts=FileFacts(bytes=written, sha256=digest.hexdigest()),
            tensors=stored_tensors(pieces, path.name),
            write_seconds=time.monotonic() - started,
            hash_seconds=hash_seconds,
        )
        write_json(folder / part_record(rank), to_plain(part), indent=None)
    except OSError:
        # On a full disk this gives back the space that the record of the failure needs.
        temporary.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return part


def _chunks(header: bytes, staged: Tensor) -> Iterator[memoryview]:
    yield memoryview(header)
    content = memoryview(staged.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
    for first in range(0, len(content), CHUNK_BYTES):
        yield content[first : first + CHUNK_BYTES]


def header_of(pieces: Sequence[StagedPiece]) -> bytes:
    """Return what a file of these pieces begins with."""
    entries: dict[str, object] = {}
    for piece in pieces:
        entries[_piece_name(piece.name, piece.rectangle.offset, piece.rectangle.size)] = {
            "dtype": DTYPE,
            "shape": piece.rectangle.size,
            "data_offsets": [piece.first_byte, piece.first_byte + piece.rectangle.elements * ELEMENT_BYTES],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _piece_name(name: str, offset: Sequence[int], size: Sequence[int]) -> str:
    return f"{name}[{','.join(f'{a}:{a + n}' for a, n in zip(offset, size, strict=True))}]"


def stored_tensors(pieces: Sequence[StagedPiece], file: str) -> dict[str, StoredTensor]:
    """Return what a rank's record says of its file, by the name of the whole tensor."""
    found: dict[str, list[StagedPiece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return {
        name: StoredTensor(
            shape=staged[0].shape,
            dtype=DTYPE,
            pieces=tuple(Piece(file=file, offset=p.rectangle.offset, size=p.rectangle.size) for p in staged),
        )
        for name, staged in found.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """A part of a stored piece that is wanted."""

    piece: Piece
    shared: Overlap


class CheckpointTensors:
    """The tensors of a checkpoint, read by rectangle from mapped files; nothing is verified here."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors = read_index(checkpoint)
        self._files: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Return the names of all tensors, weights and optimizer."""
        return sorted(self._tensors)

    def files_of(self, name: str, offset: Sequence[int], size: Sequence[int]) -> set[str]:
        """Return the files that hold a rectangle of a tensor."""
        return {read.piece.file for read in self._reads(name, offset, size)}

    def read(self, name: str, offset: Sequence[int], size: Sequence[int], target: Tensor) -> None:
        """Fill a tensor of shape `size` with a rectangle of a whole one."""
        for read in self._reads(name, offset, size):
            piece = read.piece
            stored = self._open(piece.file).get_slice(_piece_name(name, piece.offset, piece.size))
            target[read.shared.within_second].copy_(torch.from_numpy(stored[read.shared.within_first]))

    def whole(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a whole tensor, rounded to a type; memory holds nothing else of it."""
        stored = self._stored(name)
        tensor = torch.empty(stored.shape, dtype=dtype)
        self.read(name, [0] * len(stored.shape), stored.shape, tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the size of a whole tensor."""
        return self._stored(name).shape

    def _stored(self, name: str) -> StoredTensor:
        stored = self._tensors.get(name)
        if stored is None:
            raise CheckpointError(f"checkpoint {self._checkpoint.name} has no tensor {name}; it is of another model")
        return stored

    def _reads(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[_Read]:
        found = []
        for piece in self._stored(name).pieces:
            shared = overlap(piece.offset, piece.size, offset, size)
            if shared is not None:
                found.append(_Read(piece=piece, shared=shared))
        held, wanted = sum(read.shared.elements for read in found), torch.Size(size).numel()
        if held != wanted:
            raise CheckpointError(
                f"checkpoint {self._checkpoint.name} holds {held} of {wanted} numbers of {name} from {list(offset)} on"
            )
        return found

    def _open(self, file: str) -> Any:
        if file not in self._files:
            # With "pt" the file is mapped so that it could be written to, and Linux then refuses one that is larger
            # than the memory: 43 GB of one rank on a machine of 24 (safetensors 0.8).
            self._files[file] = safetensors.safe_open(self._checkpoint.path / file, framework="numpy")
        return self._files[file]


def open_verified(checkpoint: Checkpoint) -> CheckpointTensors:
    """Open a checkpoint for one process, after reading all its files once.

    Raises:
        CheckpointError: a file is missing or damaged; all of them are named.
    """
    found = damage(checkpoint)
    if found:
        raise CheckpointError(f"checkpoint {checkpoint.name} is damaged and was not read:", found)
    return CheckpointTensors(checkpoint)
