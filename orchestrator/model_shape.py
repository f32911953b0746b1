"""The shape of a Llama-like decoder: what it counts and what a token costs.

SOLAR 10.7B (arXiv 2312.15166): 48 layers, 10,731,524,096 parameters.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Sizes of a decoder with RMSNorm, rotary positions, grouped attention and SwiGLU.

    `vocab_size` is that of the tokenizer, before any padding for tensor parallelism.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Width of all key heads together, which is that of the value heads."""
        return self.num_query_groups * self.head_size

    def layer_parameters(self) -> int:
        """Count one layer: attention, SwiGLU and its two norms."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size

    def parameters(self) -> int:
        """Count all parameters, embedding and output layer included, without padding."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self.layer_parameters() + embeddings + self.hidden_size

    def flops_per_token(
        self, sequence_length: int, attention: Literal["causal_half", "full_s2"] = "causal_half"
    ) -> float:
        """Return floating-point operations a token, forward and backward, without recomputation.

        6 x matrix parameters (output layer included, embedding look-up not) plus attention scores:
        6*L*q*s a token where only the causal half is counted, 12*L*q*s where all of it is.
        """
        matrices = self.num_layers * (self.layer_parameters() - 2 * self.hidden_size)
        matrices += self.vocab_size * self.hidden_size
        scores = 6 if attention == "causal_half" else 12
        return 6.0 * matrices + scores * self.num_layers * self.query_size * sequence_length

    def problems(self) -> list[str]:
        """Return what cannot be, each with what could."""
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and value <= 0:
                found.append(f"model.{field.name} should be above 0, found {value}")
        if found:
            return found
        if self.hidden_size % self.num_attention_heads or self.head_size % 2:
            groups, unit = self.num_query_groups, 2 * self.num_attention_heads
            heads = [n for n in divisors(self.hidden_size) if self.hidden_size // n % 2 == 0 and n % groups == 0]
            lower = self.hidden_size // unit * unit
            widths = [n for n in (lower, lower + unit) if n > 0]
            found.append(
                f"model.hidden_size={self.hidden_size} cannot be split over num_attention_heads="
                f"{self.num_attention_heads} into heads of even size, which rotary positions need; "
                + (
                    choose("num_attention_heads", heads, self.num_attention_heads)
                    if heads
                    else choose("hidden_size", widths, self.hidden_size)
                )
            )
        if self.num_attention_heads % self.num_query_groups:
            remedy = choose("num_query_groups", divisors(self.num_attention_heads), self.num_query_groups)
            found.append(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_query_groups={self.num_query_groups}; {remedy}"
            )
        return found


def divisors(total: int) -> list[int]:
    """Return the divisors of a number above 0, the smallest first."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    return sorted({*small, *(total // n for n in small)})


def choose(name: str, sizes: Iterable[int], wanted: int) -> str:
    """Say which sizes lie nearest to the wanted one: 'use tensor_parallel 2, 4 or 8'."""
    near = sorted(sorted(sizes, key=lambda n: (abs(n - wanted), n))[:4])
    if not near:
        return f"no {name} would do"
    return f"use {name} " + (f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if len(near) > 1 else str(near[0]))
