"""One rank that measures inputs of FFNs and gaps, and says what it found; started by the tests of precision.

    python -m tests.precision_ranks RUN ATTEMPT --rank N

The run's folder has `tokens.pt`, [micro-batches, batch, sequence + 1], which data-parallel ranks share. Each
rank leaves `found-N.pt` in the attempt. FP8 does not run here: weights of norms that are changed for the first of the
two passes stand for what its rounding does to a loss.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_solar import compat
from megatron_solar.data import samples_of_run
from megatron_solar.ffn_inputs import FfnInputs
from megatron_solar.fp8_gap import Fp8Gap
from megatron_solar.fp8_state import layers_of, without_fp8
from megatron_solar.one_step import forward_step
from megatron_solar.replica import Replica, build_replica, weight_source
from megatron_solar.worker import join
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import RunDirectory

EVERY = 2
FACTOR = 1.25
"""By which the weight of each layer's second norm is multiplied for the first pass; exact in fp32."""


def main(arguments: Sequence[str]) -> int:
    """Run one rank."""
    parser = argparse.ArgumentParser(prog="precision_ranks")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args(arguments)
    run = RunDirectory(options.run)
    attempt = run.attempt(options.attempt)
    plan = read_plan(run.launched_plan)
    torch.set_num_threads(1)
    join(attempt, options.rank, plan.layout.world_size, "gloo", 60)
    compat.initialize_parallel(plan.layout, plan.settings.training.seed)
    samples = samples_of_run(run, plan, lambda: None, lambda event: None)
    replica = build_replica(plan, weight_source(plan))
    tokens_MBS = torch.load(run.path / "tokens.pt")[compat.data_rank() :: plan.layout.data_parallel]
    found: dict[str, Any] = {"ffn": _ffn_inputs(plan, replica, tokens_MBS)}
    found["held_out"] = samples.micro_batches(next(iter(samples.validation.values())), 0, plan.layout, 1, "cpu")[0]
    found["gap"] = _gaps(plan, replica, samples, tokens_MBS)
    found["switch"] = _switch(plan)
    found["losses"] = [_losses(plan, tokens_MBS, samples, is_measured) for is_measured in (False, True)]
    torch.save(found, attempt.path / f"found-{options.rank}.pt")
    return 0


def _ffn_inputs(plan: TrainingPlan, replica: Replica, tokens_MBS: Tensor) -> dict[str, Any]:
    """Measure the steps' turns of some that do not change a weight; the last has a weight that is no number."""
    told: list[Any] = []
    precision = dataclasses.replace(plan.settings.precision, ffn_input_steps=EVERY, ffn_input_alarm=1.0)
    settings = dataclasses.replace(plan.settings, precision=precision)
    watch = FfnInputs(dataclasses.replace(plan, settings=settings), replica, told.append)
    linears = [layer.mlp.linear_fc2 for _, layer in layers_of(replica.chunks)]
    hooks = []
    for step in range(1, 2 * EVERY + 1):
        with watch.measuring(step):
            hooks.append(sum(len(linear._forward_pre_hooks) for linear in linears))
            _compute(plan, replica, tokens_MBS)
    first = next((layer for number, layer in layers_of(replica.chunks) if number == 0), None)
    weight = first.mlp.linear_fc1.weight.data if first is not None else torch.zeros(1, 1)
    before = weight[0, 0].clone()
    weight[0, 0] = math.nan
    with watch.measuring(3 * EVERY):
        _compute(plan, replica, tokens_MBS)
    weight[0, 0] = before
    hooks.append(sum(len(linear._forward_pre_hooks) for linear in linears))
    return {"events": [dataclasses.asdict(event) for event in told], "hooks": hooks}


def _gaps(plan: TrainingPlan, replica: Replica, samples: Any, tokens_MBS: Tensor) -> dict[str, Any]:
    """Measure with both passes alike, with the first one changed, and with megatron's own switch."""
    _compute(plan, replica, tokens_MBS)  # gradients are there, as after a step
    before = _state(replica)
    told: list[Any] = []
    for switch in (contextlib.nullcontext, _changed, without_fp8):
        Fp8Gap(plan, replica, samples, told.append, switch).measure(7)
    same = [torch.equal(one, other) for one, other in zip(before, _state(replica), strict=True)]
    is_training = all(chunk.training for chunk in replica.chunks)
    return {"events": [dataclasses.asdict(event) for event in told], "same": same, "is_training": is_training}


@contextlib.contextmanager
def _changed(chunks: Sequence[Any]) -> Iterator[None]:
    with torch.no_grad():
        norms = [layer.pre_mlp_layernorm.weight for _, layer in layers_of(chunks)]
        before = [weight.clone() for weight in norms]
        for weight in norms:
            weight.mul_(FACTOR)
        yield
        for weight, kept in zip(norms, before, strict=True):
            weight.copy_(kept)


def _switch(plan: TrainingPlan) -> dict[str, Any]:
    """Return what modules of a model that is built for FP8 are told of it, within the switch and after it."""
    precision = dataclasses.replace(plan.settings.precision, fp8="tensorwise")
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, precision=precision))
    replica = build_replica(plan, weight_source(plan))

    def seen() -> list[str | None]:
        modules = [module for chunk in replica.chunks for module in chunk.modules() if hasattr(module, "config")]
        return [module.config.fp8 for module in modules]

    with without_fp8(replica.chunks):
        within = seen()
    return {"within": within, "after": seen()}


def _losses(plan: TrainingPlan, tokens_MBS: Tensor, samples: Any, is_measured: bool) -> list[float]:
    """Return the losses of three steps from the base, with a measurement after each or without."""
    replica = build_replica(plan, weight_source(plan))
    gap = Fp8Gap(plan, replica, samples, lambda event: None)
    losses = []
    for _ in range(3):
        losses.append(_compute(plan, replica, tokens_MBS))
        training = plan.settings.training
        compat.set_learning_rate(replica.optimizer, training.learning_rate, training.weight_decay)
        replica.optimizer.step()
        if is_measured:
            gap.measure(1)
    return losses


def _state(replica: Replica) -> list[Tensor]:
    """Return copies of all that a later step depends on."""
    held = [parameter for chunk in replica.chunks for parameter in chunk.module.parameters()]
    held += [bucket.grad_data for chunk in replica.chunks for group in chunk.bucket_groups for bucket in group.buckets]
    held += [
        state for piece in compat.owned_ranges(replica.chunks, replica.optimizer) for state in piece.states.values()
    ]
    return [tensor.detach().clone() for tensor in [*held, torch.get_rng_state()]]


def _compute(plan: TrainingPlan, replica: Replica, tokens_MBS: Tensor) -> float:
    """Run forward and backward over all micro-batches and return the mean loss on the last stage."""
    for chunk in replica.chunks:
        chunk.zero_grad_buffer()
    replica.optimizer.zero_grad()
    batches = [_batch(tokens_BS) for tokens_BS in tokens_MBS]
    length = plan.settings.data.sequence_length
    losses = compat.run_schedule(forward_step, replica.chunks, batches, plan.layout, length)
    return float(torch.stack(list(losses)).mean()) if losses else math.nan


def _batch(tokens_BS: Tensor) -> dict[str, Tensor]:
    inputs_BS = tokens_BS[:, :-1].contiguous()
    positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS)
    return {"tokens": inputs_BS, "labels": tokens_BS[:, 1:].contiguous(), "position_ids": positions_BS}
