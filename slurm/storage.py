"""The file system of a run's folder, asked in threads, so that one that stops answering holds up nobody else.

A hard-mounted network file system does not fail when its server is away: whoever reads or writes stands in the
kernel until it is back, and no signal ends that.
"""

import contextlib
import logging
import logging.handlers
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from orchestrator.errors import StorageError
from orchestrator.owner_lock import OwnedLock

T = TypeVar("T")

RENEWAL_SECONDS = 5.0
POLL_SECONDS = 0.05


class Work(Generic[T]):
    """A piece of work on files in a thread of its own."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.since = time.monotonic()
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="files", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    def is_done(self, seconds: float) -> bool:
        """Wait for so long at most, and return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return what the work, which has ended, returned; or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._results[0]


class Storage:
    """What is known of it; the run's lock is renewed all the time, by which others see that its owner lives.

    Args:
        patience_seconds: how long it may not answer before that is an error.
    """

    def __init__(self, lock: OwnedLock, patience_seconds: float) -> None:
        self._lock = lock
        self._patience_seconds = patience_seconds
        self._written = time.monotonic()
        threading.Thread(target=self._keep_renewing, name="lock", daemon=True).start()

    def silent_seconds(self) -> float:
        """Return for how long a write to it has not come to its end; 0 where it is idle or answers."""
        return max(0.0, time.monotonic() - self._written - RENEWAL_SECONDS)

    def check(self, work: Work[Any] | None = None) -> None:
        """Look whether it answers.

        Args:
            work: that is under way.

        Raises:
            StorageError: neither a write nor this work has come to an end for longer than its patience.
        """
        stands = max(self.silent_seconds(), 0.0 if work is None else time.monotonic() - work.since)
        if stands > self._patience_seconds:
            raise StorageError(f"the file system of {self._lock.path.parent} has not answered for {stands:.0f} s")

    def do(self, work: Callable[[], T]) -> T:
        """Do something with files and return what it returns.

        Raises:
            StorageError: it did not end in time, and stands there still.
        """
        begun = Work(work)
        while not begun.is_done(1.0):
            self.check(begun)
        return begun.result()

    def wait(self, is_given_up: Callable[[], bool]) -> bool:
        """Wait until it answers again, for a write and a reading; False where nobody wants to wait any more."""
        reading = Work(self._lock.path.exists)
        while self.silent_seconds() > 0 or not reading.is_done(0.0):
            if is_given_up():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _keep_renewing(self) -> None:
        while self._lock.is_mine():
            self._lock.renew()
            self._written = time.monotonic()
            time.sleep(RENEWAL_SECONDS)


@contextlib.contextmanager
def logging_aside() -> Iterator[None]:
    """Have what is logged written by a thread: a job's output lies on the same file system as its run."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, *handlers)
    listener.start()
    root.handlers = [logging.handlers.QueueHandler(lines)]
    try:
        yield
    finally:
        root.handlers = handlers
        listener.stop()
