"""What ranks told of numbers in doubt and of how long they compute, as sentences and counts. Pure."""

from collections.abc import Iterable, Sequence

from orchestrator.events import (
    Event,
    FfnInputsEvent,
    Fp8GapEvent,
    Fp8ProofEvent,
    GuardEvent,
    RankTimesEvent,
    ReplicaEvent,
    StartEvent,
)
from orchestrator.spikes import skipped_steps

SLOW = 1.2
"""Times the median of the ranks that one may compute."""
SLOW_SAMPLES = 3
"""In a row, of the same rank, before it is called slow: one is as often a page fault as a node."""
_DOUBTS = {
    "loss_not_finite": "loss {event.loss}",
    "norm_not_finite": "gradient norm {event.gradient_norm}",
    "loss_spike": "loss {event.loss:.4g} is a spike, {event.score:.0f} robust deviations above the steps before",
    "norm_spike": "gradient norm {event.gradient_norm:.4g} is a spike, {event.score:.0f} robust deviations above the "
    "steps before",
}
_ACTIONS = {
    "repeat": "the second result was taken",
    "record": "its gradients were applied",
    "skip": "its gradients were dropped",
    "rollback": "the steps since {event.checkpoint} were taken back",
    "stop": "the run stopped",
}


def in_words(event: GuardEvent | ReplicaEvent) -> str:
    """Return what was found, and what was done about it, as a sentence."""
    if isinstance(event, ReplicaEvent):
        who = "rank" if len(event.ranks) == 1 else "ranks"
        more = f" and {len(event.parameters) - 1} more" if len(event.parameters) > 1 else ""
        sure = "" if event.is_majority else "; no majority says which is right"
        ranks = ", ".join(map(str, event.ranks))
        return (
            f"after step {event.step} {who} {ranks} on {', '.join(event.hosts)} did not hold the weights of the other "
            f"replicas: {event.parameters[0]}{more}{sure}"
        )
    what = _DOUBTS[event.doubt].format(event=event)
    done = _ACTIONS[event.action].format(event=event)
    if event.origin == "data":
        last = event.first_sample + event.samples - 1
        return f"step {event.step}: {what}, and again (samples {event.first_sample} to {last}): {done}"
    ranks = ", ".join(map(str, event.ranks))
    who = f"rank {ranks} on {', '.join(event.hosts)} gave another {event.differs}" if ranks else "no rank is named"
    return f"step {event.step}: {what}, computed again {event.again_loss:.4g}: hardware, {who}; {done}"


def surviving(told: Sequence[Sequence[Event]]) -> list[GuardEvent]:
    """Return the steps in doubt of the surviving trajectory.

    Args:
        told: the events of each attempt, the oldest first.
    """
    found: list[GuardEvent] = []
    for events in told:
        for event in events:
            if isinstance(event, StartEvent):
                found = [before for before in found if before.step <= event.step]
            elif isinstance(event, GuardEvent):
                found.append(event)
    return found


def skipped(told: Sequence[Sequence[Event]]) -> int:
    """Return how many steps' gradients the newest weights do not have."""
    return skipped_steps(event.skipped for event in surviving(told) if event.skipped is not None)


def slowest_rank(events: Sequence[Event]) -> tuple[str, str]:
    """Return who was the slowest rank in the newest sample, and a warning where the same one is slow all the time."""
    samples = [event for event in events if isinstance(event, RankTimesEvent)]
    if not samples:
        return "", ""
    newest = samples[-1]
    line = (
        f"rank {newest.slowest_rank} on {newest.slowest_host} computed {newest.slowest_seconds:.3g} s in step "
        f"{newest.step:,}, the median {newest.median_seconds:.3g} s"
    )
    alike = [
        event.slowest_rank == newest.slowest_rank and event.slowest_seconds > SLOW * event.median_seconds
        for event in reversed(samples)
    ]
    count = alike.index(False) if False in alike else len(alike)
    if count < SLOW_SAMPLES:
        return line, ""
    return line, (
        f"rank {newest.slowest_rank} on {newest.slowest_host} was the slowest in the last {count} samples, each time "
        f"beyond {SLOW} times the median: all others wait for it; look at its node"
    )


def fp8_in_words(events: Sequence[Event]) -> str:
    """Return what an attempt has seen of FP8: that it ran, and the newest gap to bf16; nothing where it saw none."""
    proof = next((event for event in reversed(events) if isinstance(event, Fp8ProofEvent)), None)
    gap = next((event for event in reversed(events) if isinstance(event, Fp8GapEvent)), None)
    return "; ".join(event.message for event in (proof, gap) if event is not None)


def alarms(events: Iterable[Event]) -> list[str]:
    """Return the newest alarm of each kind about large inputs and the gap of FP8, and how many there were."""
    samples: dict[type[FfnInputsEvent | Fp8GapEvent], list[FfnInputsEvent | Fp8GapEvent]] = {}
    for event in events:
        if isinstance(event, FfnInputsEvent | Fp8GapEvent):
            samples.setdefault(type(event), []).append(event)
    found = []
    for of_kind in samples.values():
        raised = [event for event in of_kind if event.is_alarm]
        if raised:
            first = f", first in step {raised[0].step:,}" if len(raised) > 1 else ""
            found.append(f"{raised[-1].message}; passed in {len(raised)} of {len(of_kind)} samples{first}")
    return found
