"""What to do when an attempt has ended: one pure function of its history.

A time limit and a preemption are nobody's fault and go on as long as there is progress. A killed or hung
rank restarts in the same allocation. What would fail again in the same way stops the run and says why.
"""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum

from orchestrator.exit_codes import Cause


class Action(StrEnum):
    """What the supervisor does next."""

    FINISH = "finish"
    RESTART = "restart"
    """Start the ranks again in this allocation, from the newest checkpoint."""
    REQUEUE = "requeue"
    """End this job and have it started again."""
    STOP = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How one attempt ended."""

    cause: Cause
    saved_step: int
    """Step of the newest complete checkpoint."""
    enough_nodes: bool = True
    """Whether the allocation has still as many healthy nodes as the run needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """An action with its reason, in words for `orchestrate status`."""

    action: Action
    why: str


_STOPS = {
    Cause.CANCELLED: "a person cancelled the run",
    Cause.STOPPED: "the run was asked to save and stop",
    Cause.EXCEPTION: "an exception would come again; mend its cause, then `orchestrate resume`",
    Cause.NOT_FINITE: "the loss is not finite; lower the rate or look at the data, then `orchestrate resume`",
    Cause.SPIKE: "the loss or the gradients rose at once; look at the data, or say in `numerics` what is to be done "
    "with such a batch, then `orchestrate resume`",
    Cause.PRECISION: "FP8 was asked for and did not run; mend what is named, or `orchestrate resume` with "
    "precision=bf16",
    Cause.BAD_DATA: "the data cannot be used; mend it, then `orchestrate resume`",
    Cause.BAD_CONFIG: "the configuration cannot be run; launch it anew with the value mended",
    Cause.BAD_CHECKPOINT: "no checkpoint could be loaded, and nothing else is trained in its place",
    Cause.SUPERSEDED: "another supervisor goes on with the run",
    Cause.DISK_FULL: "there is no room for a checkpoint; the ones before are whole; free space, then "
    "`orchestrate resume`",
}
_APART = (Cause.PREEMPTED, Cause.NODE_CHECK, Cause.STORAGE)
"""Nothing that the run did; counted apart from failures, and endured for longer."""
_REQUEUED = {
    Cause.TIME_LIMIT: "the job's time is over; it goes on in a new one",
    Cause.PREEMPTED: "the nodes were wanted by a job of more weight; it goes on in a new one",
    Cause.SUPERVISOR_FAILED: "the supervisor itself failed; it is started again, once",
}


def decide(
    history: Sequence[Ending],
    ending: Ending,
    max_without_progress: int,
    max_preemptions_without_progress: int,
    *,
    started_from: int,
) -> Decision:
    """Return what follows an ending.

    Args:
        history: earlier endings since a person last started the run, the oldest first.
        max_without_progress: failures that saved nothing new, with no progress between them, after which the run stops.
        max_preemptions_without_progress: the same for what is nobody's fault.
        started_from: step of the checkpoint from which the first of these attempts began.
    """
    if ending.cause == Cause.FINISHED:
        return Decision(action=Action.FINISH, why="all steps are done")
    if ending.cause in _STOPS:
        return Decision(action=Action.STOP, why=_STOPS[ending.cause])
    stuck: list[Ending] = []
    before = started_from
    for attempt in [*history, ending]:
        stuck = [] if attempt.saved_step > before else [*stuck, attempt]
        before = attempt.saved_step
    if stuck and ending.cause == Cause.OUT_OF_MEMORY:
        why = "it would not fit again; a smaller micro-batch or a wider layout needs less, then `orchestrate resume`"
        return Decision(action=Action.STOP, why=why)
    most = max_preemptions_without_progress if ending.cause in _APART else max_without_progress
    alike = [attempt for attempt in stuck if (attempt.cause in _APART) == (ending.cause in _APART)]
    is_again = [attempt.cause for attempt in stuck].count(Cause.SUPERVISOR_FAILED) > 1
    if alike and (len(alike) >= most or (is_again and ending.cause == Cause.SUPERVISOR_FAILED)):
        causes = ", ".join(str(attempt.cause) for attempt in stuck)
        attempts = "1 attempt" if len(stuck) == 1 else f"{len(stuck)} attempts"
        return Decision(action=Action.STOP, why=f"no progress beyond step {ending.saved_step} in {attempts} ({causes})")
    if ending.cause in _REQUEUED:
        return Decision(action=Action.REQUEUE, why=_REQUEUED[ending.cause])
    if not ending.enough_nodes:
        return Decision(action=Action.REQUEUE, why="too few healthy nodes are left here; it goes on in a new job")
    return Decision(action=Action.RESTART, why=f"ranks start again from step {ending.saved_step}")
