"""A rank that computes wrongly, or whose batches are bad: the worker of the tests of the guards.

What it does stands in `fault.json` of the run's folder, so that the loop itself knows nothing of it.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_solar import compat, data, libraries, one_step, step_guard, train, worker

FILE = "fault.json"


def main(arguments: list[str]) -> int:
    """Put the faults of this rank in, then be a rank."""
    attempt = int(arguments[1])
    rank = int(arguments[arguments.index("--rank") + 1] if "--rank" in arguments else os.environ["SLURM_PROCID"])
    for fault in json.loads((Path(arguments[0]) / FILE).read_text()):
        if fault.get("rank", rank) == rank and fault.get("attempt", attempt) == attempt:
            KINDS[fault["kind"]](fault)
    return worker.main(arguments)


class _Turns:
    """Whether a step is computed for the first so many times."""

    def __init__(self, step: int, times: int) -> None:
        self._step, self._left, self._is_on = step, times, False
        compute_step = step_guard.compute_step

        def computing(*given: Any) -> Any:
            self._is_on = given[-1] + 1 == self._step and self._left > 0
            self._left -= self._is_on
            return compute_step(*given)

        step_guard.compute_step = computing

    def __bool__(self) -> bool:
        return self._is_on


def _wrap_forward(change: Callable[[Tensor, Any], Tensor]) -> None:
    """Have a change made of what a chunk gives for a micro-batch."""
    forward_step = one_step.forward_step

    def forward(batches: Any, model: Any) -> Any:
        batch = next(batches)
        output, loss_function = forward_step(iter([batch]), model)
        return change(output, batch), loss_function

    one_step.forward_step = forward


def wrong_output(fault: dict[str, Any]) -> None:
    """Multiply what a rank's part of the model gives in a step, the first `times` that it is computed."""
    turn = _Turns(fault["step"], fault.get("times", 1))
    _wrap_forward(lambda output, _: output * fault["factor"] if turn else output)


def wrong_gradient(fault: dict[str, Any]) -> None:
    """Spoil one number of a rank's own gradients in a step, before replicas add theirs."""
    turn = _Turns(fault["step"], fault.get("times", 1))
    watch = compat.watch_local_gradients

    def spoiled(chunks: Any, see: Callable[[int, Tensor], None]) -> None:
        def spoil(number: int, gradients: Tensor) -> None:
            if turn and number == 0:
                gradients[7] = fault["factor"]
            see(number, gradients)

        watch(chunks, spoil)

    compat.watch_local_gradients = spoiled


def bad_sample(fault: dict[str, Any]) -> None:
    """Have one training sample give another loss, or other gradients alone, whenever and wherever it is read."""
    micro_batches, mark = data.Samples.micro_batches, f"sample {fault['sample']}"

    def marked(self: data.Samples, split: Any, first_sample: int, layout: Any, count: int, *more: Any) -> Any:
        batches = micro_batches(self, split, first_sample, layout, count, *more)
        for number, batch in enumerate(batches):
            start = first_sample + (number * layout.data_parallel + compat.data_rank()) * layout.micro_batch_size
            if split is self.train and start <= fault["sample"] < start + layout.micro_batch_size:
                batch[mark] = torch.ones(1)
        return batches

    def change(output: Tensor, batch: Any) -> Tensor:
        if mark not in batch or not output.requires_grad or not compat.is_last_stage():
            return output
        if fault.get("gradients_alone"):
            output.register_hook(lambda gradient: gradient * fault["factor"])
            return output
        return output * fault["factor"]

    data.Samples.micro_batches = marked
    _wrap_forward(change)


def flipped_weight(fault: dict[str, Any]) -> None:
    """Flip the lowest bit of a weight in a rank's memory after a step."""
    done = 0
    apply = compat.apply_gradients

    def apply_and_flip(optimizer: Any, norm: float) -> None:
        nonlocal done
        apply(optimizer, norm)
        done += 1
        if done == fault["step"]:
            (part,) = compat._parts(optimizer)
            parameter = next(iter(part.model_param_group_index_map))
            parameter.data.view(-1).view(torch.int32)[11] ^= 1

    compat.apply_gradients = apply_and_flip


def slow(fault: dict[str, Any]) -> None:
    """Burn a processor for some time in each micro-batch."""

    def burn(output: Tensor, _: Any) -> Tensor:
        until = time.thread_time() + fault["seconds"]
        while time.thread_time() < until:
            pass
        return output

    _wrap_forward(burn)


def unchecked_libraries(fault: dict[str, Any]) -> None:
    """Begin without asking whether the libraries can do what is asked for."""
    libraries.check_libraries = lambda settings: None


def unproven_fp8(fault: dict[str, Any]) -> None:
    """Train on although FP8 did not run: megatron computes in bf16 then, and the loop does all else as with FP8."""
    unchecked_libraries(fault)
    train.prove_fp8 = lambda *_: None


def moving_scales(fault: dict[str, Any]) -> None:
    """Have what a chunk gives depend on a history that each micro-batch moves, in a stand-in of delayed scaling."""
    from tests.fp8_stand_ins import StandInLinear, StandInRecipe  # not at the top: a run's own copy has no tests

    unproven_fp8(fault)
    forward_step = one_step.forward_step

    def forward(batches: Any, model: Any) -> Any:
        if not hasattr(model.module, "stand_in"):
            model.module.stand_in = StandInLinear(StandInRecipe("delayed"))
        newest = model.module.stand_in.fp8_meta["scaling_fwd"].amax_history[0]
        output, loss_function = forward_step(batches, model)
        newest += 1
        return output * (1 + 0.01 * float(newest[0])), loss_function

    one_step.forward_step = forward


KINDS = {
    function.__name__: function
    for function in (
        wrong_output,
        wrong_gradient,
        bad_sample,
        flipped_weight,
        slow,
        unchecked_libraries,
        unproven_fp8,
        moving_scales,
    )
}
