"""The learning rate of a step: linear warm-up from zero, then decay to the minimum at the last step."""

import math

from orchestrator.settings import TrainingSettings


def total_steps(training: TrainingSettings, tokens_per_step: int) -> int:
    """Return the steps that a token budget takes, the last one whole."""
    return -(-training.tokens // tokens_per_step)


def learning_rate(training: TrainingSettings, step: int, steps: int) -> float:
    """Return the rate of a step, counted from 1, of `steps`.

    The warm-up takes ceil(warmup_share * steps) steps and ends at the full rate.
    """
    warmup = math.ceil(round(training.warmup_share * steps, 6))  # 0.07 * 100 is 7.000000000000001
    if step <= warmup:
        return training.learning_rate * step / warmup
    if training.decay == "constant":
        return training.learning_rate
    progress = (step - warmup) / max(1, steps - warmup)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if training.decay == "cosine" else 1 - progress
    low = training.minimum_learning_rate
    return low + (training.learning_rate - low) * remaining
