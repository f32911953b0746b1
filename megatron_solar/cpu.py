"""Let megatron-core 0.16.1 run on a machine without CUDA: a small substitute for the calls it makes anyway.

Used only by CPU workers, as one context manager, entered before megatron is imported. Each patch
names the call and why it is reached; `tests/test_cpu_shim.py` takes them away one at a time and
says when one is no longer needed.
"""

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced attribute."""

    name: str
    owner: Any
    attribute: str
    replacement: Callable[[Any], Any]
    """Takes the original, returns what stands in its place."""
    reason: str


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **options: Any) -> Any:
        if str(options.get("device", "cpu")).startswith("cuda"):
            options["device"] = "cpu"
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return create


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        named = original(tensor, *args, **options)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    return tensor_type


def _one_group_per_list(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same group for the same list of ranks: gloo's cost threads and start-up time."""
    known: dict[tuple[int, ...], Any] = {}

    def create(ranks: list[int] | None = None, *args: Any, **options: Any) -> Any:
        key = tuple(ranks) if ranks is not None else tuple(range(torch.distributed.get_world_size()))
        if key not in known:
            known[key] = new_group(ranks, *args, **options)
        return known[key]

    return create


def _uncompiled(_: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile as a decorator that changes nothing."""

    def keep(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function if function is not None else lambda given: given

    return keep


PATCHES = (
    Patch(
        name="current_device",
        owner=torch.cuda,
        attribute="current_device",
        replacement=lambda _: lambda: torch.device("cpu"),
        reason="device of buffers and of tensors received from other ranks",
    ),
    Patch(
        name="synchronize",
        owner=torch.cuda,
        attribute="synchronize",
        replacement=lambda _: lambda *args: None,
        reason="pipeline communication and checkpoint writing wait for the device",
    ),
    *(
        Patch(
            name=name,
            owner=owner,
            attribute="get_rng_state",
            replacement=lambda _: lambda *args, **options: torch.get_rng_state(),
            reason="the tensor-parallel random tracker keeps a state for each name",
        )
        for name, owner in (("random_state", torch.cuda), ("random_module_state", torch.cuda.random))
    ),
    Patch(
        name="default_generators",
        owner=torch.cuda,
        attribute="default_generators",
        replacement=lambda _: types.MappingProxyType({torch.device("cpu"): torch.default_generator}),
        reason="the random tracker sets the state of the device's generator",
    ),
    Patch(
        name="lazy_call",
        owner=torch.cuda,
        attribute="_lazy_call",
        replacement=lambda _: lambda call, **options: call(),
        reason="random states wait for CUDA in a queue that would grow with every layer of every step",
    ),
    Patch(
        name="tensor_cuda",
        owner=torch.Tensor,
        attribute="cuda",
        replacement=lambda _: lambda tensor, *args, **options: tensor,
        reason="the last pipeline stage's copy of a tied embedding is moved to the device",
    ),
    Patch(
        name="tensor_type",
        owner=torch.Tensor,
        attribute="type",
        replacement=_type_as_on_cuda,
        reason="the distributed optimizer and clipping accept torch.cuda.FloatTensor by name only",
    ),
    *(
        Patch(
            name=f"factory_{name}",
            owner=torch,
            attribute=name,
            replacement=_on_cpu,
            reason='factories called with device="cuda", and with memory pinned for a device',
        )
        for name in ("tensor", "zeros", "ones")
    ),
    Patch(
        name="one_group_per_list",
        owner=torch.distributed,
        attribute="new_group",
        replacement=_one_group_per_list,
        reason="not needed, but 193 gloo groups at 32 ranks become 7",
    ),
    Patch(
        name="compile",
        owner=torch,
        attribute="compile",
        replacement=_uncompiled,
        reason="not needed, but megatron's decorators import inductor: 3 of the 7 s that a rank takes to start",
    ),
)


@contextlib.contextmanager
def _without_transformer_engine() -> Iterator[None]:
    """Have no import find Transformer Engine: megatron takes its kernels for norms and Adam, which are CUDA's alone.

    Where a site has it and no driver, or half of it, the import itself or the first step of a CPU rank would fail.
    """
    name = "transformer_engine"
    is_hidden = name not in sys.modules
    if is_hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it is an ImportError then
    try:
        yield
    finally:
        if is_hidden:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def cuda_calls_on_cpu(without: str | None = None) -> Iterator[None]:
    """Replace the calls of `PATCHES` while the block runs, and hide Transformer Engine.

    Args:
        without: name of a patch to leave out, for the test that asks whether it is still needed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_transformer_engine())
        for patch in PATCHES:
            if patch.name == without:
                continue
            original = getattr(patch.owner, patch.attribute)
            setattr(patch.owner, patch.attribute, patch.replacement(original))
            stack.callback(setattr, patch.owner, patch.attribute, original)
        yield
