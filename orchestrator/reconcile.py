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
    supervisor_heard: float | None = None
    """When the newest attempt's supervisor last showed that it lives."""

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
        return _gone(name, records, now)
    cause = Cause(outcome["cause"]) if outcome is not None else None
    status, logs = f"orchestrate status {name}", f"orchestrate logs {name} --follow"
    cancel = f"orchestrate cancel {name}"
    if job == JobAnswer.SILENT:
        reason = f"the scheduler does not answer; {_last_seen(records, now)}"
        return Standing(state=State.UNKNOWN, cause=cause, reason=reason, actions=(status, logs))
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
        reason = f"last heard {_ago(records.last_heard, now)}; its ranks may hang"
    return Standing(
        state=State.RUNNING, cause=cause, reason=reason, actions=(logs, cancel) if outcome is None else (status, logs)
    )


def _last_seen(records: RunRecords, now: float) -> str:
    """Return what was known of the job before its scheduler fell silent, and how long ago that was."""
    outcome = records.last_outcome
    told = "; a person has cancelled it" if records.cancel_asked is not None else ""
    if not records.attempts or records.is_resumed:
        submitted = f", submitted {_ago(records.submitted[-1], now)}" if records.submitted else ""
        return f"last seen pending{submitted}{told}"
    number = records.attempts[-1]["number"]
    if outcome is None:
        heard = _heard(records)
        return f"last seen running{'' if heard is None else f' {_ago(heard, now)}'}{told}"
    ended = f"attempt {number} ended {_ago(float(outcome['ended']), now)}: {outcome['cause']}"
    if outcome["action"] == Action.REQUEUE:
        return f"last seen pending, requeued after {ended}{told}"
    return f"last seen running, about to start again after {ended}{told}"


def _heard(records: RunRecords) -> float | None:
    """Return when ranks or supervisor showed last that they live."""
    return max((time for time in (records.last_heard, records.supervisor_heard) if time is not None), default=None)


def _ago(time: float, now: float) -> str:
    return f"{format_duration(max(0.0, now - time))} ago"


def _settled(name: str, outcome: dict[str, Any]) -> Standing:
    """The last attempt decided that nothing follows."""
    resume, why, cause = f"orchestrate resume {name}", f"orchestrate why {name}", Cause(outcome["cause"])
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
        actions=(resume, why) if is_stopped else (why, resume),
    )


def _gone(name: str, records: RunRecords, now: float) -> Standing:
    """There is no job any more, and no attempt decided so."""
    outcome = records.last_outcome
    cause = Cause(outcome["cause"]) if outcome is not None else None
    resume, why = f"orchestrate resume {name}", f"orchestrate why {name}"
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
        heard = _heard(records)
        reason = f"{Cause.SUPERVISOR_LOST}: the supervisor was killed, or its node died, before it could say why"
        reason += "" if heard is None else f"; last heard {_ago(heard, now)}"
        return Standing(
            state=State.FAILED,
            cause=Cause.SUPERVISOR_LOST,
            reason=f"{reason}; a resume goes on from the newest checkpoint",
            actions=(resume, why),
        )
    ended = f"{outcome['cause']} {_ago(float(outcome['ended']), now)}"
    if outcome["action"] == Action.REQUEUE:
        reason = f"{ended}; it was to go on in another job, and there is none"
        return Standing(state=State.STOPPED, cause=cause, reason=reason, actions=(resume, why))
    reason = f"{ended}; its ranks were to start again, and the supervisor was lost before"
    return Standing(state=State.FAILED, cause=cause, reason=reason, actions=(resume, why))
