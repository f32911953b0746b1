"""What Transformer Engine keeps of FP8 in a rank's modules, and how a forward pass is computed without it.

Read in megatron-core 0.16.1 and Transformer Engine 2.11.0, and never run on a GPU. megatron's block of layers asks
`config.fp8` in each forward pass whether to open Transformer Engine's autocast, and a linear asks the autocast; so
`config.fp8 = None` is a pass in the weights' own numbers, in which no quantizer is touched. The next FP8 pass finds
each linear's histories and quantizers as they were (`set_meta_tensor` keeps the state of the same recipe), and casts
the weights anew, since megatron marks the first micro-batch of each schedule while `config.fp8` is set.
`fp8_autocast(enabled=False)` around the schedule would do nothing: megatron opens its own inside.

An FP8 pass without gradients does not update scales (`autocast_exit` asks `torch.is_grad_enabled`), but with delayed
scaling each quantizer has already put its largest value into the first row of its history, which the next update
counts: what is not training puts the histories back. The other recipes keep nothing from one pass to the next.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

STATES = ("scaling_fwd", "scaling_bwd")
"""Keys of a module's `fp8_meta`."""
Scales = list[tuple[Tensor, Tensor]]
"""Histories of largest values and scales, each with a copy."""


def layers_of(chunks: Sequence[Any]) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yield the layers of a rank's chunks with their numbers in the model, from 0 as in a Hugging Face folder."""
    for chunk in chunks:
        for layer in chunk.module.decoder.layers:
            yield layer.layer_number - 1, layer


@contextlib.contextmanager
def without_fp8(chunks: Sequence[Any]) -> Iterator[None]:
    """Compute forward passes within in the weights' own numbers; nothing changes where FP8 is off anyway."""
    configs = {id(config): config for chunk in chunks for config in map(_config, chunk.modules()) if config is not None}
    before = [(config, config.fp8) for config in configs.values()]
    for config, _ in before:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


def scales_of(chunks: Sequence[Any]) -> Scales:
    """Return what delayed scaling goes on with after this moment; of other recipes nothing."""
    return [(live, live.clone()) for live in _scales(chunks)]


def put_back(scales: Scales) -> None:
    """Have delayed scaling go on as from then; in place, since quantizers hold views."""
    with torch.no_grad():
        for live, before in scales:
            live.copy_(before)


@contextlib.contextmanager
def kept_scales(chunks: Sequence[Any]) -> Iterator[None]:
    """Have what is computed within change nothing that delayed scaling goes on with."""
    scales = scales_of(chunks)
    try:
        yield
    finally:
        put_back(scales)


def _config(module: torch.nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "fp8", None) is not None else None


def _scales(chunks: Sequence[Any]) -> Iterator[Tensor]:
    for chunk in chunks:
        for module in chunk.modules():
            meta = getattr(module, "fp8_meta", {})
            states = [meta[key] for key in STATES if key in meta]
            for held in (getattr(state, name, None) for state in states for name in ("amax_history", "scale")):
                if isinstance(held, Tensor):
                    yield held
