"""Where a run stands: a pure function of its folder's records, of what the scheduler says, and of the time.

The folder is the truth. An answer of the scheduler that is none means "unknown, keep what was last
known", never "gone".
"""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from orchestrator.exit_codes import Cause
from orchestrator.recovery import Action
from orchestrator.units import format_duration


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
    last_heard: float | None
    """When the ranks told something last."""

    @property
    def last_outcome(self) -> dict[str, Any] | None:
        """Outcome of the newest attempt."""
        return self.attempts[-1]["outcome"] if self.attempts else None

    @property
    def is_resumed(self) -> bool:
        """Whether a job was submitted since the newest attempt ended."""
        outcome = self.last_outcome
        return outcome is not None and len(self.submitted) > int(outcome["submissions"])

    @property
    def is_settled(self) -> bool:
        """Whether the folder alone says that the run has ended, so that nobody need be asked."""
        outcome = self.last_outcome
        return outcome is not None and not self.is_resumed and outcome["action"] in (Action.FINISH, Action.STOP)


QUIET_SECONDS = 600.0
"""How long running ranks may say nothing before that is worth saying; a step takes seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """A state with its cause, its reason in words, and what a person may do next."""

    state: State
    cause: Cause | None
    """Of the newest attempt's end; None while none has ended, or nothing is known of it."""
    reason: str
    actions: tuple[str, ...]
    """Commands, the most useful first."""


def reconcile(name: str, records: RunRecords, job: JobAnswer, now: float, waits_for: str = "") -> Standing:
    """Return where a run stands.

    Args:
        now: Unix time; the records' times are of the same clock or nearly so.
        waits_for: why the scheduler has not started the job yet, in its words.
    """
    outcome = records.last_outcome
    if outcome is not None and records.is_settled:
        return _settled(name, outcome)
    if job == JobAnswer.GONE:
        return _gone(name, records)
    cause = Cause(outcome["cause"]) if outcome is not None else None
    status, logs = f"orchestrate status {name}", f"orchestrate logs {name} --follow"
    cancel = f"orchestrate cancel {name}"
    if job == JobAnswer.SILENT:
        seen = "running when last seen; " if records.attempts and outcome is None else ""
        heard = _heard(records, now)
        return Standing(
            state=State.UNKNOWN,
            cause=cause,
            reason=f"{seen}the scheduler does not answer" + (f"; {heard}" if heard else ""),
            actions=(status, logs),
        )
    if job == JobAnswer.PENDING:
        reason = "waiting for the scheduler"
        if records.attempts and not records.is_resumed:
            cause = cause or Cause.SUPERVISOR_LOST
            reason = f"{cause}; the job was requeued and waits for the scheduler"
        elif records.submitted and now - records.submitted[-1] >= QUIET_SECONDS:
            reason += f" for {format_duration(now - records.submitted[-1])}"
        reason += f"; {waits_for}" if waits_for else ""
        return Standing(state=State.PENDING, cause=cause, reason=reason, actions=(status, cancel))
    if not records.attempts or records.is_resumed:
        return Standing(state=State.PENDING, cause=cause, reason="the job is starting", actions=(status, cancel))
    reason = "" if outcome is None else f"{outcome['cause']}: {outcome['why']}"
    if records.cancel_asked is not None:
        reason = "told to save and end"
    elif outcome is None and records.last_heard is not None and now - records.last_heard > QUIET_SECONDS:
        reason = f"{_heard(records, now)}; its ranks may hang"
    return Standing(
        state=State.RUNNING, cause=cause, reason=reason, actions=(logs, cancel) if outcome is None else (status, logs)
    )


def _heard(records: RunRecords, now: float) -> str:
    """Return how long ago the ranks told something."""
    return "" if records.last_heard is None else f"last heard {format_duration(now - records.last_heard)} ago"


def _settled(name: str, outcome: dict[str, Any]) -> Standing:
    """The last attempt decided that nothing follows."""
    resume, logs, cause = f"orchestrate resume {name}", f"orchestrate logs {name}", Cause(outcome["cause"])
    if outcome["action"] == Action.FINISH:
        return Standing(
            state=State.FINISHED,
            cause=cause,
            reason=outcome["why"],
            actions=(f"orchestrate export {name} --output DIR", f"{resume} tokens=..."),
        )
    if cause == Cause.CANCELLED:
        return Standing(state=State.CANCELLED, cause=cause, reason=outcome["why"], actions=(resume,))
    is_stopped = cause in (Cause.STOPPED, Cause.TIME_LIMIT, Cause.PREEMPTED)
    return Standing(
        state=State.STOPPED if is_stopped else State.FAILED,
        cause=cause,
        reason=f"{outcome['message']}; {outcome['why']}",
        actions=(resume, logs) if is_stopped else (logs, resume),
    )


def _gone(name: str, records: RunRecords) -> Standing:
    """There is no job any more, and no attempt decided so."""
    outcome = records.last_outcome
    cause = Cause(outcome["cause"]) if outcome is not None else None
    resume = f"orchestrate resume {name}"
    if records.cancel_asked is not None:
        return Standing(
            state=State.CANCELLED, cause=Cause.CANCELLED, reason="a person cancelled the run", actions=(resume,)
        )
    if not records.submitted:
        return Standing(state=State.FAILED, cause=cause, reason="it was never submitted", actions=(resume,))
    if not records.attempts or records.is_resumed:
        return Standing(
            state=State.FAILED,
            cause=Cause.SUPERVISOR_LOST,
            reason="the job ended before its first attempt",
            actions=(f"orchestrate logs {name} --supervisor", resume),
        )
    if outcome is None:
        return Standing(
            state=State.FAILED,
            cause=Cause.SUPERVISOR_LOST,
            reason=f"{Cause.SUPERVISOR_LOST}: the job ended without a word",
            actions=(resume, f"orchestrate logs {name}"),
        )
    is_stopped = outcome["action"] == Action.REQUEUE
    return Standing(
        state=State.STOPPED if is_stopped else State.FAILED,
        cause=cause,
        reason=f"{outcome['cause']}, and it did not start again",
        actions=(resume,),
    )
