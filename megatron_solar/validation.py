"""The loss on held-out samples, always the same ones: of each data set, and over all."""

import time

import torch

from megatron_solar import compat
from megatron_solar.data import Samples
from megatron_solar.one_step import forward_step, share_of_mean, sum_over_ranks
from megatron_solar.replica import Replica
from megatron_solar.sample_request import validation_passes
from megatron_solar.telling import EventWriter
from orchestrator.events import ValidationEvent
from orchestrator.plan import TrainingPlan


def validate(plan: TrainingPlan, replica: Replica, samples: Samples, tell: EventWriter, step: int) -> None:
    """Tell the loss on the first samples of each held-out data set, always the same ones, and their mean."""
    if not samples.validation:
        return
    started = time.monotonic()
    layout, passes = plan.layout, validation_passes(plan)
    for chunk in replica.chunks:
        chunk.eval()
    shares = []
    for held_out in samples.validation.values():
        batches = samples.micro_batches(held_out, 0, layout, passes, plan.settings.cluster.device)
        with torch.no_grad():
            losses = compat.run_schedule(
                forward_step, replica.chunks, batches, layout, plan.settings.data.sequence_length, forward_only=True
            )
        shares.append(share_of_mean(losses, plan))
    for chunk in replica.chunks:
        chunk.train()
    means = sum_over_ranks(shares, plan)
    tell(
        ValidationEvent(
            time=time.time(),
            step=step,
            loss=sum(means) / len(means),
            losses=dict(zip(samples.validation, means, strict=True)),
            samples=len(means) * passes * layout.micro_batch_size * layout.data_parallel,
            consumed_tokens=plan.consumed_tokens(step),
            seconds=time.monotonic() - started,
        )
    )
