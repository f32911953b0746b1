"""The largest input of each layer's second FFN matrix, every n-th step, whatever the precision.

SwiGLU multiplies two projections, and late in training some channels align and square: outliers there are what made
FP8 runs diverge after some 200 billion tokens (Fishman et al., arXiv 2409.12517), long before a loss shows it. On
these steps alone a hook before each `mlp.linear_fc2` keeps the largest magnitude on the device, without a wait; one
all-reduce of a number a layer ends the step. A maximum does not mind that recomputation sees an input twice, nor the
order of overlapped work. On all other steps there is no hook.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar.fp8_state import layers_of
from megatron_solar.replica import Replica
from megatron_solar.stacks import waits_for_others
from megatron_solar.telling import EventWriter
from orchestrator.events import FfnInputsEvent
from orchestrator.plan import TrainingPlan


class FfnInputs:
    """Measures the inputs every `precision.ffn_input_steps` steps, and tells of all layers."""

    def __init__(self, plan: TrainingPlan, replica: Replica, tell: EventWriter) -> None:
        self._every = plan.settings.precision.ffn_input_steps
        self._alarm = plan.settings.precision.ffn_input_alarm
        self._device = plan.settings.cluster.device
        self._layers = plan.settings.model.num_layers
        self._replica = replica
        self._tell = tell

    @contextlib.contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Measure what is computed within, if it is the step's turn; collective at its end then."""
        if not self._every or step % self._every:
            yield
            return
        largest_L = torch.zeros(self._layers, dtype=torch.float32, device=self._device)
        hooks = [
            layer.get_submodule("mlp.linear_fc2").register_forward_pre_hook(_Largest(largest_L[number]))
            for number, layer in layers_of(self._replica.chunks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._tell_largest(step, largest_L)

    @waits_for_others
    def _tell_largest(self, step: int, largest_L: Tensor) -> None:
        # What is no number would be lost in some maxima; it is larger than anything.
        largest_L = torch.nan_to_num(largest_L, nan=torch.inf, posinf=torch.inf)
        torch.distributed.all_reduce(largest_L, op=torch.distributed.ReduceOp.MAX)
        values = largest_L.tolist()
        layer = max(range(len(values)), key=values.__getitem__)
        self._tell(
            FfnInputsEvent(
                time=time.time(),
                step=step,
                largest=values[layer],
                layer=layer,
                values=tuple(values),
                alarm_level=self._alarm,
                is_alarm=values[layer] > self._alarm,
            )
        )


class _Largest:
    """A hook that keeps the largest magnitude of a module's inputs in one number on the device."""

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        # The norm for an infinite power is the largest magnitude, exact in bf16, without a copy of the magnitudes.
        with torch.no_grad():
            found = torch.linalg.vector_norm(inputs[0].detach(), torch.inf)
            torch.maximum(self._kept, found.float(), out=self._kept)
