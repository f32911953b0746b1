"""Where an attempt's hours went: its wall time by kind, tokens lost, GPU hours. Pure.

The time is cut where the supervisor and rank 0 told something, and each stretch belongs to what it ended
with: before a step's event lies the step, before a save's the standstill for it. What neither told is idle.
So the kinds always add up to the whole. A clock that is behind or ahead makes stretches shorter or
longer, never negative. Everything is reckoned in whole milliseconds, so that the sum is exact to one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from orchestrator.events import (
    DamageEvent,
    EndEvent,
    Event,
    FirstLossEvent,
    SaveEvent,
    StageEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
)


class Kind(StrEnum):
    """What an hour went to, in the order of an attempt."""

    QUEUED = "queued"
    """Waiting for the scheduler. Nothing is held, and nothing paid."""
    CHECKING = "checking"
    """The nodes, before ranks start on them."""
    STARTING = "starting"
    """Until the ranks stand and the state is loaded."""
    TRAINING = "training"
    """Steps that count."""
    VALIDATION = "validation"
    """Apart from training: it moves no weight, and like the saves it takes what an interval allows it."""
    CHECKPOINT = "checkpoint"
    """Training stood still for a save; what is written beside training takes none."""
    LOST = "lost"
    """What the ranks did after the newest complete checkpoint. It is done again."""
    IDLE = "idle"
    """Held for nothing: between two attempts of one job, and from the ranks' last word to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """The hours of an attempt, or of several."""

    seconds: dict[str, float]
    """By `Kind`, all of them; they add up to the wall time."""
    tokens_lost: int
    gpu_hours: float
    """Of the GPUs with a rank, from the supervisor's start to the end."""
    spare_gpu_hours: float
    """Of further GPUs that were held: spare nodes, and those that failed the checks."""

    @property
    def total_seconds(self) -> float:
        """Wall time, queue included."""
        return round(sum(self.seconds.values()), 3)

    @property
    def effective_share(self) -> float | None:
        """Share of the wall time in which steps were done that count; None without any time."""
        return self.seconds[Kind.TRAINING] / self.total_seconds if self.total_seconds else None

    def cost(self, price_per_gpu_hour: float) -> float:
        """Return the price of all that was held."""
        return (self.gpu_hours + self.spare_gpu_hours) * price_per_gpu_hour


def ledger_of(
    *,
    since: float,
    is_queued: bool,
    started: float,
    checking: tuple[float, float] | None,
    events: Sequence[Event],
    saved_step: int,
    consumed_tokens: Callable[[int], int],
    gpus: int,
    spare_gpus: int,
    ended: float,
) -> Ledger:
    """Return the ledger of one attempt; all times are Unix seconds.

    Args:
        since: when it was submitted, or the attempt before ended, whichever was later.
        is_queued: whether it waited for the scheduler then; false in the allocation of the attempt before.
        started: when the supervisor began with it.
        checking: when node checks began and ended, if there were any.
        events: as rank 0 told them.
        saved_step: step of the newest complete checkpoint at the end.
        consumed_tokens: of the first so many steps.
        gpus: how many have a rank.
        spare_gpus: how many are held besides.
    """
    begin, end = min(since, started), max(started, ended)
    marks = [(started, Kind.QUEUED if is_queued else Kind.IDLE)]
    if checking is not None:
        marks += [(checking[0], Kind.STARTING), (checking[1], Kind.CHECKING)]
    marks += [(event.time, kind) for event in events if (kind := _kind(event, saved_step)) is not None]
    has_begun = any(isinstance(event, StartEvent) for event in events)
    marks.append((end, Kind.IDLE if has_begun else Kind.STARTING))

    whole = round((end - begin) * 1000)
    milliseconds, at = dict.fromkeys(Kind, 0), 0
    for time, kind in marks:
        until = min(max(round((time - begin) * 1000), at), whole)
        milliseconds[kind] += until - at
        at = until
    held_hours = (whole - milliseconds[Kind.QUEUED]) / 3_600_000
    lost = {event.step for event in events if isinstance(event, StepEvent) and event.step > saved_step}
    return Ledger(
        seconds={str(kind): count / 1000 for kind, count in milliseconds.items()},
        tokens_lost=sum(consumed_tokens(step) - consumed_tokens(step - 1) for step in lost),
        gpu_hours=held_hours * gpus,
        spare_gpu_hours=held_hours * spare_gpus,
    )


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Return the sum of attempts that follow each other."""
    ledgers = list(ledgers)
    return Ledger(
        seconds={str(kind): round(sum(each.seconds[kind] for each in ledgers), 3) for kind in Kind},
        tokens_lost=sum(each.tokens_lost for each in ledgers),
        gpu_hours=sum(each.gpu_hours for each in ledgers),
        spare_gpu_hours=sum(each.spare_gpu_hours for each in ledgers),
    )


def _kind(event: Event, saved_step: int) -> Kind | None:
    """Return what the time before an event went to; None where it goes to what the next one says."""
    if isinstance(event, StageEvent | StartEvent | DamageEvent | FirstLossEvent):  # which come while ranks load
        return Kind.STARTING
    for told, kind in (
        (StepEvent, Kind.TRAINING),
        (ValidationEvent, Kind.VALIDATION),
        (SaveEvent | EndEvent, Kind.CHECKPOINT),  # before they leave, ranks wait for the last save
    ):
        if isinstance(event, told):
            return Kind.LOST if event.step > saved_step else kind
    return None
