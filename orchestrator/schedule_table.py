"""A run's schedule as people see it: rows of what holds from which step to which, and lines of rate and batch. Pure."""

import dataclasses
from collections.abc import Callable

from orchestrator.plan import TrainingPlan
from orchestrator.schedule import learning_rate, stable_steps, total_steps, warmup_steps

_LEVELS = "▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleRow:
    """Something that holds over a span of steps."""

    what: str
    first_step: int
    last_step: int
    """Not beyond the last step of the run."""
    first_token: int
    """Tokens that the run has read before the span."""
    last_token: int
    begins_with: float | None
    """Rate of the first step, or sequences a step; None of frozen parts."""
    ends_with: float | None


def schedule_rows(plan: TrainingPlan) -> list[ScheduleRow]:
    """Return the parts of the rate, then the batches, then what is frozen."""
    training, steps = plan.settings.training, plan.total_steps
    warmup, stable = warmup_steps(training, steps), stable_steps(training, steps)

    def row(what: str, first: int, last: int, value: Callable[[int], float | None]) -> ScheduleRow:
        last = min(last, steps)
        return ScheduleRow(
            what=what,
            first_step=first,
            last_step=last,
            first_token=plan.consumed_tokens(first - 1),
            last_token=plan.consumed_tokens(last),
            begins_with=value(first),
            ends_with=value(last),
        )

    def rate(step: int) -> float:
        return learning_rate(training, step, steps)

    decay = f"{training.decay_form} decay" if training.decay == "wsd" else f"{training.decay} decay"
    of_the_rate = [("warm-up", 1, warmup), ("full rate", warmup + 1, stable), (decay, stable + 1, steps)]
    rows = [row(what, first, last, rate) for what, first, last in of_the_rate if first <= min(last, steps)]
    begins = [span.first_step for span in plan.batch_spans if span.first_step <= steps]
    for first, after in zip(begins, [*begins[1:], steps + 1], strict=True):
        rows.append(row("batch", first, after - 1, plan.batch_size))
    rows += [row(f"frozen {each.what}", 1, each.steps, lambda step: None) for each in training.frozen]
    return rows


def schedule_lines(plan: TrainingPlan, width: int) -> list[tuple[str, str]]:
    """Return lines over tokens, so many characters wide: the rate, and the batch where there is a ramp."""
    length = plan.settings.data.sequence_length
    tokens = [max(1, round((column + 0.5) * plan.total_tokens / width)) for column in range(width)]
    steps = [total_steps(plan.batch_spans, reached, length) for reached in tokens]
    lines = [("rate", _line([learning_rate(plan.settings.training, step, plan.total_steps) for step in steps]))]
    if plan.settings.training.batch_ramp:
        lines.append(("batch", _line([plan.batch_size(step) for step in steps])))
    return lines


def _line(values: list[float] | list[int]) -> str:
    top = max(values)
    return "".join(_LEVELS[min(len(_LEVELS) - 1, int(value / top * len(_LEVELS)))] for value in values)
