"""The loss on held-out samples, always the same ones."""

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
    """Tell the loss on the first held-out samples, always the same ones."""
    if samples.validation is None:
        return
    started = time.monotonic()
    layout, passes = plan.layout, validation_passes(plan)
    for chunk in replica.chunks:
        chunk.eval()
    batches = samples.micro_batches(samples.validation, 0, layout, passes, plan.settings.cluster.device)
    with torch.no_grad():
        losses = compat.run_schedule(
            forward_step, replica.chunks, batches, layout, plan.settings.data.sequence_length, forward_only=True
        )
    for chunk in replica.chunks:
        chunk.train()
    loss, _ = sum_over_ranks(share_of_mean(losses, plan), 0, plan)
    tell(
        ValidationEvent(
            time=time.time(),
            step=step,
            loss=loss,
            samples=passes * layout.micro_batch_size * layout.data_parallel,
            consumed_tokens=plan.consumed_tokens(step),
            seconds=time.monotonic() - started,
        )
    )
