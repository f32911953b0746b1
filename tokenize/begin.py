"""Begin a tokenization in its folder, or go on with the one that is there, where it is the same.

The same are the settings that decide the result, all compared at once, and the files: their names, order, sizes and
times. A file that has changed is read anew where nothing is lost by it: it lies whole in one unit that is not done,
and that unit starts over.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator import owner_lock
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.tokenize.inputs import FoundFiles
from orchestrator.tokenize.source_errors import printable
from orchestrator.tokenize.units import SourceFile, plan_units
from orchestrator.tokenize.work_folder import FileState, PlannedUnit, WorkFolder, WorkPlan, file_states

COMPARED = {
    "tokenizer_sha256": "SHA-256 of the tokenizer",
    "engine": "engine",
    "end_of_document": "end of document",
    "text_key": "text_key",
    "validation_every": "validation_every",
    "validation_output": "validation_output",
    "shard_tokens": "shard_tokens",
    "unit_bytes": "unit_bytes",
}
TOLD = 5


@contextlib.contextmanager
def coordinator_lock(folder: WorkFolder) -> Iterator[owner_lock.OwnedLock]:
    """Hold the folder's lock, in a folder that is made where there is none and goes again where nothing was begun.

    Raises:
        OrchestrateError: another process has it.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = owner_lock.acquire(folder.lock, "tokenization")
    if isinstance(lock, str):
        raise OrchestrateError(
            f"{folder.path} is worked on by {lock}; wait until that one has ended, or end it and give the same command"
        )
    try:
        yield lock
    finally:
        lock.release()
        if not folder.plan.exists():
            with contextlib.suppress(OSError):
                folder.path.rmdir()


def absolute_files(found: FoundFiles) -> tuple[SourceFile, ...]:
    """Return the files with absolute paths, so that any process may read them from anywhere."""
    here = os.getcwd()  # noqa: PTH109, a hundred thousand Paths take long
    return tuple(dataclasses.replace(file, path=os.path.join(here, file.path)) for file in found.files)  # noqa: PTH118


def begin(
    folder: WorkFolder, wanted: WorkPlan, files: Sequence[SourceFile], tokenizer: Path, *, unit_bytes_given: bool
) -> WorkPlan:
    """Put the plan and its units into the folder, or check those that are there; return the plan to follow.

    Args:
        unit_bytes_given: False where the size of units is the default, which goes with the sizes of the files.

    Raises:
        DataError: what is there was begun with other settings or other files, or it is something else.
    """
    states = file_states(file.path for file in files)
    missing = [file.path for file in files if file.path not in states]
    if missing:
        raise DataError(f"{printable(missing[0])} has vanished since it was found; put it back or leave it out")
    if not folder.is_begun():
        units = [
            PlannedUnit(unit=unit, files={piece.file: states[piece.file] for piece in unit.slices})
            for unit in plan_units(files, wanted.unit_bytes)
        ]
        plan = dataclasses.replace(wanted, units=len(units))
        folder.create(plan, units, tokenizer)
        return plan
    begun, units = folder.read_plan(), folder.read_units()
    if not unit_bytes_given:
        wanted = dataclasses.replace(wanted, unit_bytes=begun.unit_bytes)
    problems = [*different_settings(begun, wanted), *different_files(units, states)]
    restarted: dict[str, int] = {}
    for file, numbers in changed_files(units, states).items():
        if len(numbers) > 1:
            problems.append(f"{printable(file)} has changed, and it is cut into {len(numbers)} units")
        elif folder.read_record(numbers[0]).state == "done":
            problems.append(f"{printable(file)} has changed, and its documents are in a shard that is finished")
        else:
            restarted[file] = numbers[0]
    if problems:
        raise DataError(
            f"{folder.path} was begun with other settings or inputs; give the same, or remove it to start over:",
            [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])],
        )
    if restarted:
        for number in sorted(set(restarted.values())):
            folder.forget(number)
        now = {file.path: file for file in files if file.path in restarted}
        folder.write_units([_with_changes(its, now, states) for its in units])
    return begun


def different_settings(begun: WorkPlan, wanted: WorkPlan) -> list[str]:
    """Return what decides the result and is not the same."""
    return [
        f"{name} was {getattr(begun, field)!r}, now {getattr(wanted, field)!r}"
        for field, name in COMPARED.items()
        if getattr(begun, field) != getattr(wanted, field)
    ]


def different_files(units: Sequence[PlannedUnit], states: Mapping[str, FileState]) -> list[str]:
    """Return in what the names of the files, in order, are not the same."""
    begun = list(dict.fromkeys(piece.file for its in units for piece in its.unit.slices))
    wanted = list(states)
    if begun == wanted:
        return []
    gone, new = set(begun) - set(wanted), set(wanted) - set(begun)
    found = [
        f"{len(files)} file{'s' if len(files) > 1 else ''} {what}: {', '.join(map(printable, sorted(files)[:TOLD]))}"
        for what, files in (("no longer there", gone), ("not there before", new))
        if files
    ]
    return found or ["the files come in another order"]


def changed_files(units: Sequence[PlannedUnit], states: Mapping[str, FileState]) -> dict[str, list[int]]:
    """Return the units of each file that is there and has another size or time."""
    found: dict[str, list[int]] = {}
    for planned in units:
        for piece in planned.unit.slices:
            if states.get(piece.file, planned.files[piece.file]) != planned.files[piece.file]:
                found.setdefault(piece.file, []).append(planned.unit.number)
    return found


def _with_changes(
    planned: PlannedUnit, changed: Mapping[str, SourceFile], states: Mapping[str, FileState]
) -> PlannedUnit:
    """Return a unit with its changed files as they are now, each whole."""
    if not changed.keys() & planned.files.keys():
        return planned
    sizes = Counter({file: -state.size for file, state in planned.files.items() if file in changed})
    slices = []
    for piece in planned.unit.slices:
        if piece.file in changed:
            source = changed[piece.file]
            sizes[piece.file] += source.size_bytes
            stop = len(source.row_groups) if source.row_groups else source.size_bytes
            piece = dataclasses.replace(piece, stop=stop)
        slices.append(piece)
    source_bytes = planned.unit.source_bytes + sum(sizes.values())
    unit = dataclasses.replace(planned.unit, slices=tuple(slices), source_bytes=source_bytes)
    return PlannedUnit(unit=unit, files={file: states[file] for file in planned.files})
