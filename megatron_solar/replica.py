"""What one rank holds: its chunks of the model and its part of the optimizer, built and filled from a base."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_solar import compat
from megatron_solar.checkpoint import OwnedPiece, owned_pieces
from megatron_solar.frozen import frozen_parameters
from megatron_solar.model_folder import open_base
from megatron_solar.weight_files import require_finite
from megatron_solar.weights import (
    EMBEDDING,
    OUTPUT_LAYER,
    RandomWeights,
    WeightSource,
    canonical_key,
    hugging_face_names,
    rank_part,
    read_canonical,
    vocabulary_rows,
)
from orchestrator.errors import ModelFolderError
from orchestrator.model_shape import TransformerShape
from orchestrator.plan import TrainingPlan
from orchestrator.settings import RANDOM_BASE

PEAK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """What a rank holds: its chunks of the model and its part of the optimizer."""

    chunks: Sequence[Any]
    optimizer: Any
    pieces: Sequence[OwnedPiece]
    """What this rank saves and loads of both."""
    peak_tflops: float
    peak_source: str


def weight_source(plan: TrainingPlan) -> WeightSource:
    """Return the base named in the settings: new weights only where `random` was asked for.

    Raises:
        ModelFolderError: the folder is no model, or of another shape than the settings.
    """
    settings = plan.settings
    if settings.base == RANDOM_BASE:
        return RandomWeights(settings.model, settings.training.seed)
    return open_base(Path(settings.base), settings.model)


def build_replica(plan: TrainingPlan, source: WeightSource | None, *, is_filled_later: bool = False) -> Replica:
    """Build this rank's chunks and optimizer; collective.

    Args:
        source: of the first replica of the weights; the others have none.
        is_filled_later: whether the weights wait for a checkpoint.
    """
    settings, layout = plan.settings, plan.layout
    device = settings.cluster.device
    config = compat.transformer_config(settings.model, layout, settings.training, settings.precision, device)
    stages = range(layout.virtual_pipeline_parallel) if layout.virtual_pipeline_parallel > 1 else [None]
    offsets = [compat.layer_offset(config, stage) for stage in stages]
    chunks = []
    for index, stage in enumerate(stages):
        chunk = compat.build_chunk(settings.model, config, settings.data.sequence_length, device, stage)
        if device == "cuda":
            chunk.cuda(torch.cuda.current_device())
        if is_filled_later:
            clear_padding(chunk, settings.model, layout.tensor_parallel)
        else:
            fill(chunk, source, settings.model, offsets[index], layout.tensor_parallel)
        if settings.precision.dtype == "bf16":
            chunk.bfloat16()
        chunks.append(compat.wrap_data_parallel(config, chunk, index == 0, layout))
    optimizer = compat.build_optimizer(
        settings.training, settings.precision, chunks, frozen_parameters(settings, chunks, offsets)
    )
    compat.connect_schedule(config, chunks, optimizer, layout)
    peak = settings.cluster.peak_tflops
    return Replica(
        chunks=chunks,
        optimizer=optimizer,
        pieces=owned_pieces(settings.model, chunks, optimizer, offsets, layout.tensor_parallel),
        peak_tflops=peak if peak is not None else measured_peak_tflops(device),
        peak_source=f"{settings.cluster.gpu} dense bf16" if peak is not None else "a measured fp32 matrix product",
    )


def fill(
    chunk: torch.nn.Module,
    source: WeightSource | None,
    shape: TransformerShape,
    layer_offset: int,
    tensor_parallel: int,
) -> None:
    """Set every parameter of a chunk, this tensor-parallel rank's part of each; collective.

    The first replica reads the source, tensor after tensor, and gives it to the others.

    Raises:
        ModelFolderError: a tensor of another shape than the parameter, or with values that are no numbers.
    """
    for name, parameter in chunk.named_parameters():
        key = canonical_key(name, layer_offset, is_tied=shape.tie_embeddings)
        with torch.no_grad():
            if source is not None:
                part = rank_part(key, read_canonical(key, source), compat.tensor_rank(), tensor_parallel)
                if part.shape != parameter.shape:
                    raise ModelFolderError(
                        f"{key} should be {tuple(parameter.shape)} on this rank, found {tuple(part.shape)}"
                    )
                require_finite(" or ".join(hugging_face_names(key)), part)
                parameter.copy_(part)
            compat.broadcast_from_first_replica(parameter.data)


def clear_padding(chunk: torch.nn.Module, shape: TransformerShape, tensor_parallel: int) -> None:
    """Zero the rows that pad the vocabulary, which no checkpoint has."""
    rows = vocabulary_rows(shape.vocab_size, compat.tensor_rank(), tensor_parallel)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name in (EMBEDDING, OUTPUT_LAYER):
                parameter[rows:].zero_()


def measured_peak_tflops(device: str) -> float:
    """Return the best fp32 product of 512 x 512 matrices within half a second on this device, in TFLOP/s.

    Half a second, since other work on the machine slows most of them down.
    """
    size = 512
    matrix = torch.ones(size, size, device=device)
    best = math.inf
    deadline = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
