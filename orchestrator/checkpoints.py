"""Checkpoints of a run as facts: a checkpoint exists when its marker does.

    checkpoints/step_0001200.attempt_0003/
      rank_0000.safetensors  rank_0000.json     what one rank wrote: its pieces, their size and SHA-256
      tensors.json                              which piece of which tensor lies in which file
      complete.json                             written last, by the supervisor
      damaged.json                              written by the supervisor when ranks found damage; it exists no more

Every start of the ranks writes under a name of its own. The marker names the checkpoints that its start
and those before it began from, so that the folder holds a tree, and the surviving trajectory is the
branch of the newest start. What a rank of a lost start writes is never marked. Standard library only.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, OrchestrateError
from orchestrator.events import CheckpointEvent, read_events
from orchestrator.files import read_json, sha256_of, sync_folder, write_json
from orchestrator.model_shape import TransformerShape
from orchestrator.run_directory import RunDirectory
from orchestrator.values import from_plain, to_plain

MARKER = "complete.json"
INDEX = "tensors.json"
DAMAGED = "damaged.json"
VISIBLE_SECONDS = 60.0
"""How long a node may take to see a file that another one has written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A file as it was written."""

    bytes: int
    sha256: str
    """Of what was handed to the file system, computed while writing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of a whole tensor, and the file that holds it."""

    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A whole tensor in pieces."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32."""
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankPart:
    """What one rank says it has put on disk, in rank_N.json."""

    rank: int
    file: str
    facts: FileFacts
    tensors: dict[str, StoredTensor]
    """Its pieces, by the name of the whole tensor."""
    write_seconds: float
    """From the first byte until the file was flushed, hashing included."""
    hash_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What a marker says besides the files."""

    step: int
    attempt: int
    """The start that wrote it; 0 is another run's that this one was branched from."""
    ancestry: tuple[str, ...]
    """Checkpoint that the start began from, the one that its start began from, and so on; empty is the base."""
    consumed_samples: int
    data_fingerprint: str
    tokenizer_sha256: str
    model: TransformerShape
    layout: str
    precision: str
    validation_loss: float | None
    """Held-out loss at this step, where it was measured."""
    code_version: str
    written: float
    """Unix time of the marker."""
    skipped: tuple[tuple[int, int], ...] = ()
    """First and last step of each span whose gradients the weights do not have; Adam counted none of these steps."""
    recent_losses: tuple[float, ...] = ()
    """Of the newest steps that were applied, with which the next steps' are compared."""
    recent_norms: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    facts: CheckpointFacts
    files: dict[str, FileFacts]

    @property
    def name(self) -> str:
        """Folder name."""
        return self.path.name

    @property
    def step(self) -> int:
        """Steps done."""
        return self.facts.step

    @property
    def attempt(self) -> int:
        """The start that wrote it."""
        return self.facts.attempt

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(facts.bytes for facts in self.files.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Marker:
    """complete.json."""

    facts: CheckpointFacts
    files: dict[str, FileFacts]
    sha256: str
    """Of the rest."""


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the folder name of a step's checkpoint; names sort by step, then by attempt."""
    return f"step_{step:07d}.attempt_{attempt:04d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return step and attempt of a checkpoint's folder name, or None where it is none."""
    match = re.fullmatch(r"step_(\d{7,})\.attempt_(\d{4,})", name)
    return (int(match[1]), int(match[2])) if match else None


def part_file(rank: int) -> str:
    """Return the name of the file with a rank's pieces."""
    return f"rank_{rank:04d}.safetensors"


def part_record(rank: int) -> str:
    """Return the name of the file in which a rank says that its pieces are on disk."""
    return f"rank_{rank:04d}.json"


def files_written(world_size: int) -> int:
    """Return how many files a save makes at once: two a rank, index, marker, and two temporary names."""
    return 2 * world_size + 4


def read_parts(path: Path, world_size: int) -> list[RankPart] | None:
    """Return what the ranks say they have written, or None while one has not.

    Raises:
        CheckpointError: a rank's record is not one of this version.
    """
    there = {entry.name for entry in path.iterdir()} if path.exists() else set()  # one request, not one a rank
    records = [part_record(rank) for rank in range(world_size)]
    return (
        [_decode(RankPart, _plain(path / record), path / record) for record in records]
        if there.issuperset(records)
        else None
    )


def mark_complete(path: Path, facts: CheckpointFacts, parts: Sequence[RankPart]) -> Checkpoint:
    """Write index and marker of a checkpoint whose parts are all on disk.

    Raises:
        CheckpointError: a file is missing or of another size, or a tensor is not whole; nothing is marked.
    """
    files = {part.file: part.facts for part in parts}
    for name, wanted in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != wanted.bytes:
            raise CheckpointError(f"{path / name} should have {wanted.bytes} bytes, found {found}; it was not marked")
    index = write_json(path / INDEX, to_plain(merge_tensors(parts)), indent=None)
    files[INDEX] = FileFacts(bytes=len(index), sha256=hashlib.sha256(index).hexdigest())
    sync_folder(path.parent)  # the ranks made the folder; write_json flushes its entries
    write_marker(path, facts, files)
    return Checkpoint(path=path, facts=facts, files=files)


def write_marker(path: Path, facts: CheckpointFacts, files: dict[str, FileFacts]) -> None:
    """Write the marker, which makes a folder a checkpoint."""
    sha256 = _marker_sum(to_plain(facts), to_plain(files))
    write_json(path / MARKER, to_plain(_Marker(facts=facts, files=files, sha256=sha256)))


def _marker_sum(facts: object, files: object) -> str:
    """Return the sum of what was written, which in an older version may have been fewer facts."""
    return hashlib.sha256(json.dumps([facts, files], sort_keys=True).encode()).hexdigest()


def merge_tensors(parts: Sequence[RankPart]) -> dict[str, StoredTensor]:
    """Return the whole tensors that the ranks' pieces make.

    Raises:
        CheckpointError: the pieces of a tensor leave a gap, overlap, or disagree about it.
    """
    pieces: dict[str, list[Piece]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    problems = []
    for part in parts:
        for name, tensor in part.tensors.items():
            kind = (tensor.shape, tensor.dtype)
            if kinds.setdefault(name, kind) != kind:
                problems.append(f"{name} is {kinds[name]} for one rank and {kind} for rank {part.rank}")
            pieces.setdefault(name, []).extend(tensor.pieces)
    for name, found in pieces.items():
        held, wanted = sum(piece.elements for piece in found), math.prod(kinds[name][0])
        if held != wanted:
            problems.append(f"{name} should have {wanted} numbers, the ranks wrote {held}")
        elif _overlap(found):
            problems.append(f"{name} has numbers that two ranks wrote, and others that none did")
    if problems:
        raise CheckpointError("the ranks' pieces do not make whole tensors; it was not marked:", problems[:20])
    return {
        name: StoredTensor(shape=kinds[name][0], dtype=kinds[name][1], pieces=tuple(found))
        for name, found in sorted(pieces.items())
    }


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Return whether any two pieces of a tensor share an element."""
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    for index, piece in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offset[0] >= piece.offset[0] + piece.size[0]:
                break
            axes = zip(piece.offset, piece.size, other.offset, other.size, strict=True)
            if all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in axes):
                return True
    return False


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the complete checkpoint in a folder.

    Raises:
        CheckpointError: there is no folder, no marker in it, or one that is damaged or of another version.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; `orchestrate status` lists those that are there")
    if not (path / MARKER).exists():
        raise CheckpointError(f"{path} was never completed (no {MARKER} in it); use an earlier checkpoint")
    written = _plain(path / MARKER)
    marker: _Marker = _decode(_Marker, written, path / MARKER)
    is_itself = marker.sha256 == _marker_sum(written["facts"], written["files"])
    if not is_itself or (marker.facts.step, marker.facts.attempt) != parse_name(path.name):
        raise CheckpointError(f"{path / MARKER} is damaged: it is not what was written; use an earlier checkpoint")
    return Checkpoint(path=path, facts=marker.facts, files=marker.files)


def read_index(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint; the index itself is verified by `damage`.

    Raises:
        CheckpointError: the index is not one of this version.
    """
    path = checkpoint.path / INDEX
    tensors: dict[str, StoredTensor] = _decode(_Index, {"tensors": _plain(path)}, path).tensors
    return tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Index:
    tensors: dict[str, StoredTensor]


def marked_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """Return every complete checkpoint of a run that was not found damaged, of all branches, by name.

    One whose marker cannot be used is left out; `unusable_markers` names it.
    """
    found = []
    for path in _marked_folders(run):
        with contextlib.suppress(CheckpointError):
            found.append(read_checkpoint(path))
    return found


def unusable_markers(run: RunDirectory) -> dict[str, str]:
    """Return the names of checkpoints whose marker is damaged or of another version, each with the problem."""
    found = {}
    for path in _marked_folders(run):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            if (path / MARKER).exists():  # not deleted meanwhile
                found[path.name] = str(error)
    return found


def _marked_folders(run: RunDirectory) -> list[Path]:
    there = sorted(run.checkpoints_folder.iterdir()) if run.checkpoints_folder.exists() else []
    return [path for path in there if (path / MARKER).exists() and not (path / DAMAGED).exists()]


def complete_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """Return the complete checkpoints of a run's surviving trajectory, the oldest first."""
    return lineage(marked_checkpoints(run))


def completed_once(run: RunDirectory) -> list[str]:
    """Return the names of all checkpoints that the run ever had, also of those that are damaged or gone.

    What its supervisors marked, what it was branched from, and what lies there with a marker of any kind.
    """
    found = [
        event.name
        for attempt in run.attempts()
        for _, event in read_events(attempt.supervisor_events)
        if isinstance(event, CheckpointEvent)
    ]
    origin = run.branched_from()
    there = sorted(run.checkpoints_folder.iterdir()) if run.checkpoints_folder.exists() else []
    found += [origin] if origin is not None else []
    return found + [path.name for path in there if (path / MARKER).exists() or (path / DAMAGED).exists()]


def lost_checkpoints(run: RunDirectory) -> str:
    """Return what to say of a run that had checkpoints and has none that is whole, or nothing.

    Such a run must not begin again from its base as if nothing had been.
    """
    lost = [] if complete_checkpoints(run) else completed_once(run)
    if not lost:
        return ""
    return (
        f"run {run.name} had checkpoints, the last of them {lost[-1]}, and none is whole and there now in "
        f"{run.checkpoints_folder}; put one back (one that was set aside has a {DAMAGED}: remove that to have it "
        "tried again), or launch another run from the base"
    )


def lineage(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return those on the branch of the newest start, the oldest first.

    A start's own checkpoints count, then those of the start that it began from up to there, and so on.
    Two of one step are possible where a damaged one was written again; the newer start's counts.
    """
    if not checkpoints:
        return []
    newest = max(checkpoints, key=lambda checkpoint: (checkpoint.attempt, checkpoint.step))
    up_to = {newest.attempt: newest.step}
    last = newest.step
    for step, attempt in filter(None, map(parse_name, newest.facts.ancestry)):
        last = min(last, step)
        up_to.setdefault(attempt, last)
    branch = {c.step: c for c in sorted(checkpoints, key=lambda c: c.attempt) if c.step <= up_to.get(c.attempt, -1)}
    return [branch[step] for step in sorted(branch)]


def choose_checkpoint(run: RunDirectory, step: int | None = None) -> Checkpoint:
    """Return a run's newest checkpoint, or that of a step.

    Raises:
        CheckpointError: there is none; the message names those that are there.
    """
    found = complete_checkpoints(run)
    if not found:
        raise CheckpointError(f"run {run.name} has no complete checkpoint in {run.checkpoints_folder}")
    if step is None:
        return found[-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    raise CheckpointError(f"run {run.name} has no checkpoint of step {step}; there are {[c.step for c in found]}")


def damage(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint's files, by size and SHA-256.

    Args:
        names: the files to read; all of them by default.

    Raises:
        OSError: a file cannot be read, which is the file system's or the node's fault and no damage.
    """
    found = []
    for name in sorted(checkpoint.files) if names is None else names:
        path, wanted = checkpoint.path / name, checkpoint.files[name]
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                found.append(f"{path} should have {wanted.bytes} bytes, found {size}")
            elif sha256_of(path) != wanted.sha256:
                found.append(f"{path} does not have the SHA-256 that was recorded when it was written")
        except FileNotFoundError:
            found.append(f"{path} is missing")
    return found


def mark_damaged(path: Path, problems: Sequence[str], time: float) -> None:
    """Have readers leave a checkpoint out from now on; removing damaged.json brings it back."""
    write_json(path / DAMAGED, {"time": time, "problems": list(problems)})


def foreign(facts: CheckpointFacts, model: TransformerShape, tokenizer_sha256: str, data_fingerprint: str) -> list[str]:
    """Return in what a checkpoint is not of a run's own model, tokenizer and data."""
    found = [
        f"model.{field.name} is {getattr(facts.model, field.name)} in the checkpoint and "
        f"{getattr(model, field.name)} in the run"
        for field in dataclasses.fields(model)
        if getattr(facts.model, field.name) != getattr(model, field.name)
    ]
    if facts.tokenizer_sha256 != tokenizer_sha256:
        found.append(
            f"its data was made with tokenizer {facts.tokenizer_sha256[:12]}, the run's with {tokenizer_sha256[:12]}"
        )
    elif facts.data_fingerprint != data_fingerprint:
        found.append(
            f"its {facts.consumed_samples} samples are those of data {facts.data_fingerprint[:12]}, the run's first "
            f"{facts.consumed_samples} would be of {data_fingerprint[:12]}; put the data sets back as they were, and "
            "have others follow as a phase (`data.phases`)"
        )
    return found


def _plain(path: Path) -> Mapping[str, object]:
    try:
        plain: Mapping[str, object] = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except OrchestrateError as error:
        raise CheckpointError(str(error)) from error
    return plain


def _decode(kind: type[Any], plain: Mapping[str, object], path: Path) -> Any:
    problems: list[str] = []
    value = from_plain(kind, plain, "", problems)
    if value is None:
        raise CheckpointError(f"{path} is not of this version; use an earlier checkpoint:", problems[:5])
    return value
