"""Rotary frequencies as `transformers` computes them, for each type of scaling that is covered.

`linear`: arXiv 2306.15595. `llama3`: transformers' `_compute_llama3_parameters`, which Meta published with
Llama 3.1. Same operations in the same order, so that the numbers are the same to the last bit.
"""

import math

import torch
from torch import Tensor

from orchestrator.model_shape import RopeScaling, TransformerShape


def inverse_frequencies(shape: TransformerShape) -> Tensor:
    """Return the angle that each pair of a head's dims turns by from one position to the next, in radians, fp32."""
    pairs = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    frequencies = 1.0 / (shape.rope_theta**pairs)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    return frequencies / scaling.factor if scaling.rope_type == "linear" else _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, frequencies)
    blend = (context / wavelengths - low) / (high - low)
    blended = (1 - blend) * scaled / scaling.factor + blend * scaled
    is_between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(is_between, blended, scaled)
