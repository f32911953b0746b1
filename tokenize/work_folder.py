"""The folder in which a tokenization is under way: what is wanted, what it is cut into, how far each unit is.

    OUTPUT.partial/
      plan.json                       settings; written last when the folder is made, so without it nothing was begun
      units.jsonl                     a unit a line, in order, with size and time of each file
      lock                            of the one process that coordinates
      tokenizer.model | .json         copy, with which every process works, and of a tokenizer_config.json beside it
      units/00012.json                the unit's record, whole at every commit
      units/00012.lock                of the process that works on it
      units/00012.quarantine.jsonl    records that could not be read
      units/shard_00012.training.lengths   of a shard that is not closed yet
      training/shard_00012.bin .idx   of unit 12; shard_00012_001 where it has more than one
      validation/shard_00012.bin .idx documents held out
      disagreement.txt                a document on which two engines disagreed
      array.json                      the Slurm job array that works on the units, where one does
      logs/                           its script, and what its tasks say
      published.json                  written when all is done, before the folders move to their final names

Only `WorkFolder` knows these names.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from orchestrator.errors import DataError
from orchestrator.files import read_json, write_atomic
from orchestrator.tokenize.document_lengths import DocumentLengths
from orchestrator.tokenize.engine import EngineChoice
from orchestrator.tokenize.manifest import TokenShard, TokenType
from orchestrator.tokenize.source_errors import printable
from orchestrator.tokenize.units import Position, Slice, Unit
from orchestrator.values import from_plain, to_plain

VERSION = 1
TOKENIZER_CONFIG = "tokenizer_config.json"  # names the end of document of a tokenizer.json

Part = Literal["training", "validation"]
PARTS: tuple[Part, ...] = ("training", "validation")
NO_LENGTHS = DocumentLengths()
BEGINNING = Position(slice=0, offset=0)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """What decides the result, and what the manifest will say of it."""

    tokenizer_file: str
    """Name of the copy."""
    tokenizer_sha256: str
    engine_choice: EngineChoice
    engine: str
    """Name and version of the engine that was chosen; every process must get the same."""
    vocab_size: int
    end_of_document: int
    begin_of_document: int | None
    text_key: str
    validation_every: int | None
    validation_output: str | None
    """Absolute."""
    shard_tokens: int
    unit_bytes: int
    inputs: tuple[str, ...]
    """As they were given."""
    files: int
    skipped_files: dict[str, int]
    units: int
    dtype: TokenType
    version: int = VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileState:
    """What tells whether a file is as it was."""

    size: int
    modified_ns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedUnit:
    """A unit, and its files as they were when it was planned."""

    unit: Unit
    files: dict[str, FileState]

    def describe(self) -> str:
        """Name the unit and what it reads, for messages."""
        first, others = self.unit.slices[0], len(self.unit.slices) - 1
        more = f" and {others} more file{'s' if others > 1 else ''}" if others else ""
        return f"unit {self.unit.number} ({printable(first.file)} from {first.start} to {first.stop}{more})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What a unit has put on disk for training, or for validation."""

    shards: tuple[TokenShard, ...] = ()
    """Those that are closed."""
    open_documents: int = 0
    """In the one after them; it has files only where this is not 0."""
    open_tokens: int = 0
    text_bytes: int = 0
    lengths: DocumentLengths = NO_LENGTHS

    @property
    def documents(self) -> int:
        """Documents in all its shards."""
        return sum(shard.documents for shard in self.shards) + self.open_documents

    @property
    def tokens(self) -> int:
        """Tokens in all its shards."""
        return sum(shard.tokens for shard in self.shards) + self.open_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """How far a unit is. `records == training.documents + validation.documents + empty + quarantined`."""

    unit: int
    state: Literal["running", "done"] = "running"
    position: Position = BEGINNING
    """From where reading goes on."""
    source_bytes: int = 0
    """Read so far, on disk."""
    records: int = 0
    empty: int = 0
    quarantined: int = 0
    quarantine_bytes: int = 0
    """Of the file with the quarantined records."""
    first_bad: tuple[str, ...] = ()
    training: PartRecord = PartRecord()
    validation: PartRecord = PartRecord()

    def check(self) -> None:
        """Account for every record."""
        written = self.training.documents + self.validation.documents
        if self.records != written + self.empty + self.quarantined:
            raise AssertionError(
                f"unit {self.unit}: {self.records} records read, but {written} documents written, {self.empty} empty "
                f"and {self.quarantined} quarantined; this is a fault of orchestrator.tokenize"
            )


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """Reads and writes what lies in `OUTPUT.partial`."""

    path: Path

    @property
    def plan(self) -> Path:
        """What is wanted."""
        return self.path / "plan.json"

    @property
    def units(self) -> Path:
        """The units."""
        return self.path / "units.jsonl"

    @property
    def records(self) -> Path:
        """Folder of the units' records."""
        return self.path / "units"

    @property
    def lock(self) -> Path:
        """Of the coordinator."""
        return self.path / "lock"

    @property
    def published(self) -> Path:
        """Says that all is done, with the fingerprints of what appears."""
        return self.path / "published.json"

    @property
    def disagreement(self) -> Path:
        """Text of a document on which two engines disagreed."""
        return self.path / "disagreement.txt"

    @property
    def array(self) -> Path:
        """Which Slurm job array works on the units."""
        return self.path / "array.json"

    @property
    def logs(self) -> Path:
        """Folder of the array's script and logs."""
        return self.path / "logs"

    def part(self, part: Part) -> Path:
        """Folder of a part's shards."""
        return self.path / part

    def record(self, unit: int) -> Path:
        """The unit's record."""
        return self.records / f"{unit:05d}.json"

    def unit_lock(self, unit: int) -> Path:
        """Of the process that works on the unit."""
        return self.records / f"{unit:05d}.lock"

    def quarantine(self, unit: int) -> Path:
        """The unit's records that could not be read."""
        return self.records / f"{unit:05d}.quarantine.jsonl"

    def lengths(self, part: Part, shard: str) -> Path:
        """Lengths of the documents of a shard that is not closed."""
        return self.records / f"{shard}.{part}.lengths"

    def create(self, plan: WorkPlan, units: Sequence[PlannedUnit], tokenizer: Path) -> None:
        """Make what the folder begins with; the plan last."""
        for folder in (self.records, *map(self.part, PARTS)):
            if folder.exists():  # of a beginning that was killed, or whose plan somebody has removed
                shutil.rmtree(folder)
            folder.mkdir()
        write_atomic(self.path / plan.tokenizer_file, tokenizer.read_bytes())
        config = tokenizer.with_name(TOKENIZER_CONFIG)
        if config.exists():
            write_atomic(self.path / TOKENIZER_CONFIG, config.read_bytes())
        self.write_units(units)
        write_atomic(self.plan, _to_json(plan))

    def is_begun(self) -> bool:
        """Return whether a plan is there.

        Raises:
            DataError: the folder has something else in it.
        """
        if self.plan.exists():
            return True
        ours = {self.units.name, self.lock.name, self.records.name, *PARTS}
        ours |= {"tokenizer.model", "tokenizer.json", TOKENIZER_CONFIG}
        others = [entry.name for entry in self.path.iterdir() if entry.name not in ours and entry.name[0] != "."]
        if others:
            raise DataError(
                f"{self.path} should be free for the work under way, but it has {others[0]!r} and no {self.plan.name}; "
                "move it away or name another output"
            )
        return False

    def read_plan(self) -> WorkPlan:
        """Return the plan.

        Raises:
            DataError: it is damaged, or another version's.
        """
        data = read_json(self.plan)
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise DataError(
                f"{self.plan} should have version {VERSION}, found {version!r}; another version of orchestrate began "
                f"it: finish with that one, or remove {self.path}"
            )
        return self._strict(WorkPlan, data, self.plan)

    def write_units(self, units: Iterable[PlannedUnit]) -> None:
        """Write the units, each with its files' states."""
        write_atomic(self.units, b"".join(_unit_line(planned) for planned in units))

    def read_units(self) -> list[PlannedUnit]:
        """Return the units in their order."""
        with self.units.open("rb") as stream:
            return [_read_unit_line(line) for line in stream]

    def read_unit(self, number: int) -> PlannedUnit:
        """Return one unit."""
        with self.units.open("rb") as stream:
            for index, line in enumerate(stream):
                if index == number:
                    return _read_unit_line(line)
        raise DataError(f"{self.units} has no unit {number}; give the numbers of units that were planned")

    def write_record(self, record: UnitRecord) -> None:
        """Put a unit's record in place, whole."""
        write_atomic(self.record(record.unit), _to_json(record))

    def read_record(self, unit: int) -> UnitRecord:
        """Return a unit's record, or that of one not begun.

        Raises:
            DataError: it is damaged.
        """
        path = self.record(unit)
        return self._strict(UnitRecord, read_json(path), path) if path.exists() else UnitRecord(unit=unit)

    def forget(self, unit: int) -> None:
        """Let a unit start over: its record goes first."""
        self.record(unit).unlink(missing_ok=True)
        self.quarantine(unit).unlink(missing_ok=True)
        for folder in (self.records, *map(self.part, PARTS)):
            for path in unit_files(folder, unit):
                path.unlink()

    def _strict(self, kind: type[T], data: object, path: Path) -> T:
        problems: list[str] = []
        value = from_plain(kind, data, "", problems)
        if value is None:
            raise DataError(
                f"{path} is damaged; remove it and that unit starts over, or remove {self.path} to start all over:",
                problems,
            )
        return value


