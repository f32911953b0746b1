"""One unit of work, from its last commit to its end, by one process.

A commit flushes the data files and then puts the unit's record in place: where reading goes on and how long every
file is. After a kill the files are cut to these lengths, so what follows is what would have followed. It all
depends on the unit alone; even a process that was thought dead and still writes puts the same bytes where its
successor does.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import BinaryIO

import numpy

from orchestrator import owner_lock
from orchestrator.errors import DataError
from orchestrator.tokenize.blocks import BLOCK_BYTES, Block, read_unit
from orchestrator.tokenize.document_lengths import count_lengths
from orchestrator.tokenize.engine import BadRecord, EncodedBlock, Engine, EngineError
from orchestrator.tokenize.shard import Lengths, ShardWriter, open_at
from orchestrator.tokenize.units import Position
from orchestrator.tokenize.work_folder import (
    Part,
    PartRecord,
    PlannedUnit,
    UnitRecord,
    WorkFolder,
    WorkPlan,
    file_states,
    shard_name,
    unit_files,
)
from orchestrator.tokenize.write_errors import explain

COMMIT_SECONDS = 2.0
STALE_SECONDS = 120.0  # age of another host's lock, which is renewed at each commit
PATIENCE_SECONDS = STALE_SECONDS + 10  # also for a process of this host that has yet to notice that it is orphaned
FIRST_BAD = 3


def work_unit(
    folder: WorkFolder,
    plan: WorkPlan,
    planned: PlannedUnit,
    engine: Engine,
    *,
    commit_seconds: float = COMMIT_SECONDS,
    block_bytes: int = BLOCK_BYTES,
) -> Generator[None, None, None]:
    """Bring a unit from its last commit to its end, yielding after each block; what is committed stays in any case.

    Raises:
        DataError: a file cannot be read or has changed, a record on disk is damaged, another process has the unit,
            or two engines disagree on a document, which is then kept.
        DiskFullError: there is no room left.
    """
    number = planned.unit.number
    lock = _take(folder, planned)
    try:
        record = folder.read_record(number)
        if record.state == "done":
            return
        with _UnitFiles(folder, plan, record) as files:
            due = time.monotonic() + commit_seconds
            for block in read_unit(planned.unit, plan.text_key, record.position, block_bytes=block_bytes):
                files.add(block, _encode(engine, block, plan.text_key))
                yield
                if time.monotonic() >= due:
                    _keep(lock, planned)
                    files.commit(block.end)
                    due = time.monotonic() + commit_seconds
            _refuse_changed(planned)
            _keep(lock, planned)
            files.finish(planned)
    except EngineError as error:
        folder.disagreement.write_bytes(error.document)
        raise DataError(
            f"{planned.describe()}: {error}; the document is kept in {folder.disagreement}; report it, and go on with "
            f"--engine sentencepiece after removing {folder.path}"
        ) from error
    except DataError as error:
        raise DataError(
            f"{planned.describe()}: {error}; what is done is kept in {folder.path}, and the same command goes on"
        ) from error
    except OSError as error:
        raise explain(error, planned.describe(), folder.path) from error
    finally:
        lock.release()


def _encode(engine: Engine, block: Block, text_key: str) -> EncodedBlock:
    if block.texts is not None:
        return engine.encode_texts(block.texts)
    return engine.encode_lines(block.lines, text_key)


def _take(folder: WorkFolder, planned: PlannedUnit) -> owner_lock.OwnedLock:
    path = folder.unit_lock(planned.unit.number)
    until = time.monotonic() + PATIENCE_SECONDS
    while isinstance(lock := owner_lock.acquire(path, "worker", stale_seconds=STALE_SECONDS), str):
        if time.monotonic() > until:
            raise DataError(f"{planned.describe()} is worked on by {lock}; end that one, or wait until it has ended")
        time.sleep(0.2)
    return lock


def _keep(lock: owner_lock.OwnedLock, planned: PlannedUnit) -> None:
    """Show that we live, or leave where another process has taken the unit."""
    if not lock.is_mine():
        raise DataError("another process took it over, since this one did not answer for long")
    lock.renew()


def _refuse_changed(planned: PlannedUnit) -> None:
    now = file_states(planned.files)
    changed = [file for file, state in planned.files.items() if now.get(file) != state]
    if changed:
        raise DataError(
            f"{changed[0]} has changed while it was read; leave inputs as they are, or remove what was begun and "
            "tokenize anew"
        )


class _UnitFiles:
    """The files of a unit, and what is in them."""

    def __init__(self, folder: WorkFolder, plan: WorkPlan, record: UnitRecord) -> None:
        self._folder = folder
        self._every = plan.validation_every
        self._dtype = plan.dtype
        self._record = record
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            self._training = _PartFiles(folder, plan, "training", record.unit, record.training)
            opened.callback(self._training.close)
            self._validation = _PartFiles(folder, plan, "validation", record.unit, record.validation)
            opened.callback(self._validation.close)
            self._quarantine = _Quarantine(folder, record)
            opened.callback(self._quarantine.close)
            self._stack = opened.pop_all()

    def __enter__(self) -> "_UnitFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, block: Block, encoded: EncodedBlock) -> None:
        """Write a block's documents to their parts and its bad records to the quarantine."""
        bad = (*encoded.bad, *block.bad)
        self._quarantine.add(block, bad)
        self._record = dataclasses.replace(
            self._record,
            source_bytes=self._record.source_bytes + block.source_bytes,
            records=self._record.records + encoded.records + len(block.bad),
            empty=self._record.empty + encoded.empty,
            quarantined=self._record.quarantined + len(bad),
        )
        held_out = encoded.checksums % self._every == 0 if self._every else None
        if held_out is None or not held_out.any():
            self._training.add(encoded.ids, encoded.lengths, int(encoded.text_bytes.sum()))
            return
        ids = numpy.frombuffer(encoded.ids, dtype=self._dtype)
        ids_held_out = numpy.repeat(held_out, encoded.lengths)
        for part, documents, tokens in (
            (self._validation, held_out, ids_held_out),
            (self._training, ~held_out, ~ids_held_out),
        ):
            lengths, text_bytes = encoded.lengths[documents], int(encoded.text_bytes[documents].sum())
            part.add(ids[tokens].tobytes(), lengths, text_bytes)

    def commit(self, position: Position) -> None:
        """Flush to disk and put the record in place."""
        self._commit(dataclasses.replace(self._record, position=position))

    def finish(self, planned: PlannedUnit) -> None:
        """Close the shards and put the last record in place."""
        self._training.close_shard()
        self._validation.close_shard()
        end = Position(slice=len(planned.unit.slices), offset=0)
        source_bytes = planned.unit.source_bytes
        self._commit(dataclasses.replace(self._record, state="done", position=end, source_bytes=source_bytes))

    def _commit(self, record: UnitRecord) -> None:
        self._record = dataclasses.replace(
            record,
            training=self._training.sync(),
            validation=self._validation.sync(),
            quarantine_bytes=self._quarantine.sync(),
            first_bad=self._quarantine.first,
        )
        self._record.check()
        self._folder.write_record(self._record)
        self._training.remove_spent()
        self._validation.remove_spent()


