"""What a rank keeps of a step to tell later whether it computed the step alike again, and which rank did not.

The norm of what its part of the model gave for each micro-batch, and of its own gradients before replicas add theirs:
one pass over each, as megatron's `check_for_nan_in_grad` costs, and no wait for the device (on CUDA never run).
megatron-core's `rerun_state_machine` compares single results that a program hands to it, and needs a restart from a
checkpoint on another device to accuse one; norms of all ranks say it at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_solar import compat
from orchestrator.layout import ParallelLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankEvidence:
    """Norms of one rank in one step."""

    outputs: tuple[tuple[int, int, float], ...]
    """Micro-batch, model chunk of the rank, and the norm of what that chunk gave."""
    gradients: tuple[float, ...]
    """Of each part of the gradients, before they were reduced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blame:
    """The ranks that computed a step otherwise when they did it again."""

    ranks: tuple[int, ...]
    differs: str
    """`output`, `gradients`, or nothing where all that ranks keep is the same."""


class Evidence:
    """The norms of this rank's newest step."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = list(chunks)
        self._outputs: list[tuple[int, Tensor]] = []
        self._gradients: dict[int, Tensor] = {}
        compat.watch_local_gradients(chunks, self._see_gradients)

    def begin(self) -> None:
        """Forget the step before."""
        self._outputs.clear()
        self._gradients.clear()

    def watched(self, forward_step: Callable[[Any, Any], tuple[Tensor, Any]]) -> Callable[[Any, Any], Any]:
        """Return a forward step for megatron's schedules that keeps the norm of what it gave."""

        def forward(batches: Any, model: Any) -> tuple[Tensor, Any]:
            output, loss_function = forward_step(batches, model)
            chunk = next(index for index, own in enumerate(self._chunks) if own is model)
            self._outputs.append((chunk, _norm(output.detach())))
            return output, loss_function

        return forward

    def told(self) -> RankEvidence:
        """Return the norms as numbers, for which the device is waited for."""
        outputs, seen = [], [0] * len(self._chunks)
        for chunk, norm in self._outputs:
            outputs.append((seen[chunk], chunk, float(norm)))
            seen[chunk] += 1
        gradients = tuple(float(norm) for _, norm in sorted(self._gradients.items()))
        return RankEvidence(outputs=tuple(outputs), gradients=gradients)

    def _see_gradients(self, number: int, gradients: Tensor) -> None:
        if number not in self._gradients:
            self._gradients[number] = _norm(gradients)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm


def is_same(first: float, second: float, noise: float) -> bool:
    """Whether two results are one, up to a relative noise; what is no finite number is alike."""
    if not (abs(first) < float("inf") and abs(second) < float("inf")):
        return not (abs(first) < float("inf") or abs(second) < float("inf"))
    return abs(first - second) <= noise * max(abs(first), abs(second))


def blame(first: Sequence[RankEvidence], second: Sequence[RankEvidence], layout: ParallelLayout, noise: float) -> Blame:
    """Return the ranks that are to blame for two results of one step, from what all ranks kept of both.

    A wrong number spreads with the outputs to the stages behind, and from there with the gradients to all before.
    So in each replica it is the first stage whose output of a micro-batch differs; where only gradients do, the last
    stage. Ranks that mix their numbers within a stage (tensor and context parallel) are named together.
    """
    outputs: dict[int, dict[tuple[int, int], set[int]]] = {}
    gradients: dict[int, dict[int, set[int]]] = {}
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        place = layout.coordinates(rank)
        for (batch, chunk, left), (_, _, right) in zip(one.outputs, other.outputs, strict=True):
            if not is_same(left, right, noise):
                depth = chunk * layout.pipeline_parallel + place.pipeline
                outputs.setdefault(place.data, {}).setdefault((batch, depth), set()).add(rank)
        if any(not is_same(left, right, noise) for left, right in zip(one.gradients, other.gradients, strict=True)):
            gradients.setdefault(place.data, {}).setdefault(place.pipeline, set()).add(rank)
    if outputs:
        ranks = {rank for of_replica in outputs.values() for rank in of_replica[min(of_replica)]}
        return Blame(ranks=tuple(sorted(ranks)), differs="output")
    ranks = {rank for of_replica in gradients.values() for rank in of_replica[max(of_replica)]}
    return Blame(ranks=tuple(sorted(ranks)), differs="gradients" if ranks else "")
