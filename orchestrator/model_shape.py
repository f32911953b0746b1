"""The shape of a Llama-like decoder: what it counts and what a token costs.

SOLAR 10.7B (arXiv 2312.15166): 48 layers, 10,731,524,096 parameters.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context, in Hugging Face's words.

    `linear` divides every frequency by `factor`. `llama3` leaves wavelengths below
    original_max_position_embeddings / high_freq_factor alone, divides those above
    original_max_position_embeddings / low_freq_factor, and blends between; `linear` has no use for these three.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def problems(self) -> list[str]:
        """Return what cannot be."""
        found = [
            f"model.rope_scaling.{name} should be above 0, found {value}"
            for name, value in dataclasses.asdict(self).items()
            if not isinstance(value, str) and not 0 < value < math.inf
        ]
        if self.low_freq_factor >= self.high_freq_factor:
            found.append(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor:g} should be below "
                f"high_freq_factor={self.high_freq_factor:g}"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Sizes of a decoder with RMSNorm, rotary positions, grouped attention and SwiGLU.

    `vocab_size` is that of the tokenizer, before any padding for tensor parallelism. `head_dim` is None where a
    head is as wide as hidden_size / num_attention_heads.
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
    head_dim: int | None = None
    rope_scaling: RopeScaling | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

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
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                found.append(f"model.{field.name} should be above 0, found {value}")
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems()
        if found:
            return found
        if self.head_dim is not None and self.head_dim % 2:
            found.append(
                f"model.head_dim={self.head_dim} should be even, which rotary positions need; "
                f"{choose('head_dim', [n for n in (self.head_dim - 1, self.head_dim + 1) if n > 0], self.head_dim)}"
            )
        elif self.head_dim is None and (self.hidden_size % self.num_attention_heads or self.head_size % 2):
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


def multiples_near(unit: int, wanted: int) -> list[int]:
    """Return the multiples of a unit on both sides of a number that is none, those above 0."""
    lower = wanted // unit * unit
    return [size for size in (lower, lower + unit) if size > 0]


def choose(name: str, sizes: Iterable[int], wanted: int) -> str:
    """Say which sizes lie nearest to the wanted one: 'use tensor_parallel 2, 4 or 8'."""
    near = sorted(sorted(sizes, key=lambda n: (abs(n - wanted), n))[:4])
    if not near:
        return f"no {name} would do"
    return f"use {name} " + (f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if len(near) > 1 else str(near[0]))
