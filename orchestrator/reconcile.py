"""Where a run stands: a pure function of its folder's records and of what the scheduler says.

The folder is the truth. An answer of the scheduler that is none means "unknown, keep what was last
known", never "gone".
"""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from orchestrator.exit_codes import Cause
from orchestrator.recovery import Action


class State(StrEnum):
    """State of a run, as `orchestrate status` prints it."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    STOPPED = "STOPPED"
    UNKNOWN = "UNKNOWN"


class JobAnswer(StrEnum):
    """What the scheduler says of a run's newest job."""

    PENDING = "pending"
    RUNNING = "running"
    GONE = "gone"
    SILENT = "silent"
    """It did not answer."""


ENDED = (State.FINISHED, State.FAILED, State.CANCELLED, State.STOPPED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What the folder holds."""

    submitted: Sequence[float]
    """Times of the submissions."""
    attempts: Sequence[dict[str, Any]]
    """For each attempt its `number`, and its `outcome` or None."""
    cancel_asked: float | None
    """When a person cancelled; a later resume forgets it."""

    @property
    def last_outcome(self) -> dict[str, Any] | None:
        """Outcome of the newest attempt."""
        return self.attempts[-1]["outcome"] if self.attempts else None

    @property
    def is_resumed(self) -> bool:
        """Whether a job was submitted since the newest attempt ended."""
        outcome = self.last_outcome
        return outcome is not None and bool(self.submitted) and self.submitted[-1] > float(outcome["ended"])

    @property
    def is_settled(self) -> bool:
        """Whether the folder alone says that the run has ended, so that nobody need be asked."""
        outcome = self.last_outcome
        return outcome is not None and not self.is_resumed and outcome["action"] in (Action.FINISH, Action.STOP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """A state with its reason and what a person may do next."""

    state: State
    reason: str
    next_command: str


def reconcile(name: str, records: RunRecords, job: JobAnswer) -> Standing:
    """Return where a run stands."""
    outcome = records.last_outcome
    if outcome is not None and records.is_settled:
        return _settled(name, outcome)
    if job == JobAnswer.GONE:
        return _gone(name, records)
    look_again = f"orchestrate status {name}"
    if job == JobAnswer.SILENT:
        seen = "running when last seen; " if records.attempts and outcome is None else ""
        reason = f"{seen}the scheduler does not answer"
        return Standing(state=State.UNKNOWN, reason=reason, next_command=look_again)
    if job == JobAnswer.PENDING:
        reason = "waiting for the scheduler"
        if records.attempts and not records.is_resumed:
            cause = outcome["cause"] if outcome is not None else Cause.SUPERVISOR_LOST
            reason = f"{cause}; the job was requeued and waits for the scheduler"
        return Standing(state=State.PENDING, reason=reason, next_command=look_again)
    if not records.attempts or records.is_resumed:
        return Standing(state=State.PENDING, reason="the job is starting", next_command=look_again)
    reason = "" if outcome is None else f"{outcome['cause']}: {outcome['why']}"
    if records.cancel_asked is not None:
        reason = "told to save and end"
    follow = f"orchestrate logs {name} --follow" if outcome is None else look_again
    return Standing(state=State.RUNNING, reason=reason, next_command=follow)


def _settled(name: str, outcome: dict[str, Any]) -> Standing:
    """The last attempt decided that nothing follows."""
    resume = f"orchestrate resume {name}"
    if outcome["action"] == Action.FINISH:
        return Standing(
            state=State.FINISHED, reason=outcome["why"], next_command=f"orchestrate export {name} --output DIR"
        )
    if outcome["cause"] == Cause.CANCELLED:
        return Standing(state=State.CANCELLED, reason=outcome["why"], next_command=resume)
    is_stopped = outcome["cause"] in (Cause.STOPPED, Cause.TIME_LIMIT, Cause.PREEMPTED)
    return Standing(
        state=State.STOPPED if is_stopped else State.FAILED,
        reason=f"{outcome['message']}; {outcome['why']}",
        next_command=resume if is_stopped else f"orchestrate logs {name}",
    )


def _gone(name: str, records: RunRecords) -> Standing:
    """There is no job any more, and no attempt decided so."""
    outcome = records.last_outcome
    resume = f"orchestrate resume {name}"
    if records.cancel_asked is not None:
        return Standing(state=State.CANCELLED, reason="a person cancelled the run", next_command=resume)
    if not records.submitted:
        return Standing(state=State.FAILED, reason="it was never submitted", next_command=resume)
    if not records.attempts or records.is_resumed:
        return Standing(
            state=State.FAILED,
            reason="the job ended before its first attempt",
            next_command=f"orchestrate logs {name} --supervisor",
        )
    if outcome is None:
        return Standing(
            state=State.FAILED,
            reason=f"{Cause.SUPERVISOR_LOST}: the job ended without a word",
            next_command=resume,
        )
    is_stopped = outcome["action"] == Action.REQUEUE
    return Standing(
        state=State.STOPPED if is_stopped else State.FAILED,
        reason=f"{outcome['cause']}, and it did not start again",
        next_command=resume,
    )
