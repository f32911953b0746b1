"""Each rank watches itself: what takes longer than `patience` allows ends the rank, with the stacks of its threads.

A thread knows the activity of the main thread, and the save that is written beside it. Where one is late it writes the
stacks of all threads, the flight record of NCCL or gloo, and a record of the failure, and ends the process with `HANG`.
Other ranks are late then too, since they wait: a record says whether its rank waited, or was waited for.

A rank that holds Python's lock in native code runs no thread; faulthandler's own, in C, then writes the stacks to the
rank's log, and the supervisor ends it. A rank that is stopped, or stuck in the kernel, tells nothing.

Rank 0 also looks whether a newer attempt was started: then this one was given up while its ranks lived on.
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from megatron_solar.failures import record_failure
from megatron_solar.stacks import is_waiting, place, traceback_of
from orchestrator import exit_codes
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.settings import PatienceSettings

LOOK_SECONDS = 1.0
STOPPED_SECONDS = 5.0
"""A watch that slept for so much longer than it wanted was stopped with its process, as a suspended job is."""
LATER_SECONDS = 5.0
"""After a limit, how soon stacks are written without Python's lock."""
TELL_SECONDS = 5.0
"""How long the disk has to take what is told of a hang."""
SHARED_SECONDS = 2.0
"""How long a rank stays after it has told of a hang: a connection that ends would have others tell of that."""
FLIGHT_RECORD_SECONDS = 2.0
NEWER_SECONDS = 5.0
"""How often rank 0 looks for a newer attempt."""
STDERR = 2
CONNECTION_SECONDS = 600.0
"""By how much torch.distributed is more patient than any limit here, so that a hang is told as one."""


class Phase(StrEnum):
    """What a rank is doing."""

    START = "start"
    """From the worker's first line until the first step of the attempt is done."""
    STEP = "step"
    VALIDATION = "validation"
    SAVE = "save"
    """Also the end of training, which waits for the last save."""


class _Activity(NamedTuple):
    phase: Phase
    step: int | None
    """The last one that is done."""
    began: float
    limit: float
    """Seconds."""
    limit_of_waiting: float
    """Seconds it may take while it waits for other ranks, which may still be in a phase before."""
    thread: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stand:
    """An activity that is late."""

    phase: Phase
    step: int | None
    seconds: float
    waits_for_others: bool
    at: str
    """Innermost place in our code or megatron's."""
    traceback: str

    @property
    def message(self) -> str:
        """What a person reads first."""
        waits = " waiting for other ranks" if self.waits_for_others else ""
        return f"stood for {self.seconds:.0f} s in the phase {self.phase}{waits}: {self.at}"


def connection_seconds(patience: PatienceSettings) -> float:
    """Return how long a collective may take before torch.distributed itself gives up, in seconds."""
    return max(_limits(patience).values()) + CONNECTION_SECONDS


