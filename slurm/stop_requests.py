"""Why the ranks of a run are to stop, and by when: what signals and a person's mark ask for."""

import math
import signal
import time
from types import FrameType

from orchestrator.exit_codes import Cause
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.job import OwnJob, job_facts, kill_wait_seconds, why_terminated

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.05
KILL_WAIT_SHARE = 0.8
"""Of the time between Slurm's TERM and its KILL, how much the ranks may take for their save."""


class StopRequests:
    """Hears the time limit's warning, Slurm's or a person's TERM, and looks for the cancel mark."""

    def __init__(self, run: RunDirectory, job: OwnJob | None, warning_seconds: float) -> None:
        self._run = run
        self._job = job
        self._warning_seconds = warning_seconds
        self._kill_wait_seconds = kill_wait_seconds() if job is not None else 0.0
        self._heard_term: float | None = None
        self._looked = time.monotonic()
        self.heard: list[str] = []
        """Signals with their times, and what they were for, in words."""
        self.asked: Cause | None = None
        """Why the ranks are to stop, once that is known."""
        self.deadline: float | None = None
        """Monotonic time by which they must have left."""

    def listen(self) -> None:
        """Hear signals from now on; only the main thread may ask for that."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._hear)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    @property
    def is_asked(self) -> bool:
        """Whether the ranks are to stop, also while nobody knows yet why."""
        return self.asked is not None or self._heard_term is not None

    def look(self) -> None:
        """Every second: find out what a TERM was for, and whether a person has cancelled though no signal came."""
        if self._heard_term is not None:
            self._answer_term()
        elif time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            if self.asked != Cause.CANCELLED and self._run.cancel_mark.exists():
                self._answer_term()

    def wait_for_term(self, seconds: float) -> None:
        """Wait for a TERM that must come."""
        deadline = time.monotonic() + seconds
        while self._heard_term is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; `look` acts on it."""
        self.heard.append(f"{signal.Signals(number).name} at {time.strftime('%H:%M:%S', time.gmtime())}Z")
        if number == signal.SIGTERM:
            self._heard_term = time.monotonic()
        elif self.asked is None:
            self._ask(Cause.TIME_LIMIT, self._warning_seconds)

    def _ask(self, why: Cause, seconds: float) -> None:
        self.asked = why
        self.deadline = min(self.deadline or math.inf, time.monotonic() + seconds)

    def _answer_term(self) -> None:
        """Say what a TERM was for; Slurm's is followed by a KILL, before which the outcome is to be written."""
        heard, self._heard_term = self._heard_term or time.monotonic(), None
        if self._run.cancel_mark.exists():
            self._ask(Cause.CANCELLED, self._warning_seconds)
        elif self._job is None:
            self._ask(Cause.STOPPED, self._warning_seconds)
        else:
            facts = job_facts(self._job.job_id)
            why = why_terminated(self._job, facts)
            said = (
                "Slurm did not say what for"
                if facts is None
                else f"the job was {facts.state}, Slurm counted {facts.restarts} restarts, at this start it was "
                f"{self._job.restarts}"
            )
            self.heard.append(f"taken for {why}: {said}")
            self._ask(why, heard + KILL_WAIT_SHARE * self._kill_wait_seconds - time.monotonic())
