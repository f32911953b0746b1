"""One step up to its gradients: read the samples, run megatron's schedule, agree on the loss.

Nothing here changes a weight, so that a step can be computed again from the same state.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.data import Samples
from megatron_solar.replica import Replica
from megatron_solar.stacks import waits_for_others
from orchestrator.files import read_json
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory

STOP_REASONS = ("time_limit", "preempted", "cancelled", "stopped")
"""What the supervisor may ask for; all ranks learn the same one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed, the same on every rank but for the seconds."""

    loss: float
    """Mean over the global batch, nats a token."""
    gradient_norm: float
    """Global, before clipping; it was not computed and is NaN where the loss is not finite."""
    stop_reason: str
    """Why a stop is asked for, or nothing."""
    data_seconds: float
    """How long this rank waited for samples."""


def compute_step(
    plan: TrainingPlan, attempt: AttemptDirectory, replica: Replica, samples: Samples, step: int
) -> StepResult:
    """Compute loss and gradients of the step after `step` from the weights as they are; collective.

    The gradients lie in the optimizer, reduced over the ranks and not yet clipped.
    """
    layout, device = plan.layout, plan.settings.cluster.device
    started = time.monotonic()
    batches = samples.micro_batches(samples.train, plan.consumed_samples(step), layout, layout.num_microbatches, device)
    data_seconds = time.monotonic() - started
    for chunk in replica.chunks:
        chunk.zero_grad_buffer()
    replica.optimizer.zero_grad()
    losses = compat.run_schedule(forward_step, replica.chunks, batches, layout, plan.settings.data.sequence_length)
    loss, stop_reason = agree(losses, plan, attempt)
    norm = compat.gradient_norm(replica.optimizer) if math.isfinite(loss) else math.nan
    return StepResult(loss=loss, gradient_norm=norm, stop_reason=stop_reason, data_seconds=data_seconds)


def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through a chunk, as megatron's schedules call it."""
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_function(output_BS: Tensor) -> tuple[Tensor, Tensor]:
        # With pipelines megatron divides the first in place; the second is for the record.
        loss = output_BS.float().mean()
        return loss, loss.detach().clone()

    return losses_BS, loss_function


def agree(losses: Sequence[Tensor], plan: TrainingPlan, attempt: AttemptDirectory) -> tuple[float, str]:
    """Return the mean loss over the global batch and the reason of a stop request, the same on every rank."""
    asked = 0
    if torch.distributed.get_rank() == 0 and attempt.stop_request.exists():
        asked = STOP_REASONS.index(str(read_json(attempt.stop_request)["reason"])) + 1
    loss, number = sum_over_ranks(share_of_mean(losses, plan), asked, plan)
    return loss, STOP_REASONS[int(number) - 1] if number else ""


def share_of_mean(losses: Sequence[Tensor], plan: TrainingPlan) -> float:
    """Return what this rank adds to the mean loss of a global batch: nothing, unless it holds the output."""
    if not (compat.is_last_stage() and compat.tensor_rank() == 0):
        return 0.0
    return float(torch.stack(list(losses)).double().mean()) / plan.layout.data_parallel


@waits_for_others
def sum_over_ranks(first: float, second: float, plan: TrainingPlan) -> tuple[float, float]:
    """Add two numbers over all ranks in one small all-reduce."""
    numbers = torch.tensor([first, second], dtype=torch.float64).to(plan.settings.cluster.device)
    torch.distributed.all_reduce(numbers)
    return float(numbers[0]), float(numbers[1])
