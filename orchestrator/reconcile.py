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
    """For each attempt its `number`, `started`, and `outcome` or None."""
    cancel_asked: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """A state with its reason and what a person may do next."""

    state: State
    reason: str
    next_command: str


def reconcile(name: str, records: RunRecords, job: JobAnswer) -> Standing:
    """Return where a run stands."""
    attempts = records.attempts
    outcome = attempts[-1]["outcome"] if attempts else None
    submitted_since = bool(records.submitted) and (
        not attempts or outcome is None or records.submitted[-1] > float(outcome["ended"])
    )
    if outcome is None and attempts:
        return _running(name, job)
    if outcome is not None and not (submitted_since and job in (JobAnswer.PENDING, JobAnswer.RUNNING)):
        return _ended(name, outcome, job)
    if job in (JobAnswer.PENDING, JobAnswer.RUNNING):
        reason = "waiting for the scheduler" if job == JobAnswer.PENDING else "the job is starting"
        return Standing(state=State.PENDING, reason=reason, next_command=f"orchestrate status {name}")
    if job == JobAnswer.SILENT:
        return Standing(
            state=State.UNKNOWN, reason="the scheduler does not answer", next_command=f"orchestrate status {name}"
        )
    if not records.submitted:
        return Standing(
            state=State.FAILED, reason="it was never submitted", next_command=f"orchestrate resume {name}"
        )
    return Standing(
        state=State.CANCELLED if records.cancel_asked else State.FAILED,
        reason="the job ended before its first attempt",
        next_command=f"orchestrate logs {name} --supervisor",
    )


def _running(name: str, job: JobAnswer) -> Standing:
    """An attempt has no outcome: it runs, or its supervisor was lost."""
    if job == JobAnswer.GONE:
        return Standing(
            state=State.FAILED,
            reason=f"{Cause.SUPERVISOR_LOST}: the job ended without a word",
            next_command=f"orchestrate resume {name}",
        )
    if job == JobAnswer.SILENT:
        return Standing(
            state=State.UNKNOWN,
            reason="running when last seen; the scheduler does not answer",
            next_command=f"orchestrate status {name}",
        )
    return Standing(state=State.RUNNING, reason="", next_command=f"orchestrate logs {name} --follow")


def _ended(name: str, outcome: dict[str, Any], job: JobAnswer) -> Standing:
    """The last attempt has an outcome and nothing was submitted since that lives."""
    action, cause = Action(outcome["action"]), Cause(outcome["cause"])
    if action == Action.FINISH:
        return Standing(state=State.FINISHED, reason=outcome["why"], next_command=f"orchestrate export {name} --output DIR")
    resume = f"orchestrate resume {name}"
    if action == Action.STOP:
        if cause == Cause.CANCELLED:
            return Standing(state=State.CANCELLED, reason=outcome["why"], next_command=resume)
        stopped = cause in (Cause.STOPPED, Cause.TIME_LIMIT, Cause.PREEMPTED)
        return Standing(
            state=State.STOPPED if stopped else State.FAILED,
            reason=f"{outcome['message']}; {outcome['why']}",
            next_command=resume if stopped else f"orchestrate logs {name}",
        )
    if job in (JobAnswer.PENDING, JobAnswer.RUNNING):
        return Standing(state=State.RUNNING, reason=f"{cause}: {outcome['why']}", next_command=f"orchestrate status {name}")
    if job == JobAnswer.SILENT:
        return Standing(
            state=State.UNKNOWN, reason="the scheduler does not answer", next_command=f"orchestrate status {name}"
        )
    return Standing(state=State.STOPPED, reason=f"{cause}, and it did not start again", next_command=resume)
