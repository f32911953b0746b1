"""Compare what a run computes before its first step with what was recorded when its base was written.

The same tokens go through the run's own ranks, layout, precision and kernels, in bf16 where it trains in FP8. A weight
in the wrong place, another rope or a broken kernel shows here in seconds, and otherwise as a curve that is a little
worse for weeks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.evaluate import Evaluation, read_evaluation
from megatron_solar.lineage import changed_files
from megatron_solar.replica import Replica
from megatron_solar.stacks import waits_for_others
from orchestrator.errors import ModelFolderError
from orchestrator.events import FirstLossEvent
from orchestrator.plan import TrainingPlan
from orchestrator.settings import RANDOM_BASE

TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative difference of the mean loss that rounding explains, by `precision.label`."""
TOKEN_FACTOR = 5
"""Losses of single tokens may differ by so much more on average: their differences have either sign. Where a model
predicts badly anyway, a fault shows in these and hardly in the mean."""


def check_first_loss(plan: TrainingPlan, replica: Replica, tell: Callable[[FirstLossEvent], None]) -> None:
    """Tell how a run's loss on the recorded tokens compares; nothing where the base has no record. Collective.

    Raises:
        ModelFolderError: it differs by more than rounding; on every rank, with what was found out about the cause.
    """
    if plan.settings.base == RANDOM_BASE:
        return
    base, precision = Path(plan.settings.base), plan.settings.precision
    started = time.monotonic()
    evaluation = _from_rank_0(lambda: read_evaluation(base))
    if evaluation is None:
        return
    recorded, loss, token_difference, tokens = _compare(plan, replica, evaluation)
    event = FirstLossEvent(
        time=time.time(),
        step=0,
        recorded_loss=recorded,
        loss=loss,
        relative_difference=abs(loss - recorded) / recorded,
        token_difference=token_difference / recorded,
        tolerance=TOLERANCES[precision.dtype],
        tokens=tokens,
        seconds=time.monotonic() - started,
    )
    tell(event)
    limit = event.tolerance
    if event.relative_difference <= limit and event.token_difference <= TOKEN_FACTOR * limit:  # neither holds of a NaN
        return
    causes = _from_rank_0(lambda: _causes(plan, base))
    raise ModelFolderError(
        f"before any step the base {base} should have a loss of {recorded:.5f} nats a token, as was recorded when it "
        f"was written; found {loss:.5f} on the same {tokens:,} tokens: a relative difference of "
        f"{event.relative_difference:.1e}, of single tokens {event.token_difference:.1e}; allowed in "
        f"{precision.dtype} are {limit:.0e} and {TOKEN_FACTOR * limit:.0e}. No step was taken; "
        "training.check_first_loss=false starts nevertheless",
        causes,
    )


def _compare(plan: TrainingPlan, replica: Replica, evaluation: Evaluation) -> tuple[float, float, float, int]:
    """Return mean recorded loss, mean loss, mean absolute difference of a token, and over how many tokens.

    Sequences are cut to the run's length, which changes no loss that is left: a prediction sees only what is before.
    Data-parallel ranks share them; where there are more ranks than sequences some are taken twice.
    """
    layout, device = plan.layout, plan.settings.cluster.device
    count, recorded_length = evaluation.result_losses.shape
    length = min(recorded_length, plan.settings.data.sequence_length)
    length -= length % layout.sequence_multiple
    rounds = layout.pipeline_parallel if layout.virtual_pipeline_parallel > 1 else 1
    at_once = layout.micro_batch_size * layout.data_parallel
    passes = -(-max(1, count // at_once) // rounds) * rounds
    numbers = [_numbers(plan, number, count) for number in range(passes)]
    batches = [_batch(evaluation.tokens[chosen, : length + 1].long(), device) for chosen in numbers]
    for chunk in replica.chunks:
        chunk.eval()
    with torch.no_grad():
        results = compat.run_schedule(_forward_step, replica.chunks, batches, layout, length, forward_only=True)
    for chunk in replica.chunks:
        chunk.train()
    sums = torch.zeros(4, dtype=torch.float64)
    if compat.is_last_stage() and compat.tensor_rank() == 0:
        recorded_BS = torch.cat([evaluation.result_losses[chosen, :length] for chosen in numbers])
        recorded_BS = compat.context_share(recorded_BS).double()
        found_BS = torch.cat(results).double().cpu()
        difference = (found_BS - recorded_BS).abs().sum()
        sums = torch.stack([recorded_BS.sum(), found_BS.sum(), difference, torch.tensor(float(found_BS.numel()))])
    recorded, loss, difference, tokens = _sum_over_ranks(sums.to(device)).tolist()
    return recorded / tokens, loss / tokens, difference / tokens, int(tokens)


def _numbers(plan: TrainingPlan, batch: int, count: int) -> list[int]:
    """Return which sequences a micro-batch of this rank holds, as `Samples.micro_batches` has it."""
    size = plan.layout.micro_batch_size
    first = (batch * plan.layout.data_parallel + compat.data_rank()) * size
    return [(first + offset) % count for offset in range(size)]


def _batch(tokens_BS: Tensor, device: str) -> dict[str, Tensor]:
    inputs_BS = tokens_BS[:, :-1]
    positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS)
    parts = {"tokens": inputs_BS, "labels": tokens_BS[:, 1:], "position_ids": positions_BS}
    return {name: part.contiguous().to(device) for name, part in parts.items()}


def _forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through a chunk, and keep each token's loss."""
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses_BS, lambda output_BS: (output_BS.float().mean(), output_BS.float().clone())


@waits_for_others
def _sum_over_ranks(numbers: Tensor) -> Tensor:
    torch.distributed.all_reduce(numbers)
    return numbers


def _from_rank_0(read: Callable[[], Any]) -> Any:
    """Return what rank 0 reads, on every rank; collective."""
    said = [read() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def _causes(plan: TrainingPlan, base: Path) -> list[str]:
    """Return what may be wrong: the files of the base are read again, and what has not changed is none of it."""
    changed = changed_files(base)
    if changed:
        return [f"{name} is not what it was when the loss was recorded" for name in changed] + [
            "copy the base again, or up-scale again with --evaluate where the change was meant"
        ]
    return [
        "every file of the base is what it was, so that it is computed otherwise here: "
        f"{plan.layout.describe()} on {plan.settings.cluster.device} in {plan.settings.precision.label}",
        "a kernel, a library of another version, or a wrong split of weights; compare with "
        "layout.tensor_parallel=1 layout.pipeline_parallel=1 precision=fp32",
    ]
