"""Steps that are done again after a restart, beside what was recorded of them.

The same weights and the same samples give the same loss: bit for bit on the CPU at the same layout and
with deterministic kernels, otherwise within the noise of sums in another order. More than that is
hardware that computes wrongly, or nondeterminism where none was expected. Where one of them left out a step whose
gradients the other applied, the weights are others from there on, and nothing more is compared.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from orchestrator.events import RepeatEvent
from orchestrator.plan import TrainingPlan

NOISE = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative difference of a step's loss that another order of sums explains, for the steps between two saves.

Ten times and more what a change of the layout made of it on the CPU (docs/log.md); never measured on a GPU.
"""


def noise(before: TrainingPlan, now: TrainingPlan) -> float | None:
    """Return the relative difference that is none, or None where the two attempts train differently."""
    if _trained(before) != _trained(now):
        return None
    is_same_place = before.layout == now.layout and before.settings.cluster.device == now.settings.cluster.device
    is_exact = now.settings.cluster.device == "cpu" or now.settings.training.deterministic
    is_exact &= now.settings.precision.fp8 != "delayed"  # whose histories each attempt fills anew
    return 0.0 if is_same_place and is_exact else NOISE[now.settings.precision.dtype]


def _trained(plan: TrainingPlan) -> tuple[object, ...]:
    """Return what decides the losses; where the samples and their index lie does not."""
    settings = plan.settings
    data = dataclasses.replace(settings.data, index="", stage_to="", wait_alarm_share=1.0)
    numerics = dataclasses.replace(settings.numerics, max_hardware_events=0, replica_check_steps=0, rank_time_steps=0)
    precision = dataclasses.replace(
        settings.precision, gap_check_steps=0, gap_alarm=0.0, ffn_input_steps=0, ffn_input_alarm=0.0
    )
    return settings.training, precision, data, settings.model, numerics


class RecordedStep(NamedTuple):
    """A step that was done before."""

    loss: float
    noise: float
    """Relative difference that is none."""
    is_skipped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierAttempt:
    """What an attempt recorded."""

    plan: TrainingPlan | None
    """None where it cannot be read."""
    losses: Mapping[int, float]
    """By step."""
    skipped: frozenset[int] = frozenset()
    """Steps whose gradients were dropped."""


def recorded_losses(earlier: Sequence[EarlierAttempt], plan: TrainingPlan, after_step: int) -> dict[int, RecordedStep]:
    """Return what was recorded of the steps after one, as the newest of earlier attempts did them."""
    found: dict[int, RecordedStep] = {}
    for attempt in earlier:
        allowed = noise(attempt.plan, plan) if attempt.plan is not None else None
        for step, loss in attempt.losses.items():
            if step > after_step and allowed is not None:
                found[step] = RecordedStep(loss, allowed, step in attempt.skipped)
            elif step > after_step:
                found.pop(step, None)
    return found


class RepeatedSteps:
    """Compares the steps that an earlier attempt had done already with what it recorded.

    Args:
        recorded: by step, as `recorded_losses` returns them.
        step: after which this attempt began.
        tell: told of the comparison.
    """

    def __init__(self, recorded: dict[int, RecordedStep], step: int, tell: Callable[[RepeatEvent], None]) -> None:
        self._tell = tell
        self._recorded = recorded
        self._first = step + 1
        self._worst: RepeatEvent | None = None

    def compare(self, step: int, loss: float, *, is_skipped: bool = False) -> None:
        """Compare one step; a difference beyond the noise is told at once."""
        if step not in self._recorded:
            self.finish()
            return
        recorded, noise, was_skipped = self._recorded.pop(step)
        if is_skipped != was_skipped:
            self._recorded.clear()
        if math.isfinite(loss) and math.isfinite(recorded):
            difference = abs(loss - recorded) / abs(recorded) if loss != recorded else 0.0
        else:  # such a step is skipped, and is no repetition where the other was none
            difference = 0.0
        is_beyond = difference > noise
        if self._worst is None or difference >= self._worst.relative_difference:
            self._worst = RepeatEvent(
                time=time.time(),
                step=step,
                first_step=self._first,
                last_step=step,
                recorded_loss=recorded,
                loss=loss,
                relative_difference=difference,
                noise=noise,
                is_beyond_noise=is_beyond,
            )
        self._worst = dataclasses.replace(self._worst, last_step=step)
        if is_beyond or not self._recorded:
            self.finish()

    def finish(self) -> None:
        """Tell of the steps compared so far, if there are any, and begin anew."""
        if self._worst is not None:
            self._tell(self._worst)
            self._first = self._worst.last_step + 1
            self._worst = None
