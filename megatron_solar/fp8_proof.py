"""The proof that FP8 runs: what each linear part of a rank's layers keeps of its last forward pass, looked at once.

megatron-core takes `fp8=hybrid` without a word where Transformer Engine is not there, and trains in bf16. So after the
first applied step of an attempt every rank looks at its own modules, and where one rank misses anything the run stops
on all of them. A linear of Transformer Engine that has run in FP8 keeps (read in 2.11.0, `module/base.py` and
`quantization.py`; never run on a GPU): `fp8` and `fp8_initialized`, the recipe of the autocast it was in, quantizers
made for it, an FP8 copy of its weight in `_fp8_workspaces`, and with delayed scaling histories of largest values.

Of these histories that of the input is above zero and finite once something was cast. Those of weight and gradient may
be zero: in layers that up-scaling zeroed they are, before their first steps.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar.fp8_state import STATES, layers_of
from megatron_solar.replica import Replica
from megatron_solar.stacks import waits_for_others
from orchestrator.errors import PrecisionError
from orchestrator.events import Fp8ProofEvent
from orchestrator.plan import TrainingPlan
from orchestrator.settings import PrecisionSettings

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""The linear parts of a layer, by megatron-core's names."""
RECIPES = {
    "tensorwise": "float8_current_scaling",
    "delayed": "delayed",
    "blockwise": "float8_block_scaling",
    "mxfp8": "mxfp8",
}
"""What Transformer Engine's recipe answers true to."""
INPUT = 0
"""Column of a linear's input in its forward history, Transformer Engine's `FP8FwdTensors.GEMM1_INPUT`."""
SHOWN_OF_A_RANK = 3
SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What one rank found in its layers."""

    fp8_linears: int = 0
    bf16_linears: int = 0
    """That should not run in FP8 and did not."""
    missing: int = 0
    """Linears that were not as they should be."""
    recipes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Of the first of these, what was wanted and what was found."""


def prove_fp8(
    plan: TrainingPlan, replica: Replica, hosts: Sequence[str], tell: Callable[[Fp8ProofEvent], None], step: int
) -> None:
    """Show on every rank that the last forward pass ran in FP8 where it should; collective.

    Args:
        hosts: of all ranks, in their order.

    Raises:
        PrecisionError: it did not on some rank; on all of them, with rank, module, what was wanted and found.
    """
    precision = plan.settings.precision
    if precision.fp8 == "none":
        return
    started = time.monotonic()
    own = look(layers_of(replica.chunks), precision, plan.settings.model.num_layers)
    everyone = _gather(own, plan.layout.world_size)
    wrong = [rank for rank, found in enumerate(everyone) if found.missing]
    if wrong:
        raise _refusal(precision, everyone, wrong, hosts)
    tell(
        Fp8ProofEvent(
            time=time.time(),
            step=step,
            precision=precision.label,
            recipes=tuple(sorted({recipe for found in everyone for recipe in found.recipes})),
            fp8_linears=sum(found.fp8_linears for found in everyone),
            bf16_linears=sum(found.bf16_linears for found in everyone),
            ranks=len(everyone),
            seconds=time.monotonic() - started,
        )
    )


def look(layers: Iterable[tuple[int, torch.nn.Module]], precision: PrecisionSettings, num_layers: int) -> Findings:
    """Return what the linear parts of some layers keep of their last forward pass.

    Args:
        layers: with their numbers in the model, from 0.
        num_layers: of the whole model.
    """
    in_fp8 = range(precision.first_bf16_layers, num_layers - precision.last_bf16_layers)
    counts: collections.Counter[str] = collections.Counter()
    recipes: set[str] = set()
    problems: list[str] = []
    for number, layer in layers:
        for name in LINEARS:
            module = layer.get_submodule(name)
            is_wanted = number in in_fp8
            found = list(_missing(module, precision) if is_wanted else _too_much(module))
            problems += [f"layer {number}, {name}: {problem}" for problem in found]
            counts["missing" if found else "fp8" if is_wanted else "bf16"] += 1
            if is_wanted and not found:
                recipes.add(_recipe_name(module.fp8_meta["recipe"]))  # type: ignore[index]
    return Findings(
        fp8_linears=counts["fp8"],
        bf16_linears=counts["bf16"],
        missing=counts["missing"],
        recipes=tuple(sorted(recipes)),
        problems=tuple(problems[:SHOWN_OF_A_RANK]),
    )