class HangWatch:
    """The watch over one rank; made and told by its main thread."""

    def __init__(
        self, run: RunDirectory, attempt: AttemptDirectory, rank: int, patience: PatienceSettings, *, began: float
    ) -> None:
        """Take a rank's activity as its start.

        Args:
            began: `time.monotonic()` of the rank's first line.
        """
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._limits = _limits(patience)
        self._main = threading.get_ident()
        self._counts_from = began
        """No activity counts from before: then the process was stopped."""
        self._unsynchronized = self._limits[Phase.START]
        """Largest limit of the phases in which a rank may be that has not come to the last step's end yet."""
        self._activity = _Activity(Phase.START, None, began, self._unsynchronized, self._unsynchronized, self._main)
        self._saving: _Activity | None = None
        self._is_telling = False

    def start(self) -> None:
        """Begin to watch."""
        self._arm(self._activity.limit)
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        if self._rank == 0:
            threading.Thread(target=self._look_for_newer, name="newer attempts", daemon=True).start()

    def enter(self, phase: Phase, step: int | None) -> None:
        """Say what the main thread does from here on.

        Ranks meet in each step and nowhere else for certain, so that one that waits in a step may wait for another
        that still validates or saves.

        Args:
            step: the last one that is done; None before the state is loaded.
        """
        limit = self._limits[phase]
        limit_of_waiting = max(limit, self._unsynchronized)
        self._unsynchronized = limit if phase == Phase.STEP else limit_of_waiting
        self._activity = _Activity(phase, step, time.monotonic(), limit, limit_of_waiting, self._main)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Watch the calling thread while it writes this rank's part of a checkpoint; one at a time."""
        limit = self._limits[Phase.SAVE]
        step, began = self._activity.step, time.monotonic()
        self._saving = _Activity(Phase.SAVE, step, began, limit, limit, threading.get_ident())
        try:
            yield
        finally:
            self._saving = None

    def yield_to_hang(self) -> None:
        """Stand still where a hang is being told: what its end brings about counts less."""
        if self._is_telling:
            threading.Event().wait()

    def _watch(self) -> None:
        pause = 0.0
        while True:
            before = time.monotonic()
            time.sleep(pause)
            now = time.monotonic()
            if now - before > pause + STOPPED_SECONDS:
                self._counts_from = now
            late, seconds_left = self._look(now)
            if late is not None:
                self._end(late)
            self._arm(seconds_left)
            pause = min(LOOK_SECONDS, max(0.01, seconds_left))

    def _arm(self, seconds: float) -> None:
        """Have stacks written where no thread of Python comes back before a limit, this one included."""
        faulthandler.dump_traceback_later(seconds + LATER_SECONDS, file=STDERR)

    def _look(self, now: float) -> tuple[Stand | None, float]:
        """Return an activity that is late, or None with the seconds until one may be."""
        left = []
        for activity in self._under_way():
            seconds = now - max(activity.began, self._counts_from)
            if seconds < activity.limit:
                left.append(activity.limit - seconds)
                continue
            frame = sys._current_frames().get(activity.thread)
            if frame is None or activity not in self._under_way():  # it has just ended
                left.append(0.0)
                continue
            waits = is_waiting(frame)
            if waits and seconds < activity.limit_of_waiting:
                left.append(activity.limit_of_waiting - seconds)
                continue
            stand = Stand(
                phase=activity.phase,
                step=activity.step,
                seconds=seconds,
                waits_for_others=waits,
                at=place(frame),
                traceback=traceback_of(frame),
            )
            return stand, 0.0
        return None, min(left)

    def _under_way(self) -> list[_Activity]:
        saving, main = self._saving, self._activity
        if saving is None:
            return [main]
        return [saving] if main.phase == Phase.SAVE else [saving, main]  # where main only waits for the thread

    def _end(self, stand: Stand) -> None:
        """Tell of a hang, as far as the disk takes it, and end the process."""
        self._is_telling = True
        faulthandler.cancel_dump_traceback_later()
        _within(TELL_SECONDS, lambda: self._tell(stand))
        time.sleep(SHARED_SECONDS)
        os._exit(exit_codes.HANG)

    def _tell(self, stand: Stand) -> None:
        stacks = self._attempt.stacks / f"rank_{self._rank:04d}.txt"
        with contextlib.suppress(OSError):
            stacks.parent.mkdir(exist_ok=True)
            with stacks.open("w") as stream:
                faulthandler.dump_traceback(file=stream, all_threads=True)
        found: list[str] = []
        _within(FLIGHT_RECORD_SECONDS, lambda: found.append(self._write_flight_record()))
        record_failure(
            self._attempt,
            self._rank,
            step=stand.step,
            exit_code=exit_codes.HANG,
            error="Hang",
            message=stand.message,
            traceback=f"{stand.traceback}Hang: {stand.message}\n",
            more={
                "stands": {
                    "phase": stand.phase,
                    "seconds": stand.seconds,
                    "waits_for_others": stand.waits_for_others,
                    "at": stand.at,
                    "stacks": str(stacks.relative_to(self._attempt.path)),
                    "flight_record": found[0] if found and found[0] else None,
                }
            },
        )

    def _write_flight_record(self) -> str:
        """Write the last collectives of this rank, and return the file's name in the attempt's folder, or nothing.

        A pickle, as torch's own tools read it. For NCCL it has never run.
        """
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            return ""
        backend = str(distributed.get_backend())
        bindings = sys.modules["torch._C._distributed_c10d"]
        dump = getattr(bindings, "_dump_nccl_trace" if backend == "nccl" else "_dump_fr_trace", None)
        if dump is None:  # torch was built without it
            return ""
        path = self._attempt.stacks / f"rank_{self._rank:04d}.{backend}"
        path.write_bytes(dump())
        return str(path.relative_to(self._attempt.path))

    def _look_for_newer(self) -> None:
        """End this rank where a newer attempt was started; the others follow when their connection breaks."""
        while True:
            time.sleep(NEWER_SECONDS)
            newest = 0
            with contextlib.suppress(OSError):
                # The folder is read anew, since a network file system remembers for long that a name was not there.
                names = os.listdir(self._run.attempts_folder)  # noqa: PTH208
                newest = max(int(name) for name in names if name.isdigit())
            if newest > self._attempt.number:
                self._is_telling = True
                message = f"attempt {newest} was started; the ranks of attempt {self._attempt.number} leave"
                record_failure(
                    self._attempt,
                    self._rank,
                    step=self._activity.step,
                    exit_code=exit_codes.SUPERSEDED,
                    error="Superseded",
                    message=message,
                    traceback=f"Superseded: {message}\n",
                )
                os._exit(exit_codes.SUPERSEDED)


def _limits(patience: PatienceSettings) -> dict[Phase, float]:
    return {
        Phase.START: patience.start_seconds,
        Phase.STEP: patience.step_seconds,
        Phase.VALIDATION: patience.validation_seconds,
        Phase.SAVE: patience.save_seconds,
    }


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Do something in a thread, and give it up where it takes too long."""
    thread = threading.Thread(target=act, name="tell of a hang", daemon=True)
    thread.start()
    thread.join(seconds)
