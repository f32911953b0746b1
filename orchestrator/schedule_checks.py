"""What cannot be about rates, batch ramp and frozen parts, and what of them a resume may not rewrite. Pure."""

import math
from collections.abc import Sequence

from orchestrator.freezing import all_parts, frozen_steps, parts_of
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import choose, multiples_near
from orchestrator.schedule import BatchSpan, batch_spans, total_steps
from orchestrator.settings import RunSettings


def schedule_problems(settings: RunSettings, layout: ParallelLayout | None) -> list[str]:
    """Return everything that is wrong with the schedules.

    Args:
        layout: the rank grid, None where it cannot be formed.
    """
    ramp = _ramp_problems(settings, layout)
    return [*_rate_problems(settings, is_ramp_good=not ramp), *ramp, *_frozen_problems(settings)]


def past_problems(before: RunSettings, after: RunSettings, step: int) -> list[str]:
    """Return what other settings would make of the first `step` steps, which are done.

    A run's samples and the counts of its optimizer follow from the schedules, so that the past of both must stay.
    """
    found = []
    if _until(batch_spans(before), step) != _until(batch_spans(after), step):
        found.append(
            f"training.batch_ramp gives the first {step} steps other batches than they had; change only stages that "
            f"end after {step} steps"
        )
    frozen = [frozen_steps(each.training.frozen, each.model) for each in (before, after)]
    changed = [
        part for part in frozen[0] if min(frozen[0][part], step) != min(frozen[1].get(part, frozen[0][part]), step)
    ]
    if changed:
        found.append(
            f"training.frozen: {_shortened(changed)} were frozen for other steps than now said, and {step} steps are "
            f"done; leave what has thawed as it was, and thaw what is frozen after {step} steps or more"
        )
    return found


def _rate_problems(settings: RunSettings, *, is_ramp_good: bool) -> list[str]:
    training = settings.training
    found = []
    if not 0 <= training.warmup_share < 1:
        found.append(f"training.warmup_share={training.warmup_share} should be from 0 to below 1")
    if training.warmup_steps is not None and training.warmup_steps < 0:
        found.append(f"training.warmup_steps={training.warmup_steps} should be 0 or more")
    if not 0 < training.learning_rate < math.inf:
        found.append(f"training.learning_rate={training.learning_rate} should be above 0")
    else:
        for name, value in (
            ("minimum_learning_rate", training.minimum_learning_rate),
            ("warmup_from", training.warmup_from),
        ):
            if not 0 <= value <= training.learning_rate:
                found.append(
                    f"training.{name}={value} should be from 0 to training.learning_rate={training.learning_rate}"
                )
    if not 0 < training.decay_share <= 1:
        found.append(f"training.decay_share={training.decay_share} should be above 0 and at most 1")
    length = settings.data.sequence_length
    if found or not is_ramp_good or min(length, settings.layout.global_batch_size, training.tokens) < 1:
        return found
    steps = total_steps(batch_spans(settings), training.tokens, length)
    warmup = training.warmup_share * steps if training.warmup_steps is None else training.warmup_steps
    if warmup > steps:
        found.append(f"training.warmup_steps={warmup} is beyond the run's {steps} steps; use fewer, or more tokens")
    elif training.decay == "wsd" and warmup + training.decay_share * steps > steps:
        found.append(
            f"training.decay=wsd: a warm-up of {warmup:g} and a decay over training.decay_share="
            f"{training.decay_share:g} of {steps} steps overlap; use a decay_share of at most "
            f"{math.floor(1000 * (1 - warmup / steps)) / 1000:g}, or a shorter warm-up"
        )
    return found


def _ramp_problems(settings: RunSettings, layout: ParallelLayout | None) -> list[str]:
    found = []
    until = 0
    for number, stage in enumerate(settings.training.batch_ramp):
        where, size = f"training.batch_ramp[{number}]", stage.global_batch_size
        if size < 1:
            found.append(f"{where}.global_batch_size should be at least 1, found {size}")
        elif layout is not None and layout.batch_unit > 0 and size % layout.batch_unit:
            unit = layout.batch_unit
            found.append(
                f"{where}.global_batch_size={size} does not divide by {unit}, the micro-batches of all pipelines at "
                f"once ({layout.describe()}, micro_batch_size={layout.micro_batch_size}); "
                f"{choose('global_batch_size', multiples_near(unit, size), size)}"
            )
        if stage.until_tokens <= until:
            found.append(
                f"{where}.until_tokens={stage.until_tokens} should be above "
                + (f"{until}, where the stage before it ends" if number else "0")
            )
        until = max(until, stage.until_tokens)
    return found


def _frozen_problems(settings: RunSettings) -> list[str]:
    known = all_parts(settings.model)
    found, good = [], []
    for number, each in enumerate(settings.training.frozen):
        where = f"training.frozen[{number}]"
        if each.steps < 1:
            found.append(f"{where}.steps should be at least 1, found {each.steps}")
        try:
            unknown = [part for part in parts_of(each.what) if part not in known]
        except ValueError as error:
            found.append(f"{where}.what: {error}")
            continue
        if unknown == ["output"]:
            found.append(f"{where}.what=output: the model's output is tied to its embeddings; freeze `embeddings`")
        elif unknown:
            found.append(f"{where}.what={each.what}: the model has layers 0 to {settings.model.num_layers - 1}")
        else:
            good.append(each)
    if not found and good and min(frozen_steps(good, settings.model).values()) > 0:
        found.append("training.frozen freezes every part of the model, so that nothing is trained; leave one free")
    return found


def _until(spans: Sequence[BatchSpan], step: int) -> list[BatchSpan]:
    return [span for span in spans if span.first_step <= step]


def _shortened(parts: Sequence[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
