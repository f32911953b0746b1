"""Checkpoints of a run as facts: a checkpoint exists when its marker does.

The ranks write `checkpoints/step_N.attempt_A/`, a path of their own at every start; only the
supervisor writes the marker, last, with the size and SHA-256 of each file. Standard library only.
"""

import dataclasses
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.files import read_json, sha256_of, sync_folder, write_json
from orchestrator.run_directory import RunDirectory

MARKER = "complete.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    attempt: int
    consumed_samples: int
    data_fingerprint: str
    files: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """Folder name."""
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(int(facts["bytes"]) for facts in self.files.values())


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the folder name of a step's checkpoint; names sort by step, then by attempt."""
    return f"step_{step:07d}.attempt_{attempt:04d}"


def mark_complete(
    path: Path,
    *,
    step: int,
    attempt: int,
    consumed_samples: int,
    data_fingerprint: str,
    files: dict[str, dict[str, Any]],
) -> Checkpoint:
    """Write the marker of a checkpoint whose files are all on disk.

    Raises:
        CheckpointError: a file is missing or of another size; nothing is marked.
    """
    for name, facts in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != facts["bytes"]:
            raise CheckpointError(f"{path / name} should have {facts['bytes']} bytes, found {found}; it was not marked")
    sync_folder(path)
    checkpoint = Checkpoint(
        path=path,
        step=step,
        attempt=attempt,
        consumed_samples=consumed_samples,
        data_fingerprint=data_fingerprint,
        files=files,
    )
    facts = dataclasses.asdict(checkpoint)
    del facts["path"]
    write_json(path / MARKER, facts)
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the complete checkpoint in a folder.

    Raises:
        CheckpointError: there is no folder, or no marker in it.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; `orchestrate status` lists those that are there")
    if not (path / MARKER).exists():
        raise CheckpointError(f"{path} was never completed (no {MARKER} in it); use an earlier checkpoint")
    try:
        return Checkpoint(path=path, **read_json(path / MARKER))
    except TypeError as error:
        raise CheckpointError(f"{path / MARKER} is not of this version: {error}; use an earlier checkpoint") from error


def complete_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """Return the complete checkpoints of a run's surviving trajectory, the oldest first.

    Of one step the newest attempt's counts.
    """
    by_step: dict[int, Checkpoint] = {}
    for path in sorted(run.checkpoints_folder.iterdir()) if run.checkpoints_folder.exists() else []:
        if (path / MARKER).exists():
            checkpoint = read_checkpoint(path)
            by_step[checkpoint.step] = checkpoint
    return [by_step[step] for step in sorted(by_step)]


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


def damage(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint's files, by size and SHA-256.

    Args:
        part: which share of the files to read, so that `parts` ranks read all of them in parallel.
    """
    found = []
    for index, (name, facts) in enumerate(sorted(checkpoint.files.items())):
        if index % parts != part:
            continue
        path = checkpoint.path / name
        if not path.exists():
            found.append(f"{path} is missing")
        elif path.stat().st_size != facts["bytes"]:
            found.append(f"{path} should have {facts['bytes']} bytes, found {path.stat().st_size}")
        elif sha256_of(path) != facts["sha256"]:
            found.append(f"{path} does not have the SHA-256 that was recorded when it was written")
    return found
