"""Which of a rank's parameters keep their bits over the first steps.

A frozen parameter's gradient is computed and reduced like any other, and dropped before norm, clipping and Adam:
neither its weight nor its moments change by a bit, weight decay included. Adam counts the steps of each parameter from
its thaw on, so that moments that begin at zero there are corrected as those of a first step. With one count for all,
the first update after a late thaw would be (1 - beta1) / sqrt(1 - beta2) times as large: 0.4 times with 0.9 and 0.95,
3.2 times with 0.9 and 0.999.

The backward pass through frozen layers is not left out, so that they save no time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_solar.weights import EMBEDDING, OUTPUT_LAYER, canonical_key
from orchestrator.freezing import EMBEDDINGS, FINAL_NORM, OUTPUT, frozen_steps, layer_part
from orchestrator.settings import RunSettings

_PARTS = {EMBEDDING: EMBEDDINGS, OUTPUT_LAYER: OUTPUT, "decoder.final_layernorm.weight": FINAL_NORM}


def frozen_parameters(
    settings: RunSettings, chunks: Sequence[Any], layer_offsets: Sequence[int]
) -> dict[torch.nn.Parameter, int]:
    """Return the parameters of a rank that are frozen, and for how many steps from the first one on.

    Args:
        chunks: of the model, wrapped for gradient reduction.
        layer_offsets: the model's number of the first layer of each chunk.
    """
    steps = frozen_steps(settings.training.frozen, settings.model)
    return {
        parameter: steps[part]
        for chunk, offset in zip(chunks, layer_offsets, strict=True)
        for name, parameter in chunk.module.named_parameters()
        if steps[part := part_of_key(canonical_key(name, offset, is_tied=settings.model.tie_embeddings))]
    }


def part_of_key(key: str) -> str:
    """Return the part of the model that a canonical key lies in."""
    return _PARTS[key] if key in _PARTS else layer_part(int(key.split(".")[2]))