class _PartFiles:
    """The shards of a unit in one part."""

    def __init__(self, folder: WorkFolder, plan: WorkPlan, part: Part, unit: int, record: PartRecord) -> None:
        self._folder = folder
        self._part: Part = part
        self._unit = unit
        self._dtype = plan.dtype
        self._shard_tokens = plan.shard_tokens
        self._shards = record.shards
        self._text_bytes = record.text_bytes
        self._counted = record.lengths
        self._spent = [folder.lengths(part, shard.name) for shard in record.shards]
        self._open: ShardWriter | None = None
        self._remove_uncommitted(record)
        if record.open_documents:
            self._open = self._writer(record.open_documents, record.open_tokens)

    def add(self, ids: bytes | memoryview, lengths: Lengths, text_bytes: int) -> None:
        """Append documents; a shard that becomes full is closed."""
        self._text_bytes += text_bytes
        self._counted += count_lengths(lengths)
        ids, token_bytes = memoryview(ids).cast("B"), numpy.dtype(self._dtype).itemsize
        ends = numpy.cumsum(lengths, dtype=numpy.int64)
        documents = tokens = 0
        while documents < lengths.size:
            if self._open is None:
                self._open = self._writer()
            full_at = tokens + self._shard_tokens - self._open.tokens
            stop = min(int(numpy.searchsorted(ends, full_at)) + 1, lengths.size)
            end = int(ends[stop - 1])
            self._open.add(ids[tokens * token_bytes : end * token_bytes], lengths[documents:stop])
            documents, tokens = stop, end
            if self._open.tokens >= self._shard_tokens:
                self.close_shard()

    def close_shard(self) -> None:
        """Write the index of the open shard, if there is one."""
        if self._open is not None:
            self._shards += (self._open.finish(),)
            self._spent.append(self._open.lengths_path)
            self._open = None

    def sync(self) -> PartRecord:
        """Flush to disk and return what is there."""
        if self._open is not None:
            self._open.sync()
        return PartRecord(
            shards=self._shards,
            open_documents=self._open.documents if self._open else 0,
            open_tokens=self._open.tokens if self._open else 0,
            text_bytes=self._text_bytes,
            lengths=self._counted,
        )

    def remove_spent(self) -> None:
        """Remove the lengths of shards that the record on disk has as closed."""
        for path in self._spent:
            path.unlink(missing_ok=True)
        self._spent.clear()

    def close(self) -> None:
        """Close the files as they are."""
        if self._open is not None:
            self._open.close()

    def _writer(self, documents: int = 0, tokens: int = 0) -> ShardWriter:
        name = shard_name(self._unit, len(self._shards))
        lengths = self._folder.lengths(self._part, name)
        return ShardWriter(
            self._folder.part(self._part), name, self._dtype, lengths=lengths, documents=documents, tokens=tokens
        )

    def _remove_uncommitted(self, record: PartRecord) -> None:
        """Remove what a killed process wrote after its last commit, but for the shard that is gone on with."""
        folder = self._folder.part(self._part)
        kept = {folder / f"{shard.name}{suffix}" for shard in record.shards for suffix in (".bin", ".idx")}
        if record.open_documents:
            name = shard_name(self._unit, len(record.shards))
            kept |= {folder / f"{name}.bin"}
        for path in {*unit_files(folder, self._unit)} - kept:
            path.unlink()
        self.remove_spent()


class _Quarantine:
    """Records that could not be read, each with where it was and why."""

    def __init__(self, folder: WorkFolder, record: UnitRecord) -> None:
        self._path = folder.quarantine(record.unit)
        self._stream: BinaryIO | None = None
        self.first = record.first_bad
        if record.quarantine_bytes or self._path.exists():
            self._stream = open_at(self._path, record.quarantine_bytes)

    def add(self, block: Block, records: Sequence[BadRecord]) -> None:
        """Write a block's bad records, in the order in which its file has them."""
        if not records:
            return
        if self._stream is None:
            self._stream = open_at(self._path, 0)
        for bad in sorted(records, key=lambda bad: block.place(bad.offset)[1]):
            file, offset = block.place(bad.offset)
            record = {
                "file": file,
                "offset": offset,
                "bytes": len(bad.content),
                "reason": bad.reason,
                "content": bad.content.decode("utf-8", "backslashreplace"),
            }
            self._stream.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
            if len(self.first) < FIRST_BAD:
                self.first += (f"{file}, byte {offset}: {bad.reason}",)

    def sync(self) -> int:
        """Flush to disk and return the size."""
        if self._stream is None:
            return 0
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        """Close the file as it is."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
