"""Where the phases of a plan's data begin, and what a run may still change of them. Pure.

A phase begins with the first step before which the run has read at least `from_tokens`, so at a whole number of steps
and of samples. What was consumed is the past: of a plan it must be the same phases, beginning with the same samples.
"""

import dataclasses
from collections.abc import Sequence

from orchestrator.plan import TrainingPlan
from orchestrator.schedule import total_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    """A blend, and the samples before it."""

    number: int
    """From 0, which is `data.train`; phase n is `data.phases[n - 1]`."""
    first_step: int
    """Its first, counted from 1."""
    first_sample: int
    """How many training samples the run reads before it."""
    train: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def field(self) -> str:
        """Where the settings say it."""
        return f"data.phases[{self.number - 1}]" if self.number else "data.train with data.weights"


def planned_phases(plan: TrainingPlan) -> tuple[PlannedPhase, ...]:
    """Return the phases of a plan, also those that would begin after its last step."""
    data = plan.settings.data
    found = [PlannedPhase(number=0, first_step=1, first_sample=0, train=data.train, weights=data.weights)]
    for number, phase in enumerate(data.phases, 1):
        steps = steps_before(plan, phase.from_tokens)
        found.append(
            PlannedPhase(
                number=number,
                first_step=steps + 1,
                first_sample=plan.consumed_samples(steps),
                train=phase.train,
                weights=phase.weights,
            )
        )
    return tuple(found)


def steps_before(plan: TrainingPlan, tokens: int) -> int:
    """Return the fewest steps that read so many tokens, at least one."""
    return max(1, total_steps(plan.batch_spans, tokens, plan.settings.data.sequence_length))


def what_differs(before: TrainingPlan, after: TrainingPlan, consumed_samples: int, run: str) -> str:
    """Say which phase of another plan does not go with what a run has consumed, and what to do.

    Where the phases are the same the data sets themselves differ.

    Args:
        run: its name, for the commands.
    """
    length = before.settings.data.sequence_length
    consumed = consumed_samples * length
    old, new = (_past(planned_phases(plan), consumed_samples) for plan in (before, after))
    earliest = max(1, consumed)
    add = (
        f"leave the phases before as they were, and add one with from_tokens={earliest} or more to data.phases "
        f"(`[{{from_tokens: {earliest}, train: [...], weights: [...]}}]`)"
    )
    for past, planned in zip(old, new, strict=False):
        if _contents(past) != _contents(planned):
            return f"{planned.field} is another than the {consumed} tokens up to the checkpoint were read by; {add}"
    if len(new) > len(old):
        begun = new[len(old)]
        tokens = begun.first_sample * length
        return (
            f"{begun.field} would begin after {tokens} tokens, and the checkpoint has read {consumed} without it; let "
            f"it begin at from_tokens={consumed} or later, or go on from a checkpoint of step {begun.first_step - 1} "
            f"or before: `orchestrate launch --from {run}@STEP name=NAME`"
        )
    if len(old) > len(new):
        return f"{old[len(new)].field}, which has begun, is missing; {add}"
    return "the data sets are not those that were read; put them back as they were"


def _past(phases: Sequence[PlannedPhase], consumed_samples: int) -> list[PlannedPhase]:
    """Return the phases of which at least a sample was read; the first counts always."""
    return [phase for phase in phases if phase.number == 0 or phase.first_sample < consumed_samples]


def _contents(phase: PlannedPhase) -> tuple[object, ...]:
    return phase.first_sample, phase.train, phase.weights
