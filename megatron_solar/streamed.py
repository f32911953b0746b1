"""A Llama's forward pass with one layer's weights in memory at a time, in fp32, by plain functions of torch.

It shares no line with megatron-core, so that the one is a check of the other. What stays in memory is the hidden state
of all sequences, a matrix or two of weights, and what one sequence needs within a layer; weights are read when they
are used and forgotten.

Shapes: N sequences, S tokens, H hidden, D of a head.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from orchestrator.model_shape import RopeScaling, TransformerShape

VOCABULARY_ROWS = 8192  # of the output layer at once


class StreamedModel:
    """Computes layer by layer from weights that are read by their Hugging Face name.

    Args:
        read: returns a tensor by its name; it may be mapped from a file.
    """

    def __init__(self, read: Callable[[str], Tensor], shape: TransformerShape) -> None:
        self._read = read
        self._shape = shape
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def embed(self, tokens_NS: Tensor) -> Tensor:
        """Return the hidden state [N, S, H] before the first layer."""
        rows = self._read("model.embed_tokens.weight")
        return rows[tokens_NS.long()].to(self._device).float()

    def run_layer(self, number: int, x_NSH: Tensor) -> None:
        """Bring the hidden state through a layer, in place."""
        prefix = f"model.layers.{number}."
        self._attend(prefix, x_NSH)
        self._feed_forward(prefix, x_NSH)

    def losses(self, x_NSH: Tensor, labels_NS: Tensor) -> Tensor:
        """Return the loss of each prediction [N, S] on the CPU, in nats; the hidden state is used up.

        The vocabulary is gone through in blocks: a loss is the logarithm of the sum over all, less the label's logit.
        """
        labels_NS = labels_NS.long().to(self._device)
        norm = self._weight("model.norm.weight")
        for x_SH in x_NSH:
            x_SH.copy_(self._normed(x_SH, norm))
        matrix = self._read("model.embed_tokens.weight" if self._shape.tie_embeddings else "lm_head.weight")
        total_NS = torch.full(labels_NS.shape, -math.inf, device=self._device)
        picked_NS = torch.zeros(labels_NS.shape, device=self._device)
        for first in range(0, len(matrix), VOCABULARY_ROWS):
            rows = matrix[first : first + VOCABULARY_ROWS].to(self._device).float()
            for x_SH, labels_S, total_S, picked_S in zip(x_NSH, labels_NS, total_NS, picked_NS, strict=True):
                logits_SV = x_SH @ rows.T
                total_S.copy_(torch.logaddexp(total_S, logits_SV.logsumexp(-1)))
                here = torch.nonzero((labels_S >= first) & (labels_S < first + len(rows)))[:, 0]
                picked_S[here] = logits_SV[here, labels_S[here] - first]
        return (total_NS - picked_NS).cpu()

    def _weight(self, name: str) -> Tensor:
        return self._read(name).to(self._device).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._shape.rms_norm_eps)

    def _attend(self, prefix: str, x_NSH: Tensor) -> None:
        shape = self._shape
        norm = self._weight(f"{prefix}input_layernorm.weight")
        query, key, value, output = (
            self._weight(f"{prefix}self_attn.{name}_proj.weight") for name in ("q", "k", "v", "o")
        )
        cosine_SD, sine_SD = self._rotation(x_NSH.shape[1])
        shared = shape.num_attention_heads // shape.num_query_groups  # query heads of a key head

        def heads(y_SH: Tensor, matrix: Tensor) -> Tensor:
            return (y_SH @ matrix.T).view(len(y_SH), -1, shape.head_size).transpose(0, 1)

        for x_SH in x_NSH:
            y_SH = self._normed(x_SH, norm)
            q_ASD, k_GSD, v_GSD = (heads(y_SH, matrix) for matrix in (query, key, value))
            q_ASD, k_GSD = (part * cosine_SD + _turned(part) * sine_SD for part in (q_ASD, k_GSD))
            k_ASD, v_ASD = (part.repeat_interleave(shared, dim=0) for part in (k_GSD, v_GSD))
            seen_ASD = scaled_dot_product_attention(q_ASD[None], k_ASD[None], v_ASD[None], is_causal=True)[0]
            x_SH += seen_ASD.transpose(0, 1).flatten(1) @ output.T

    def _feed_forward(self, prefix: str, x_NSH: Tensor) -> None:
        norm = self._weight(f"{prefix}post_attention_layernorm.weight")
        gate, up, down = (self._weight(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        for x_SH in x_NSH:
            y_SH = self._normed(x_SH, norm)
            x_SH += (silu(y_SH @ gate.T) * (y_SH @ up.T)) @ down.T

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [S, D] of the angles of each position, both halves of a head alike."""
        angles_SD = torch.outer(torch.arange(length).float(), _frequencies(self._shape)).repeat(1, 2)
        return angles_SD.cos().to(self._device), angles_SD.sin().to(self._device)


def _turned(x: Tensor) -> Tensor:
    """Return (-second half, first half): the pairs of rotary positions lie half a head apart."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _frequencies(shape: TransformerShape) -> Tensor:
    """Return the rotary frequencies of half a head, stretched where the shape says so."""
    exponents = torch.arange(0, shape.head_size, 2).float() / shape.head_size
    plain = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    return plain / scaling.factor if scaling.rope_type == "linear" else _as_llama3(plain, scaling)


def _as_llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Return Llama 3.1's: short wavelengths as they are, long ones stretched, those between blended."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * share + plain / scaling.factor * (1 - share)
