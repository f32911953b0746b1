"""A Llama by Hugging Face's names in plain torch, and its training, for depth_recovery.py.

On one core with hidden size 64 it trains about as fast as its matrix products and attention let it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from orchestrator.model_shape import TransformerShape

SHAPE = TransformerShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=1024,
    max_position_embeddings=128,
)
SEQUENCE_LENGTH = 128
BATCH = 4
BATCH_TOKENS = BATCH * SEQUENCE_LENGTH
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of matrices, not of norms
CLIP_NORM = 1.0
EVALUATED = 96  # held-out sequences of each kind

Parameters = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Held-out loss at one moment of a run, nats a token, by kind of text.

    Attributes:
        tokens: trained on in this run.
        flops: spent in this run, forward and backward.
    """

    tokens: int
    flops: float
    losses: Mapping[str, float]


def logits(parameters: Parameters, shape: TransformerShape, ids: Tensor) -> Tensor:
    """Return what a batch of sequences predicts, [sequences, positions, vocabulary]."""
    rotations = _rotations(shape, ids.shape[1])
    hidden = functional.embedding(ids, parameters["model.embed_tokens.weight"])
    for number in range(shape.num_layers):
        hidden = _layer(parameters, f"model.layers.{number}.", shape, hidden, rotations)
    hidden = _norm(hidden, parameters["model.norm.weight"], shape)
    return functional.linear(hidden, parameters["lm_head.weight"])


def held_out_loss(parameters: Parameters, shape: TransformerShape, sequences: Tensor) -> float:
    """Return the mean loss over sequences of one token more than the model sees, nats a token."""
    with torch.inference_mode():
        sums = [float(_loss(parameters, shape, part)) * len(part) for part in torch.split(sequences, 32)]
    return sum(sums) / len(sequences)


def train(
    parameters: Parameters,
    shape: TransformerShape,
    batches: Iterator[Tensor],
    *,
    steps: int,
    rate: Callable[[int], float],
    layers: Set[int] | None,
    evaluate_after: Set[int],
    held_out: Mapping[str, Tensor],
) -> list[Point]:
    """Train in place and return the held-out losses after the steps asked for.

    Args:
        rate: learning rate of a step; the first is 0.
        layers: those that are trained, and nothing else is; everything where it is None.
        held_out: sequences by kind of text.
    """
    trained = {name: value for name, value in parameters.items() if layers is None or _layer_number(name) in layers}
    for value in trained.values():
        value.requires_grad_()
    groups = [
        {"params": [value for value in trained.values() if value.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [value for value in trained.values() if value.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
    step_flops = flops_per_token(shape, layers) * BATCH_TOKENS
    points = []
    for step in range(steps + 1):
        if step in evaluate_after:
            losses = {kind: held_out_loss(parameters, shape, sequences) for kind, sequences in held_out.items()}
            points.append(Point(tokens=step * BATCH_TOKENS, flops=step * step_flops, losses=losses))
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        _loss(parameters, shape, next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP_NORM, error_if_nonfinite=True)
        optimizer.step()
    return points


def flops_per_token(shape: TransformerShape, layers: Set[int] | None) -> float:
    """Return floating-point operations a token, forward and backward, attention's causal half counted.

    Where only some layers are trained, gradients run down to the lowest of them, and only their weights get one.
    """
    matrices = shape.layer_parameters() - 2 * shape.hidden_size
    scores = shape.query_size * SEQUENCE_LENGTH
    output = shape.vocab_size * shape.hidden_size
    forward = 2 * (shape.num_layers * (matrices + scores) + output)
    if layers is None:
        return 3 * forward
    reached = shape.num_layers - min(layers)
    return forward + 2 * output + reached * (2 * matrices + 4 * scores) + len(layers) * 2 * matrices


def sequences_of(ids: NDArray[numpy.uint16]) -> Tensor:
    """Cut ids into sequences, each with the token that follows it."""
    count = (len(ids) - 1) // SEQUENCE_LENGTH
    starts = numpy.arange(count)[:, None] * SEQUENCE_LENGTH + numpy.arange(SEQUENCE_LENGTH + 1)
    return torch.from_numpy(ids[starts].astype(numpy.int64))


def spread(sequences: Tensor, count: int) -> Tensor:
    """Return so many of the sequences, evenly spread over all."""
    return sequences[torch.linspace(0, len(sequences) - 1, count).round().long()]


def _loss(parameters: Parameters, shape: TransformerShape, sequences: Tensor) -> Tensor:
    predicted = logits(parameters, shape, sequences[:, :-1])
    return functional.cross_entropy(predicted.flatten(0, 1), sequences[:, 1:].flatten())


def _layer(
    parameters: Parameters, prefix: str, shape: TransformerShape, x: Tensor, rotations: tuple[Tensor, Tensor]
) -> Tensor:
    def project(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, parameters[f"{prefix}{name}.weight"])

    def heads(value: Tensor) -> Tensor:
        return value.view(*value.shape[:2], -1, shape.head_size).transpose(1, 2)

    normed = _norm(x, parameters[f"{prefix}input_layernorm.weight"], shape)
    query, key, value = (heads(project(f"self_attn.{name}_proj", normed)) for name in "qkv")
    copies = shape.num_attention_heads // shape.num_query_groups
    attended = functional.scaled_dot_product_attention(
        _rotate(query, rotations),
        _rotate(key, rotations).repeat_interleave(copies, 1),
        value.repeat_interleave(copies, 1),
        is_causal=True,
    )
    x = x + project("self_attn.o_proj", attended.transpose(1, 2).flatten(2))
    normed = _norm(x, parameters[f"{prefix}post_attention_layernorm.weight"], shape)
    gated = functional.silu(project("mlp.gate_proj", normed)) * project("mlp.up_proj", normed)
    return x + project("mlp.down_proj", gated)


def _norm(x: Tensor, weight: Tensor, shape: TransformerShape) -> Tensor:
    return functional.rms_norm(x, (shape.hidden_size,), weight, shape.rms_norm_eps)


def _rotations(shape: TransformerShape, length: int) -> tuple[Tensor, Tensor]:
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotations
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _layer_number(name: str) -> int:
    """Return the layer that a parameter belongs to, -1 where it is none's."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
