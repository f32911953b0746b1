"""Weights between Hugging Face's names and megatron's, in both directions and for one rank's part.

A canonical key is the one in a checkpoint: `decoder.layers.7.mlp.linear_fc1.weight`, with the
model's own layer number; norms are filed under the matrix that follows them, as Transformer Engine
names them. Layouts: QKV is interleaved by KV group as [q..., k, v], fc1 is gate then up, and rotary
needs no permutation (Llama in megatron-core; measured against `transformers` in the tests).
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_solar.model_folder import expected_tensors
from orchestrator.model_shape import TransformerShape

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of the weights by `training.precision`."""

# Canonical suffix of a layer -> Hugging Face's names in the order they are joined.
_LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_OTHER_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_SPLIT_ROWS = ("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")
_SPLIT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class WeightSource(Protocol):
    """Where weights come from: a Hugging Face folder, or new ones."""

    @property
    def shape(self) -> TransformerShape:
        """The model's shape."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its Hugging Face name."""


class RandomWeights:
    """New weights: normal with deviation 0.02, output projections 0.02/sqrt(2 L), norms one.

    Each tensor is drawn from the seed and its own name, so that the model is the same at every layout.
    """

    def __init__(self, shape: TransformerShape, seed: int) -> None:
        self._shape = shape
        self._seed = seed
        self._sizes = expected_tensors(shape)

    @property
    def shape(self) -> TransformerShape:
        """The model's shape."""
        return self._shape

    def tensor(self, name: str) -> Tensor:
        """Return a new tensor, always the same for a name."""
        size = self._sizes[name]
        if len(size) == 1:
            return torch.ones(size)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        deviation = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * self._shape.num_layers)
        return torch.empty(size).normal_(0.0, deviation, generator=generator)


def canonical_key(parameter: str, layer_offset: int) -> str:
    """Return the canonical key of a parameter of megatron's GPTModel, whichever layers it was built of."""
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return parameter
    suffix = match[2].replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    suffix = suffix.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return f"decoder.layers.{int(match[1]) + layer_offset}.{suffix}"


def canonical_keys(shape: TransformerShape) -> list[str]:
    """Return every key of a model, embedding first, then layer by layer."""
    keys = ["embedding.word_embeddings.weight"]
    keys += [f"decoder.layers.{layer}.{suffix}" for layer in range(shape.num_layers) for suffix in _LAYER_NAMES]
    keys.append("decoder.final_layernorm.weight")
    return keys if shape.tie_embeddings else [*keys, "output_layer.weight"]


def read_canonical(key: str, source: WeightSource) -> Tensor:
    """Return one whole tensor in megatron's form."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return source.tensor(_OTHER_NAMES[key])
    parts = [source.tensor(f"model.layers.{match[1]}.{name}") for name in _LAYER_NAMES[match[2]]]
    return _join_qkv(parts, source.shape) if len(parts) == 3 else torch.cat(parts) if len(parts) == 2 else parts[0]


def rank_part(key: str, whole: Tensor, tensor_rank: int, tensor_parallel: int) -> Tensor:
    """Return the part of a whole tensor that one tensor-parallel rank holds."""
    if tensor_parallel == 1:
        return whole
    if key.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tensor_parallel)[tensor_rank], up.chunk(tensor_parallel)[tensor_rank]])
    if key.endswith(_SPLIT_ROWS):
        return whole.chunk(tensor_parallel)[tensor_rank]
    if key.endswith(_SPLIT_COLUMNS):
        return whole.chunk(tensor_parallel, dim=1)[tensor_rank]
    return whole


def to_hugging_face(shape: TransformerShape, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor, reading one canonical tensor at a time.

    Args:
        read: returns the whole tensor of a canonical key.
    """
    for key in canonical_keys(shape):
        match = _LAYER.fullmatch(key)
        if match is None:
            yield _OTHER_NAMES[key], read(key)
            continue
        names = [f"model.layers.{match[1]}.{name}" for name in _LAYER_NAMES[match[2]]]
        whole = read(key)
        parts = _split_qkv(whole, shape) if len(names) == 3 else list(whole.chunk(len(names)))
        for name, part in zip(names, parts, strict=True):
            yield name, part.contiguous()


def _join_qkv(parts: list[Tensor], shape: TransformerShape) -> Tensor:
    groups = shape.num_query_groups
    grouped = [part.reshape(groups, -1, shape.hidden_size) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, shape.hidden_size)


def _split_qkv(whole: Tensor, shape: TransformerShape) -> list[Tensor]:
    groups, head = shape.num_query_groups, shape.head_size
    grouped = whole.reshape(groups, -1, shape.hidden_size)
    queries = shape.num_attention_heads // groups * head
    return [part.reshape(-1, shape.hidden_size) for part in torch.split(grouped, [queries, head, head], dim=1)]
