"""The rate and the batch of each step, and how steps, samples and tokens follow from each other. Pure.

The rate rises linearly, then falls to the minimum at the last step. For a model that was trained before: re-warmed and
decayed again (Ibrahim et al. 2024, arXiv 2403.08763), constant (Yi-9B, arXiv 2403.04652), or `wsd`, which stays at the
full rate until the last share of the steps (Hu et al. 2024, arXiv 2404.06395); its default decay, 1 - sqrt(x), was
better than a linear one at every length (Hägele et al. 2024, arXiv 2405.18392, section 3).
"""

import dataclasses
import math
from collections.abc import Sequence

from orchestrator.settings import RunSettings, TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSpan:
    """Steps with the same global batch, from one on until the next span begins."""

    first_step: int
    first_sample: int
    batch_size: int
    """Sequences a step, over all ranks."""

    def samples_until(self, step: int) -> int:
        """Return the samples that the run has read after a step of this span."""
        return self.first_sample + (step - self.first_step + 1) * self.batch_size


def batch_spans(settings: RunSettings) -> tuple[BatchSpan, ...]:
    """Return the stages of the ramp that have steps, then the final batch, which has no end."""
    spans = []
    step, sample = 1, 0
    for stage in settings.training.batch_ramp:
        missing = -(-stage.until_tokens // settings.data.sequence_length) - sample
        if missing > 0:
            spans.append(BatchSpan(first_step=step, first_sample=sample, batch_size=stage.global_batch_size))
            step += -(-missing // stage.global_batch_size)
            sample = spans[-1].samples_until(step - 1)
    return (*spans, BatchSpan(first_step=step, first_sample=sample, batch_size=settings.layout.global_batch_size))


def span_of(spans: Sequence[BatchSpan], step: int) -> BatchSpan:
    """Return the span that a step, counted from 1, lies in."""
    return next(span for span in reversed(spans) if span.first_step <= step)


def consumed_samples(spans: Sequence[BatchSpan], step: int) -> int:
    """Return the samples that the first `step` steps read."""
    return span_of(spans, step).samples_until(step) if step > 0 else 0


def total_steps(spans: Sequence[BatchSpan], tokens: int, sequence_length: int) -> int:
    """Return the steps that a token budget takes, the last one whole."""
    last = next(span for span in reversed(spans) if span is spans[0] or span.first_sample * sequence_length < tokens)
    tokens_left = tokens - last.first_sample * sequence_length
    return last.first_step - 1 + -(-tokens_left // (last.batch_size * sequence_length))


def warmup_steps(training: TrainingSettings, steps: int) -> int:
    """Return over how many of `steps` the rate rises; the last of them has the full rate."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return _share(training.warmup_share, steps)


def stable_steps(training: TrainingSettings, steps: int) -> int:
    """Return after which step the rate begins to fall."""
    warmup = warmup_steps(training, steps)
    if training.decay == "constant":
        return steps
    return max(warmup, steps - _share(training.decay_share, steps)) if training.decay == "wsd" else warmup


def learning_rate(training: TrainingSettings, step: int, steps: int) -> float:
    """Return the rate of a step, counted from 1, of `steps`."""
    peak, low = training.learning_rate, training.minimum_learning_rate
    warmup, stable = warmup_steps(training, steps), stable_steps(training, steps)
    if step <= warmup:
        return training.warmup_from + (peak - training.warmup_from) * step / warmup
    if step <= stable and training.decay in ("constant", "wsd"):
        return peak
    progress = (step - stable) / max(1, steps - stable)
    if training.decay == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    elif training.decay == "wsd" and training.decay_form == "1-sqrt":
        remaining = 1 - math.sqrt(progress)
    else:
        remaining = 1 - progress
    return low + (peak - low) * remaining


def _share(share: float, steps: int) -> int:
    return math.ceil(round(share * steps, 6))  # 0.07 * 100 is 7.000000000000001
