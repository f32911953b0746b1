"""Whether a step's loss or gradient norm is out of the ordinary, and what the steps that were skipped come to. Pure.

A value is a spike where its robust z-score over the newest steps whose gradients were applied is beyond
`numerics.spike_score`: its distance above their median, in units of 1.4826 times the median absolute deviation, which
is the standard deviation where they are normal. Upward only: a fall harms nothing. The norm in logarithms, since its
own spread grows with it. OLMo 2 (arXiv 2501.00656, its SkipStepOptimizer) takes mean and standard deviation of the
last 128 steps and 6 of these; those are moved by the very spikes that they should find, median and deviation are not.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from enum import StrEnum

from orchestrator.phases import planned_phases
from orchestrator.plan import TrainingPlan
from orchestrator.settings import NumericsSettings

NORMAL_DEVIATION = 1.4826
"""Standard deviations in a median absolute deviation of normal values."""
LEAST_RELATIVE_DEVIATION = 1e-3
"""Of a loss's median; less spread than that is taken as that, so that a loss that hardly moves has no spikes."""
LEAST_LOG_DEVIATION = 1e-2
"""Of a norm's logarithm."""


class Doubt(StrEnum):
    """What is out of the ordinary."""

    LOSS_NOT_FINITE = "loss_not_finite"
    NORM_NOT_FINITE = "norm_not_finite"
    LOSS_SPIKE = "loss_spike"
    NORM_SPIKE = "norm_spike"

    @property
    def is_spike(self) -> bool:
        """Whether the number is one, and only too large."""
        return self in (Doubt.LOSS_SPIKE, Doubt.NORM_SPIKE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Why a step's result is not taken as it is."""

    doubt: Doubt
    score: float | None
    """Robust z-score of a spike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recent:
    """Losses and gradient norms of the newest steps whose gradients were applied, the oldest first."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def after(self, loss: float, norm: float, window: int) -> "Recent":
        """Return them with one more step, the oldest left out beyond the window."""
        return Recent(losses=(*self.losses, loss)[-window:], norms=(*self.norms, norm)[-window:])


def suspicion(recent: Recent, loss: float, norm: float, settings: NumericsSettings) -> Suspicion | None:
    """Return what is out of the ordinary about a step, or None.

    There are no spikes before half a window of steps.
    """
    if not math.isfinite(loss):
        return Suspicion(doubt=Doubt.LOSS_NOT_FINITE, score=None)
    if not math.isfinite(norm):
        return Suspicion(doubt=Doubt.NORM_NOT_FINITE, score=None)
    if settings.spike_score == 0 or len(recent.losses) < max(2, settings.window // 2):
        return None
    least = LEAST_RELATIVE_DEVIATION * abs(statistics.median(recent.losses))
    score = robust_score(recent.losses, loss, least)
    if score > settings.spike_score:
        return Suspicion(doubt=Doubt.LOSS_SPIKE, score=score)
    score = robust_score([_logarithm(each) for each in recent.norms], _logarithm(norm), LEAST_LOG_DEVIATION)
    if score > settings.spike_score:
        return Suspicion(doubt=Doubt.NORM_SPIKE, score=score)
    return None


def robust_score(values: Sequence[float], value: float, least_deviation: float) -> float:
    """Return how many standard deviations a value lies above the median of others, by their median deviation."""
    middle = statistics.median(values)
    deviation = NORMAL_DEVIATION * statistics.median(abs(each - middle) for each in values)
    return (value - middle) / max(deviation, least_deviation, math.ulp(1.0))


def _logarithm(norm: float) -> float:
    return math.log(max(norm, math.ulp(0.0)))


def new_levels(plan: TrainingPlan) -> frozenset[int]:
    """Return the steps from which on numbers are not compared with those before: a phase begins, or a part thaws."""
    phases = {phase.first_step for phase in planned_phases(plan)[1:]}
    return frozenset(phases | {part.steps + 1 for part in plan.settings.training.frozen})


def skipped_steps(spans: Iterable[Sequence[int]], after: int = 0) -> int:
    """Return how many steps lie in spans of (first, last), which may overlap, and come after a step."""
    count, last = 0, after
    for first, end in sorted((int(first), int(end)) for first, end in spans):
        count += max(0, end - max(first - 1, last))
        last = max(last, end)
    return count


def interventions(spans: Iterable[Sequence[int]], step: int, window: int) -> int:
    """Return how many skips and rollbacks were decided on in the window of steps before a step."""
    return sum(step - window <= last < step for _, last in spans)