def file_states(files: Iterable[str]) -> dict[str, FileState]:
    """Return the states of those files that are there."""
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(file)  # noqa: PTH116, of many files
            found[file] = FileState(size=status.st_size, modified_ns=status.st_mtime_ns)
    return found


def shard_name(unit: int, number: int) -> str:
    """Return the name of a unit's shard; most have one alone."""
    return f"shard_{unit:05d}_{number:03d}" if number else f"shard_{unit:05d}"


def unit_files(folder: Path, unit: int) -> Iterator[Path]:
    """Yield the files of a unit's shards in a folder."""
    yield from folder.glob(f"{shard_name(unit, 0)}.*")
    yield from folder.glob(f"{shard_name(unit, 0)}_*")


def _to_json(value: object) -> str:
    return json.dumps(to_plain(value), indent=1) + "\n"


def _unit_line(planned: PlannedUnit) -> bytes:
    """One line; names that are no UTF-8 are kept as JSON's escapes."""
    slices = []
    for piece in planned.unit.slices:
        state = planned.files[piece.file]
        slices.append([piece.file, piece.start, piece.stop, state.size, state.modified_ns])
    return json.dumps([planned.unit.number, planned.unit.source_bytes, slices]).encode() + b"\n"


def _read_unit_line(line: bytes) -> PlannedUnit:
    try:
        number, source_bytes, rows = json.loads(line)
        slices = tuple(Slice(file=file, start=start, stop=stop) for file, start, stop, _, _ in rows)
        files = {file: FileState(size=size, modified_ns=modified) for file, _, _, size, modified in rows}
        return PlannedUnit(unit=Unit(number=number, slices=slices, source_bytes=source_bytes), files=files)
    except (ValueError, TypeError) as error:
        raise DataError(f"units.jsonl is damaged: {error}; remove the folder it is in and start over") from error
