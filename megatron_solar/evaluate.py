"""What base and result make of the same held-out tokens, and what each layer of a base does to its input.

Both are streamed passes (streamed.py): weights are read layer by layer, and activations are bounded by taking so many
sequences at a time. Layers that base and result begin with alike are computed once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_solar.depth import DepthMap
from megatron_solar.lineage import EVALUATION_FILE, read_lineage
from megatron_solar.model_folder import ModelFolder
from megatron_solar.streamed import StreamedModel
from orchestrator.errors import ModelFolderError
from orchestrator.files import sha256_of

ACTIVATION_BYTES = 200_000_000
"""Of the hidden states that are held at once; there may be two, before and behind where base and result part."""

Progress = Callable[[int, int], None]
"""Told what is done and the total, in tokens times layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out tokens, and the loss of each in the base and in the result, in nats.

    Attributes:
        tokens: int32, [sequences, length + 1].
        base_losses: fp32, [sequences, length].
        result_losses: fp32, [sequences, length].
    """

    tokens: Tensor
    base_losses: Tensor
    result_losses: Tensor

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file."""
        tensors = dataclasses.asdict(self)
        return safetensors.torch.save(tensors)


def evaluate(
    base: ModelFolder,
    layers: DepthMap,
    dtype: torch.dtype,
    tokens_NS: NDArray[numpy.int32],
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Compute the losses of a base and of what a map makes of it.

    Args:
        dtype: of the result's weights, to which they are rounded.

    Raises:
        ModelFolderError: the base computes something that is no number.
    """
    ends = [source for target, source in enumerate(layers.sources) if target not in layers.zeroed]
    pairs = enumerate(zip(range(layers.base_layers), ends, strict=False))
    alike = next((number for number, (own, other) in pairs if own != other), min(layers.base_layers, len(ends)))
    if dtype != base.dtype:
        alike = 0
    own = StreamedModel(base.tensor, base.shape)
    result = StreamedModel(lambda name: base.tensor(name).to(dtype), base.shape)
    step = _Counter(progress, tokens_NS[:, 1:].size * (layers.base_layers + len(ends) - alike))
    found: dict[str, list[Tensor]] = {"base": [], "result": []}
    for inputs_NS, labels_NS in _groups(tokens_NS, base.shape.hidden_size):
        x_NSH = own.embed(inputs_NS)
        for number in range(alike):
            own.run_layer(number, x_NSH)
            step(inputs_NS)
        # With other weights the result begins with its own embedding.
        y_NSH = x_NSH.clone() if alike else result.embed(inputs_NS)
        for name, model, rest, state_NSH in (
            ("base", own, range(alike, layers.base_layers), x_NSH),
            ("result", result, ends[alike:], y_NSH),
        ):
            for number in rest:
                model.run_layer(number, state_NSH)
                step(inputs_NS)
            found[name].append(model.losses(state_NSH, labels_NS))
    base_NS, result_NS = torch.cat(found["base"]), torch.cat(found["result"])
    for name, losses_NS in (("base", base_NS), ("result", result_NS)):
        if not losses_NS.isfinite().all():
            raise ModelFolderError(
                f"the {name} of {base.path} computes a loss that is no number; its weights are damaged"
            )
    return Evaluation(tokens=torch.from_numpy(tokens_NS), base_losses=base_NS, result_losses=result_NS)


def layer_cosines(
    base: ModelFolder, tokens_NS: NDArray[numpy.int32], progress: Progress = lambda done, total: None
) -> tuple[float, ...]:
    """Return for each layer the cosine of its input and its output, on average over tokens.

    Yi's measure of how little a layer changes, arXiv 2403.04652, section 7.
    """
    model = StreamedModel(base.tensor, base.shape)
    step = _Counter(progress, tokens_NS[:, 1:].size * base.shape.num_layers)
    sums = [0.0] * base.shape.num_layers
    for inputs_NS, _ in _groups(tokens_NS, base.shape.hidden_size):
        x_NSH = model.embed(inputs_NS)
        for number in range(base.shape.num_layers):
            before_NSH = x_NSH.clone()
            model.run_layer(number, x_NSH)
            sums[number] += float(torch.cosine_similarity(before_NSH, x_NSH, dim=-1).double().sum())
            step(inputs_NS)
    return tuple(total / tokens_NS[:, 1:].size for total in sums)


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return what was recorded of a folder when it was written; None where nothing was.

    Raises:
        ModelFolderError: the file is missing, or not the one that was recorded.
    """
    lineage = read_lineage(folder)
    if lineage.get("evaluation") is None:
        return None
    path = folder / EVALUATION_FILE
    remedy = "copy it again, or up-scale again with --evaluate"
    if not path.is_file():
        raise ModelFolderError(f"{folder} should have {EVALUATION_FILE}, which its lineage names; {remedy}")
    if sha256_of(path) != lineage["result"]["files"][EVALUATION_FILE]:
        raise ModelFolderError(f"{path} is not the file that the lineage was written of; {remedy}")
    return Evaluation(**safetensors.torch.load_file(path))


def _groups(tokens_NS: NDArray[numpy.int32], hidden_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of as many sequences as may be held at once."""
    tokens = torch.from_numpy(tokens_NS)
    at_once = max(1, ACTIVATION_BYTES // ((tokens.shape[1] - 1) * hidden_size * 4))
    for group_NS in torch.split(tokens, at_once):
        yield group_NS[:, :-1], group_NS[:, 1:]


class _Counter:
    """Tells a progress after each layer."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, tokens_NS: Tensor) -> None:
        self._done += tokens_NS.numel()
        self._progress(self._done, self._total)
