"""Follow the units' records while they are worked on, by whatever process: a progress bar, and too many bad records.

The bar stands on stderr; where that is no terminal, only its last state is written.
"""

import contextlib
import os
import time
from collections.abc import Iterator

from orchestrator.errors import OrchestrateError
from orchestrator.owner_lock import OwnedLock
from orchestrator.tokenize.tally import Tally, add_up, refuse_too_many_bad
from orchestrator.tokenize.work_folder import UnitRecord, WorkFolder
from orchestrator.units import format_count

LOOK_SECONDS = 0.5
RENEW_SECONDS = 60.0


class Watch:
    """Reads the records that have changed, about twice a second however often it is asked.

    Args:
        lock: the coordinator's, renewed here.
    """

    def __init__(self, folder: WorkFolder, lock: OwnedLock, *, source_bytes: int, max_bad: float, bar: bool) -> None:
        self._folder = folder
        self._lock = lock
        self._max_bad = max_bad
        self._records: dict[int, tuple[tuple[int, int], UnitRecord]] = {}
        self._next_look = self._next_renewal = 0.0
        self._read()
        self._bar = _Bar(source_bytes, self.tally()) if bar else None

    def look(self) -> None:
        """Bring the bar up to date.

        Raises:
            DataError: too many records are bad.
            OrchestrateError: another process has taken the work over.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        if now >= self._next_renewal:
            if not self._lock.is_mine():
                raise OrchestrateError(f"another process took over {self._folder.path}; leave it to that one")
            self._lock.renew()
            self._next_renewal = now + RENEW_SECONDS
        self._read()
        tally = self.tally()
        if self._bar is not None:
            self._bar.show(tally)
        refuse_too_many_bad(tally, self._max_bad, at_end=False)

    def finish(self) -> list[UnitRecord]:
        """Show the last state and return all records in the order of the units."""
        self._read(anew=True)
        if self._bar is not None:
            self._bar.show(self.tally())
        return self._in_order()

    def tally(self) -> Tally:
        """Sum up what was read last."""
        return add_up(self._in_order())

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar during the block."""
        if self._bar is None:
            yield
            return
        with self._bar.progress:
            yield

    def _in_order(self) -> list[UnitRecord]:
        return sorted((record for _, record in self._records.values()), key=lambda record: record.unit)

    def _read(self, *, anew: bool = False) -> None:
        """Read the records of units that were not done; `anew` also those whose file looks as before."""
        with os.scandir(self._folder.records) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."]
        for unit in map(int, (name.removesuffix(".json") for name in names)):
            seen, record = self._records.get(unit, ((0, 0), None))
            if record is not None and record.state == "done":
                continue
            status = self._folder.record(unit).stat()
            now = (status.st_ino, status.st_mtime_ns)
            if anew or now != seen:
                self._records[unit] = (now, self._folder.read_record(unit))


class _Bar:
    """A bar with the speed since this start."""

    def __init__(self, source_bytes: int, begun: Tally) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("going on" if begun.records else "tokenize"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._task = self.progress.add_task("", total=max(1, source_bytes), completed=begun.source_bytes, counts="")
        self._source_bytes = source_bytes
        self._begun = begun
        self._start = time.monotonic()

    def show(self, tally: Tally) -> None:
        """Bring counts and speed up to date."""
        seconds = max(1e-3, time.monotonic() - self._start)
        read, tokens = tally.source_bytes - self._begun.source_bytes, tally.tokens - self._begun.tokens
        counts = (
            f"{read / 1e6 / seconds:.1f} MB/s  {format_count(tokens / seconds)} tokens/s  "
            f"{format_count(tally.records)} documents  {format_count(tally.quarantined)} bad"
        )
        completed = tally.source_bytes if self._source_bytes else 1
        self.progress.update(self._task, completed=completed, counts=counts)
