"""The gap: the same batch with the same weights, forward in bf16 and in FP8, and how far their losses lie apart.

FP8 that loses too much shows in the loss of a run only after the weights have followed it; the gap shows it at once.
The batch is the first of the first held-out data set, a micro-batch of each data-parallel rank, always the same one;
without held-out data it is the first of the training order, whose numbers never change either. That those samples were
trained on does not matter: both passes have the same weights. After the first step of an attempt it is measured as
well, so that 500 steps are not paid for a recipe that is off from the beginning.

The pass in bf16 comes first, so that the modules are left as FP8 leaves them. Neither has gradients, and what delayed
scaling keeps is put back (`fp8_state.py`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_solar import compat
from megatron_solar.data import Samples
from megatron_solar.fp8_proof import LINEARS
from megatron_solar.fp8_state import kept_scales, layers_of, without_fp8
from megatron_solar.one_step import forward_step, share_of_mean, sum_over_ranks
from megatron_solar.replica import Replica
from orchestrator.errors import PrecisionError
from orchestrator.events import Fp8GapEvent
from orchestrator.plan import TrainingPlan

Switch = Callable[[Sequence[Any]], contextlib.AbstractContextManager[None]]


class Fp8Gap:
    """Measures the gap every `precision.gap_check_steps` steps of a run in FP8."""

    def __init__(
        self,
        plan: TrainingPlan,
        replica: Replica,
        samples: Samples,
        tell: Callable[[Fp8GapEvent], None],
        switch: Switch = without_fp8,
    ) -> None:
        """Measure a plan's gap.

        Args:
            switch: has the passes within computed in bf16; tests replace it, since FP8 needs a GPU.
        """
        self._plan = plan
        self._replica = replica
        self._samples = samples
        self._tell = tell
        self._switch = switch

    def is_due(self, step: int, *, is_first: bool) -> bool:
        """Whether it is the step's turn."""
        precision = self._plan.settings.precision
        every = precision.gap_check_steps if precision.fp8 != "none" else 0
        return bool(every) and (is_first or step % every == 0)

    def measure(self, step: int) -> None:
        """Tell the gap of the weights after a step; collective.

        Raises:
            PrecisionError: the pass in bf16 ran in FP8, so that the gap would be none of bf16 and FP8.
        """
        started = time.monotonic()
        chunks, precision = self._replica.chunks, self._plan.settings.precision
        batches = self._batches()
        for chunk in chunks:
            chunk.eval()
        with kept_scales(chunks):
            with self._switch(chunks):
                bf16_share = self._share(batches)
                own_in_fp8 = _linears_in_fp8(chunks)
            fp8_share = self._share(batches)
        for chunk in chunks:
            chunk.train()
        bf16_loss, fp8_loss, still_on = sum_over_ranks([bf16_share, fp8_share, own_in_fp8], self._plan)
        if still_on:
            raise PrecisionError(
                f"the batch of the gap should be computed in bf16 once, and {still_on:.0f} linear parts stayed in FP8: "
                "this pair of megatron-core and Transformer Engine is another one than fp8_state.py was written for; "
                "precision.gap_check_steps=0 goes on without it"
            )
        difference = abs(fp8_loss - bf16_loss) / abs(bf16_loss) if bf16_loss else math.inf
        layout = self._plan.layout
        self._tell(
            Fp8GapEvent(
                time=time.time(),
                step=step,
                bf16_loss=bf16_loss,
                fp8_loss=fp8_loss,
                relative_difference=difference,
                alarm_level=precision.gap_alarm,
                is_alarm=not difference <= precision.gap_alarm,  # nor does it hold of a NaN
                samples=len(batches) * layout.micro_batch_size * layout.data_parallel,
                seconds=time.monotonic() - started,
            )
        )

    def _batches(self) -> list[dict[str, torch.Tensor]]:
        """Return one micro-batch of this rank, or as many as an interleaved pipeline needs."""
        layout = self._plan.layout
        held_out = next(iter(self._samples.validation.values()), self._samples.train)
        count = layout.pipeline_parallel if layout.virtual_pipeline_parallel > 1 else 1
        return self._samples.micro_batches(held_out, 0, layout, count, self._plan.settings.cluster.device)

    def _share(self, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        """Return this rank's part of the mean loss."""
        length = self._plan.settings.data.sequence_length
        with torch.no_grad():
            losses = compat.run_schedule(
                forward_step, self._replica.chunks, batches, self._plan.layout, length, forward_only=True
            )
        return share_of_mean(losses, self._plan)


def _linears_in_fp8(chunks: Sequence[Any]) -> int:
    linears = [layer.get_submodule(name) for _, layer in layers_of(chunks) for name in LINEARS]
    return sum(bool(getattr(linear, "fp8", False)) for linear in linears)