def _missing(module: Any, precision: PrecisionSettings) -> Iterator[str]:
    """Yield what a linear lacks that should have run in FP8; each is of use only where those before it are there."""
    if not _is_transformer_engines(module):
        yield f"should be Transformer Engine's, found {_class_of(module)}, which has no FP8"
    elif not (module.fp8 and module.fp8_initialized):
        yield f"should have run in FP8, found fp8={module.fp8} and fp8_initialized={module.fp8_initialized}"
    elif not _is_asked_for(module.fp8_meta["recipe"], precision):
        wanted = f"{precision.fp8} {precision.fp8_format}"
        if precision.fp8 == "delayed":
            wanted += f" with {precision.amax_choice} of {precision.amax_history}"
        yield f"should have run with the recipe {wanted}, found {module.fp8_meta['recipe']}"
    else:
        yield from _missing_state(module, precision)


def _missing_state(module: Any, precision: PrecisionSettings) -> Iterator[str]:
    for key in STATES:
        if not len(module.quantizers[key]):
            yield f"should have quantizers for {key}, found none"
    copy = module._fp8_workspaces.get("weight")
    data = next((held for name in ("_data", "_rowwise_data") if (held := getattr(copy, name, None)) is not None), None)
    if data is None or data.dtype != torch.uint8:
        yield f"should keep its weight in FP8, found {type(copy).__name__}"
    if precision.fp8 == "delayed":
        yield from _missing_history(module.fp8_meta)


def _missing_history(meta: Any) -> Iterator[str]:
    for key in STATES:
        history, scale = meta[key].amax_history, meta[key].scale
        if not (_is_finite(history) and _is_finite(scale)):
            largest = float(history.max())
            yield f"should have finite largest values in {key}, found {largest} and scales up to {float(scale.max())}"
    forward = meta[STATES[0]]
    # A history of one row is cleared by the update that scaled by it: of it only the scale is left, which begins at 1.
    is_cleared = len(forward.amax_history) == 1
    largest, scale = float(forward.amax_history[:, INPUT].max()), float(forward.scale[INPUT])
    if not largest > 0 and not (is_cleared and scale != 1):
        yield f"should have seen an input above zero, found {largest} as the largest and a scale of {scale}"


def _too_much(module: Any) -> Iterator[str]:
    """Yield what a linear has that should have stayed in bf16."""
    if getattr(module, "fp8", False):
        yield "should have stayed in bf16 (precision.first_bf16_layers, precision.last_bf16_layers), found it in FP8"


def _is_transformer_engines(module: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "transformer_engine" for kind in type(module).__mro__)


def _class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _is_asked_for(recipe: Any, precision: PrecisionSettings) -> bool:
    is_kind = getattr(recipe, RECIPES[precision.fp8], None)
    if is_kind is None or not is_kind() or recipe.fp8_format.name.lower() != precision.fp8_format:
        return False
    if precision.fp8 != "delayed":
        return True
    asked = precision.amax_history, precision.amax_choice
    return (recipe.amax_history_len, recipe.amax_compute_algo) == asked


def _recipe_name(recipe: Any) -> str:
    return f"{type(recipe).__name__} {recipe.fp8_format.name}"


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


@waits_for_others
def _gather(own: Findings, ranks: int) -> list[Findings]:
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _refusal(
    precision: PrecisionSettings, everyone: Sequence[Findings], wrong: Sequence[int], hosts: Sequence[str]
) -> PrecisionError:
    linears = sum(found.fp8_linears + found.bf16_linears + found.missing for found in everyone)
    missing = sum(everyone[rank].missing for rank in wrong)
    problems = [f"rank {rank} on {hosts[rank]}: {problem}" for rank in wrong for problem in everyone[rank].problems]
    more = [f"and more: {len(wrong)} ranks in all"] if len(problems) > SHOWN else []
    return PrecisionError(
        f"{precision.label} was asked for, and {missing} of {linears} linear parts on {len(wrong)} of {len(everyone)} "
        "ranks did not run so; nothing is saved. Mend what is named, or go on in bf16 with `orchestrate resume RUN "
        "precision=bf16`:",
        [*problems[:SHOWN], *more],
    )
