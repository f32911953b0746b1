"""Weights between Hugging Face's names and megatron's, in both directions and for one rank's part.

A canonical key is the one in a checkpoint: `decoder.layers.7.mlp.linear_fc1.weight`, with the
model's own layer number; norms are filed under the matrix that follows them, as Transformer Engine
names them. Layouts: QKV is interleaved by KV group as [q..., k, v], fc1 is gate then up, and rotary
needs no permutation (Llama in megatron-core; measured against `transformers` in the tests).

Megatron's embedding and output layer may have more rows than the vocabulary, so that tensor-parallel ranks
have equally many. Canonical tensors never have them: those rows are zero on a rank, their logits take no
part in the loss (`compat.build_chunk`), and so they stay zero.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_solar.model_folder import expected_tensors
from orchestrator.model_shape import TransformerShape

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of the weights by `precision.dtype`."""

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
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
_OTHER_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
}
_VOCABULARY_ROWS = (EMBEDDING, OUTPUT_LAYER)
_SPLIT_ROWS = ("linear_qkv.weight", *_VOCABULARY_ROWS)
ROWS_UNIT = 8
"""A rank's rows of the vocabulary are a multiple: 16 bytes in bf16, without which tensor cores are slow
(NVIDIA, Matrix Multiplication Background User's Guide)."""
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


def canonical_key(parameter: str, layer_offset: int, *, is_tied: bool) -> str:
    """Return the canonical key of a parameter of megatron's GPTModel, whichever layers it was built of.

    Args:
        is_tied: whether the output layer is the embedding, of which the last pipeline stage has a copy.
    """
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return EMBEDDING if is_tied and parameter == OUTPUT_LAYER else parameter
    suffix = match[2].replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    suffix = suffix.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return f"decoder.layers.{int(match[1]) + layer_offset}.{suffix}"


def canonical_keys(shape: TransformerShape) -> list[str]:
    """Return every key of a model, embedding first, then layer by layer."""
    keys = [EMBEDDING]
    keys += [f"decoder.layers.{layer}.{suffix}" for layer in range(shape.num_layers) for suffix in _LAYER_NAMES]
    keys.append("decoder.final_layernorm.weight")
    return keys if shape.tie_embeddings else [*keys, OUTPUT_LAYER]


def read_canonical(key: str, source: WeightSource) -> Tensor:
    """Return one whole tensor in megatron's form."""
    parts = [source.tensor(name) for name in hugging_face_names(key)]
    return _join_qkv(parts, source.shape) if len(parts) == 3 else torch.cat(parts) if len(parts) == 2 else parts[0]


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the rows of megatron's embedding over all tensor-parallel ranks."""
    unit = ROWS_UNIT * tensor_parallel
    return -(-vocab_size // unit) * unit


def vocabulary_rows(vocab_size: int, tensor_rank: int, tensor_parallel: int) -> int:
    """Return how many of a rank's rows of the vocabulary are no padding; they come first."""
    share = padded_vocab_size(vocab_size, tensor_parallel) // tensor_parallel
    return min(max(vocab_size - tensor_rank * share, 0), share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of the whole tensor that a rank holds one after another."""

    first: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartOfTensor:
    """Which part of a whole tensor a tensor-parallel rank holds: blocks of rows, and columns from one on."""

    whole_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the part: its blocks under each other, then rows of padding."""
    blocks: tuple[Block, ...]
    first_column: int = 0
    is_replicated: bool = False
    """Whether every tensor-parallel rank holds all of it."""


def part_of_tensor(key: str, whole_shape: Sequence[int], tensor_rank: int, tensor_parallel: int) -> PartOfTensor:
    """Return where one tensor-parallel rank's part of a canonical tensor lies."""
    whole = tuple(whole_shape)
    rows = whole[0]
    if key.endswith("linear_fc1.weight"):  # gate above up, each split
        half, share = rows // 2, rows // 2 // tensor_parallel
        blocks = (Block(first=tensor_rank * share, count=share), Block(first=half + tensor_rank * share, count=share))
        return PartOfTensor(whole_shape=whole, shape=(2 * share, *whole[1:]), blocks=blocks)
    if key.endswith(_SPLIT_ROWS):
        is_padded = key.endswith(_VOCABULARY_ROWS)
        share = (padded_vocab_size(rows, tensor_parallel) if is_padded else rows) // tensor_parallel
        count = vocabulary_rows(rows, tensor_rank, tensor_parallel) if is_padded else share
        block = Block(first=tensor_rank * share, count=count)
        return PartOfTensor(whole_shape=whole, shape=(share, *whole[1:]), blocks=(block,))
    every_row = (Block(first=0, count=rows),)
    if key.endswith(_SPLIT_COLUMNS):
        share = whole[1] // tensor_parallel
        return PartOfTensor(whole_shape=whole, shape=(rows, share), blocks=every_row, first_column=tensor_rank * share)
    return PartOfTensor(whole_shape=whole, shape=whole, blocks=every_row, is_replicated=True)


def hugging_face_names(key: str) -> list[str]:
    """Return the Hugging Face tensors that make a canonical one, in the order in which they are joined."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return [_OTHER_NAMES[key]]
    return [f"model.layers.{match[1]}.{name}" for name in _LAYER_NAMES[match[2]]]


def canonical_shape(key: str, shape: TransformerShape) -> tuple[int, ...]:
    """Return the size of a whole canonical tensor."""
    sizes = expected_tensors(shape)
    parts = [sizes[name] for name in hugging_face_names(key)]
    return (sum(part[0] for part in parts), *parts[0][1:])


def rank_part(key: str, whole: Tensor, tensor_rank: int, tensor_parallel: int) -> Tensor:
    """Return the part of a whole tensor that one tensor-parallel rank holds; rows of padding are zero."""
    part = part_of_tensor(key, whole.shape, tensor_rank, tensor_parallel)
    if part.is_replicated:
        return whole
    blocks = [whole[block.first : block.first + block.count] for block in part.blocks]
    padding = part.shape[0] - sum(block.count for block in part.blocks)
    if padding:
        blocks.append(whole.new_zeros(padding, *whole.shape[1:]))
    rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return rows[:, part.first_column : part.first_column + part.shape[1]]


def to_hugging_face(shape: TransformerShape, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor, reading one canonical tensor at a time.

    Args:
        read: returns the whole tensor of a canonical key.
    """
    for key in canonical_keys(shape):
        names = hugging_face_names(key)
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
