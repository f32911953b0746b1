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
from megatron_solar.evidence import Evidence
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
    ranks_waiting: int
    """How many ranks waited for theirs for longer than `data.wait_alarm_share` of the step up to its gradients."""
    waiting_seconds: float
    """How long these did, on average."""
    is_applied: bool = True
    """Whether the gradients are to be applied."""


def compute_step(
    plan: TrainingPlan, attempt: AttemptDirectory, replica: Replica, samples: Samples, evidence: Evidence, step: int
) -> StepResult:
    """Compute loss and gradients of the step after `step` from the weights as they are; collective.

    The gradients lie in the optimizer, reduced over the ranks and not yet clipped. The evidence is of this step then.
    """
    layout, device = plan.layout, plan.settings.cluster.device
    started = time.monotonic()
    first, count = plan.consumed_samples(step), plan.num_microbatches(step + 1)
    batches = samples.micro_batches(samples.train, first, layout, count, device)
    data_seconds = time.monotonic() - started
    for chunk in replica.chunks:
        chunk.zero_grad_buffer()
    replica.optimizer.zero_grad()
    evidence.begin()
    forward = evidence.watched(forward_step)
    losses = compat.run_schedule(forward, replica.chunks, batches, layout, plan.settings.data.sequence_length)
    if device == "cuda":  # what is queued belongs to the step, and is waited for here or below; never run on a GPU
        torch.cuda.synchronize()
    is_late = data_seconds > plan.settings.data.wait_alarm_share * (time.monotonic() - started)
    late = (1.0, data_seconds) if is_late else (0.0, 0.0)
    loss, stop_reason, (late_ranks, late_seconds) = agree(losses, plan, attempt, late)
    norm = compat.gradient_norm(replica.optimizer, step + 1) if math.isfinite(loss) else math.nan
    return StepResult(
        loss=loss,
        gradient_norm=norm,
        stop_reason=stop_reason,
        data_seconds=data_seconds,
        ranks_waiting=round(late_ranks),
        waiting_seconds=late_seconds / max(1, late_ranks),
    )


def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through a chunk, as megatron's schedules call it."""
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_function(output_BS: Tensor) -> tuple[Tensor, Tensor]:
        # The first megatron multiplies by the ranks that share a sequence, and divides in place with pipelines; the
        # second is for the record.
        loss = output_BS.float().mean()
        return loss / compat.context_ranks(), loss.detach().clone()

    return losses_BS, loss_function


def agree(
    losses: Sequence[Tensor], plan: TrainingPlan, attempt: AttemptDirectory, own: Sequence[float]
) -> tuple[float, str, list[float]]:
    """Return the mean loss over the global batch, the reason of a stop request, and sums, the same on every rank.

    Args:
        own: this rank's part of the sums.
    """
    asked = 0
    if torch.distributed.get_rank() == 0 and attempt.stop_request.exists():
        asked = STOP_REASONS.index(str(read_json(attempt.stop_request)["reason"])) + 1
    loss, number, *sums = sum_over_ranks([share_of_mean(losses, plan), asked, *own], plan)
    return loss, STOP_REASONS[int(number) - 1] if number else "", sums


def share_of_mean(losses: Sequence[Tensor], plan: TrainingPlan) -> float:
    """Return what this rank adds to the mean loss of a global batch: nothing, unless it holds the output."""
    if not (compat.is_last_stage() and compat.tensor_rank() == 0):
        return 0.0
    return float(torch.stack(list(losses)).double().mean()) / plan.layout.weight_replicas


@waits_for_others
def sum_over_ranks(own: Sequence[float], plan: TrainingPlan) -> list[float]:
    """Add some numbers over all ranks in one small all-reduce."""
    numbers = torch.tensor(own, dtype=torch.float64).to(plan.settings.cluster.device)
    torch.distributed.all_reduce(numbers)
    found: list[float] = numbers.tolist()
    return found
