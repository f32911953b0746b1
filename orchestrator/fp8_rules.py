"""What FP8 asks of settings, checked while planning, and what it makes of a rank's matrix products. Pure.

Read in megatron-core 0.16.1 (transformer_config.py, fp8_utils.py, gpt_layer_specs.py) and in Transformer Engine 2.11:
`assert_dim_for_fp8_exec` and `assert_dim_for_all_gather` of pytorch/utils.py, `is_quantizable` of its tensors,
`check_recipe_support` of pytorch/quantization.py, common/gemm/cublaslt_gemm.cu. None of it was run on a GPU here.

A linear part computes three products: forward [M, K] x [K, N], input gradients [M, N] x [N, K], weight gradients
[N, M] x [M, K]. On Hopper FP8 has one form only, in which the dimension that is summed over must be a multiple of 16:
that is K, N and M in turn. Parts that TP cuts along their outputs gather their tokens with sequence parallelism, after
each rank has scaled and cast its own shard of them, which has a rule of its own.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

from orchestrator.layout import ParallelLayout
from orchestrator.library_pairs import numbers
from orchestrator.model_shape import TransformerShape, choose, divisors, multiples_near
from orchestrator.settings import PrecisionSettings, RunSettings

UNITS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What every dimension of a product must be a multiple of, by `precision.fp8`. Transformer Engine pads the scales of
blocks that are not whole, so that `blockwise` may run with less where tokens are not gathered; that is not offered."""

SHARD_UNITS = {"tensorwise": 8, "delayed": 8, "blockwise": 128, "mxfp8": 32}
"""The same of the tokens that one tensor rank scales before they are gathered."""

CAPABILITIES = {
    "v100": 7.0, "t4": 7.5, "a100": 8.0, "a800": 8.0, "a30": 8.0, "a10": 8.6, "a40": 8.6, "a6000": 8.6,
    "l4": 8.9, "l40": 8.9, "l40s": 8.9, "h100": 9.0, "h200": 9.0, "h800": 9.0, "h20": 9.0, "gh200": 9.0,
    "b200": 10.0, "gb200": 10.0, "b300": 10.3, "gb300": 10.3,
}  # fmt: skip
"""Compute capability of the GPUs that `cluster.gpu` may name."""

NEEDED_CAPABILITY = {"tensorwise": 8.9, "delayed": 8.9, "blockwise": 9.0, "mxfp8": 10.0}

NEEDED_VERSIONS = {"tensorwise": ("2.2", ""), "delayed": ("", ""), "blockwise": ("2.3", "12.9"), "mxfp8": ("2.1", "")}
"""The first Transformer Engine and the first CUDA of each; empty where none is known to be too old."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearPart:
    """A linear part of a layer, as one rank multiplies it: [tokens, inputs] x [inputs, outputs]."""

    name: str
    tokens: int
    """M, of a micro-batch."""
    outputs: int
    """N, rows of the rank's weight."""
    inputs: int
    """K, columns of the rank's weight."""
    gathered_from: int | None = None
    """Tokens that each tensor rank scales before they are gathered; None where nothing is gathered."""

    def fits(self, recipe: str) -> bool:
        """Whether a recipe can multiply it."""
        sizes = (self.tokens, self.outputs, self.inputs)
        return all(size % UNITS[recipe] == 0 for size in sizes) and (self.gathered_from or 0) % SHARD_UNITS[recipe] == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Plan:
    """What FP8 makes of a run, for people and programs to read."""

    recipe: str
    unit: int
    """What each dimension is a multiple of."""
    shard_unit: int
    """What the tokens are a multiple of that one tensor rank scales before they are gathered."""
    parts: tuple[LinearPart, ...]
    fitting: dict[str, bool]
    """By each part's name."""
    bf16_layers: tuple[int, ...]
    """Counted from 0; all others multiply in FP8."""
    warnings: tuple[str, ...]


def linear_parts(shape: TransformerShape, layout: ParallelLayout, sequence_length: int) -> tuple[LinearPart, ...]:
    """Return the linear parts of every layer on a rank, in the order they are computed; sizes that divide.

    The first and the third are cut along their outputs by tensor parallelism, the others along their inputs. Query,
    key and value are one product, and so are gate and up of SwiGLU.
    """
    tensor = layout.tensor_parallel
    tokens = sequence_length // layout.context_parallel * layout.micro_batch_size
    shard = tokens // tensor if layout.sequence_parallel and tensor > 1 else None
    hidden, rows = shape.hidden_size, shape.query_size + 2 * shape.key_size
    return (
        LinearPart(name="qkv", tokens=tokens, outputs=rows // tensor, inputs=hidden, gathered_from=shard),
        LinearPart(name="projection", tokens=tokens, outputs=hidden, inputs=shape.query_size // tensor),
        LinearPart(
            name="FFN in",
            tokens=tokens,
            outputs=2 * shape.ffn_hidden_size // tensor,
            inputs=hidden,
            gathered_from=shard,
        ),
        LinearPart(name="FFN out", tokens=tokens, outputs=hidden, inputs=shape.ffn_hidden_size // tensor),
    )


def bf16_layers(precision: PrecisionSettings, num_layers: int) -> tuple[int, ...]:
    """Return the layers that stay in bf16 beside others in FP8, counted from 0."""
    last = num_layers - precision.last_bf16_layers
    return tuple(n for n in range(num_layers) if n < precision.first_bf16_layers or n >= last)


def fp8_plan(settings: RunSettings, layout: ParallelLayout) -> Fp8Plan | None:
    """Return what FP8 makes of checked settings, or None without FP8."""
    precision, shape = settings.precision, settings.model
    if precision.fp8 == "none":
        return None
    parts = linear_parts(shape, layout, settings.data.sequence_length)
    return Fp8Plan(
        recipe=precision.fp8,
        unit=UNITS[precision.fp8],
        shard_unit=SHARD_UNITS[precision.fp8],
        parts=parts,
        fitting={part.name: part.fits(precision.fp8) for part in parts},
        bf16_layers=bf16_layers(precision, shape.num_layers),
        warnings=tuple(fp8_warnings(settings, layout)),
    )


def fp8_problems(settings: RunSettings, layout: ParallelLayout | None) -> list[str]:
    """Return what of `precision` cannot be, each with its remedy.

    Args:
        layout: the rank grid, or None where it has problems of its own; then sizes are not told.
    """
    found = _number_problems(settings.precision)
    if settings.precision.fp8 == "none":
        return found
    found += _place_problems(settings, layout)
    found += _layer_problems(settings, layout)
    if layout is not None:
        found += _size_problems(settings, layout)
    return found


def fp8_warnings(settings: RunSettings, layout: ParallelLayout) -> list[str]:
    """Return what FP8 can do but usually should not, each with its remedy or reason."""
    precision, gpu = settings.precision, settings.cluster.gpu
    recipe = precision.fp8
    if recipe == "none":
        return []
    found = []
    if settings.cluster.device == "cuda" and _capability(gpu) is None:
        found.append(
            f"cluster.gpu={gpu!r} is not known here: precision.fp8={recipe} needs compute capability "
            f"{NEEDED_CAPABILITY[recipe]} or higher, which h100 and h200 {'lack' if recipe == 'mxfp8' else 'have'}"
        )
    if recipe == "delayed":
        if precision.amax_history != 1024 or precision.amax_choice != "max":
            found.append(
                f"precision.amax_history={precision.amax_history} with amax_choice={precision.amax_choice}: upstream's "
                "preset of delayed scaling is 1024 and max, since a short history forgets rare large values, which "
                "are then cut off; use precision=fp8-delayed"
            )
        found.append(
            "precision.fp8=delayed begins its history of largest values anew at each start, since no checkpoint holds "
            "it: the first steps after a restart scale otherwise; precision=fp8-tensorwise has none"
        )
    if precision.fp8_format == "e4m3" and recipe in ("tensorwise", "delayed"):
        found.append(
            f"precision.fp8_format=e4m3 with one scale a tensor, as {recipe} has it, leaves gradients fewer powers of "
            "two than E5M2, which arXiv 2209.05433 recommends for them; use precision.fp8_format=hybrid"
        )
    if _has_stage_without_fp8(settings, layout):
        found.append(
            "a stage of the pipeline has no layer in FP8 and will be waited for by the others; use fewer bf16 layers "
            f"than the {settings.model.num_layers // layout.pipeline_parallel} of a stage"
        )
    return found


def version_problems(precision: PrecisionSettings, transformer_engine: str, cuda: str) -> list[str]:
    """Return what of a node's libraries is too old for a recipe, each with its remedy.

    Args:
        transformer_engine: its version, such as '2.11.0+c188b53'.
        cuda: the version that torch was built for, as torch.version.cuda has it, such as '13.0'; empty without CUDA.
    """
    if precision.fp8 == "none":
        return []
    found = []
    has_tensorwise = numbers(transformer_engine) >= numbers(NEEDED_VERSIONS["tensorwise"][0])
    for name, version, needed in zip(
        ("Transformer Engine", "CUDA"), (transformer_engine, cuda), NEEDED_VERSIONS[precision.fp8], strict=True
    ):
        have = numbers(version)
        if not have:
            found.append(f"precision.fp8={precision.fp8} needs {name}, found version {version!r}; docs/clusters.md")
        elif have < numbers(needed):
            instead = "precision=fp8-tensorwise or precision=bf16" if has_tensorwise else "precision=bf16"
            found.append(
                f"precision.fp8={precision.fp8} needs {name} {needed} or later, found {version}; install that "
                f"(docs/clusters.md), or use {instead}"
            )
    return found


def _number_problems(precision: PrecisionSettings) -> list[str]:
    found = [
        f"precision.{name} should be at least {least}, found {getattr(precision, name)}"
        for name, least in (
            ("first_bf16_layers", 0),
            ("last_bf16_layers", 0),
            ("amax_history", 1),
            ("gap_check_steps", 0),
            ("ffn_input_steps", 0),
        )
        if getattr(precision, name) < least
    ]
    found += [
        f"precision.{name} should be above 0, found {getattr(precision, name)}; "
        f"precision.{steps}=0 leaves the watch out"
        for name, steps in (("gap_alarm", "gap_check_steps"), ("ffn_input_alarm", "ffn_input_steps"))
        if not 0 < getattr(precision, name) < math.inf
    ]
    return found


def _place_problems(settings: RunSettings, layout: ParallelLayout | None) -> list[str]:
    """Return whether the device or the other numbers exclude FP8."""
    precision, cluster = settings.precision, settings.cluster
    what = f"precision.fp8={precision.fp8}"
    if cluster.device != "cuda":
        return [f"{what} needs cluster.device=cuda, found {cluster.device}; use precision=fp32 or precision=bf16"]
    found = []
    if precision.dtype != "bf16":
        found.append(
            f"{what} needs precision.dtype=bf16 for all that is not FP8, found {precision.dtype}; use "
            "precision.dtype=bf16"
        )
    capability, needed = _capability(cluster.gpu), NEEDED_CAPABILITY[precision.fp8]
    if capability is not None and capability < needed:
        found.append(
            f"{what} needs a GPU of compute capability {needed} or higher, cluster.gpu={cluster.gpu} has {capability}; "
            f"use {_instead(settings, layout)}"
        )
    return found


def _layer_problems(settings: RunSettings, layout: ParallelLayout | None) -> list[str]:
    """Return whether layers that stay in bf16 cannot be so many."""
    precision, layers = settings.precision, settings.model.num_layers
    first, last = precision.first_bf16_layers, precision.last_bf16_layers
    if min(first, last) < 0 or not (first or last):
        return []
    if precision.fp8 == "delayed":
        return [
            f"precision.first_bf16_layers={first} with last_bf16_layers={last} cannot be together with fp8=delayed, "
            f"which turns FP8 on once for all layers; set both to 0, or use {_instead(settings, layout)}"
        ]
    found = []
    held = layers // layout.pipeline_parallel if layout is not None else layers
    for name, count in (("first_bf16_layers", first), ("last_bf16_layers", last)):
        if count > held:
            stage = "the model has" if held == layers else "a pipeline stage holds"
            found.append(f"precision.{name}={count} is more than the {held} layers that {stage}; use at most {held}")
    if not found and first + last >= layers:
        found.append(
            f"precision.first_bf16_layers={first} and last_bf16_layers={last} leave none of {layers} layers in FP8; "
            f"use at most {layers - 1} together, or precision=bf16"
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    """A size that dimensions of products come from, after it was split."""

    name: str
    value: int
    unit: int
    what: str
    """How it came about."""
    where: str
    """Of which products it is a dimension."""
    fields: tuple[str, ...]
    """What could be changed to mend it; the first that can is told."""

    @property
    def fits(self) -> bool:
        return self.value % self.unit == 0


def _sizes(shape: TransformerShape, layout: ParallelLayout, length: int, recipe: str) -> list[_Size]:
    """Return the few sizes that decide of every product; where all of them fit all parts do."""
    qkv, projection, _, ffn_out = linear_parts(shape, layout, length)
    unit, tensor = UNITS[recipe], f"layout.tensor_parallel={layout.tensor_parallel}"
    tokens = f"data.sequence_length={length}"
    tokens += f" / layout.context_parallel={layout.context_parallel}" if layout.context_parallel > 1 else ""
    tokens += f" x layout.micro_batch_size={layout.micro_batch_size}" if layout.micro_batch_size > 1 else ""
    found = [
        _Size(
            name="hidden", value=qkv.inputs, unit=unit, what=f"model.hidden_size={qkv.inputs}",
            where="K of qkv and FFN in, N of projection and FFN out", fields=("hidden_size",),
        ),
        _Size(
            name="rows", value=qkv.outputs, unit=unit,
            what=f"{shape.query_size} query and 2 x {shape.key_size} key and value rows / {tensor}",
            where="N of qkv", fields=("tensor_parallel", "num_query_groups"),
        ),
        _Size(
            name="query", value=projection.inputs, unit=unit, what=f"{shape.query_size} query rows / {tensor}",
            where="K of projection", fields=("tensor_parallel", "num_attention_heads"),
        ),
        _Size(
            name="ffn", value=ffn_out.inputs, unit=unit,
            what=f"model.ffn_hidden_size={shape.ffn_hidden_size} / {tensor}",
            where="K of FFN out, half of N of FFN in", fields=("tensor_parallel", "ffn_hidden_size"),
        ),
        _Size(
            name="tokens", value=qkv.tokens, unit=unit, what=tokens, where="M of every part",
            fields=("micro_batch_size", "context_parallel", "sequence_length"),
        ),
    ]  # fmt: skip
    if qkv.gathered_from is not None:
        shard = _Size(
            name="shard", value=qkv.gathered_from, unit=SHARD_UNITS[recipe], what=f"{tokens} / {tensor}",
            where="tokens that a rank scales before sequence_parallel gathers them",
            fields=("micro_batch_size", "tensor_parallel", "sequence_length"),
        )  # fmt: skip
        found.append(shard)
    return found


def _size_problems(settings: RunSettings, layout: ParallelLayout) -> list[str]:
    """Return every size that a recipe cannot multiply, each with those beside it that it could."""
    recipe = settings.precision.fp8
    odd = [size for size in _sizes(settings.model, layout, settings.data.sequence_length, recipe) if not size.fits]
    names = {size.name for size in odd}
    found = []
    for size in odd:
        # A remedy may leave what else does not fit, and adds nothing to it.
        remedies = (_remedy(settings, layout, field, names - {size.name}) for field in size.fields)
        told = next((remedy for remedy in remedies if remedy), "")
        what = size.what if size.what.endswith(f"={size.value}") else f"{size.what} = {size.value}"
        found.append(
            f"{what} ({size.where}) should be a multiple of {size.unit} for precision.fp8={recipe}; "
            + (f"{told}, or " if told else "use ")
            + _instead(settings, layout)
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Move:
    """A field that could be changed."""

    now: int
    values: Iterable[int]
    to: Callable[[int], tuple[TransformerShape, ParallelLayout, int]]
    """Shape, rank grid and sequence length with a value of it."""


def _moves(settings: RunSettings, layout: ParallelLayout, batches: Sequence[int]) -> dict[str, _Move]:
    """Return what could be changed so that sizes fit, by the field's name.

    Args:
        batches: all global batches of the run.
    """
    shape, length, recipe = settings.model, settings.data.sequence_length, settings.precision.fp8
    tensor, context, heads = layout.tensor_parallel, layout.context_parallel, shape.num_attention_heads
    by_tensor, by_context = tensor * layout.data_parallel, context * layout.data_parallel
    unit, change = UNITS[recipe], dataclasses.replace
    # Hidden size and heads make a head's size, unless that is a field of its own.
    hidden_unit = unit if shape.head_dim else math.lcm(unit, 2 * heads)
    length_unit = context * math.lcm(unit, SHARD_UNITS[recipe] * tensor)
    return {
        "tensor_parallel": _Move(
            now=tensor, values=divisors(by_tensor),
            to=lambda n: (shape, change(layout, tensor_parallel=n, data_parallel=by_tensor // n), length),
        ),
        "context_parallel": _Move(
            now=context, values=divisors(by_context),
            to=lambda n: (shape, change(layout, context_parallel=n, data_parallel=by_context // n), length),
        ),
        "micro_batch_size": _Move(
            now=layout.micro_batch_size, values=divisors(math.gcd(*batches)),
            to=lambda n: (shape, change(layout, micro_batch_size=n), length),
        ),
        "sequence_length": _Move(
            now=length, values=_around(length_unit, length), to=lambda n: (shape, layout, n)
        ),
        "hidden_size": _Move(
            now=shape.hidden_size, values=_around(hidden_unit, shape.hidden_size),
            to=lambda n: (change(shape, hidden_size=n), layout, length),
        ),
        "ffn_hidden_size": _Move(
            now=shape.ffn_hidden_size, values=_around(unit * tensor, shape.ffn_hidden_size),
            to=lambda n: (change(shape, ffn_hidden_size=n), layout, length),
        ),
        "num_attention_heads": _Move(
            now=heads, values=_around(math.lcm(tensor, shape.num_query_groups), heads),
            to=lambda n: (change(shape, num_attention_heads=n), layout, length),
        ),
        "num_query_groups": _Move(
            now=shape.num_query_groups, values=divisors(heads),
            to=lambda n: (change(shape, num_query_groups=n), layout, length),
        ),
    }  # fmt: skip


def _remedy(settings: RunSettings, layout: ParallelLayout, field: str, allowed: set[str]) -> str:
    """Return which values of a field would do, those nearest to the present one, or nothing where none does.

    Args:
        allowed: names of sizes that need not fit then.
    """
    cluster, recipe = settings.cluster, settings.precision.fp8
    within = cluster.ranks_per_node if cluster.device == "cuda" else layout.world_size
    batches = [layout.global_batch_size, *(stage.global_batch_size for stage in settings.training.batch_ramp)]
    move = _moves(settings, layout, batches)[field]

    def would_do(value: int) -> bool:
        shape, grid, length = move.to(value)
        if shape.problems() or length > shape.max_position_embeddings or grid.problems(shape, length, within):
            return False
        if any(batch % grid.batch_unit for batch in batches):
            return False
        return {size.name for size in _sizes(shape, grid, length, recipe) if not size.fits} <= allowed

    fitting = [value for value in move.values if value != move.now and would_do(value)]
    return choose(field, fitting, move.now) if fitting else ""


def _around(unit: int, wanted: int) -> list[int]:
    """Return multiples of a unit on both sides of a number, a few on each."""
    near = multiples_near(unit, wanted)
    return sorted({size + n * unit for size in near for n in range(-4, 5) if size + n * unit > 0})


def _instead(settings: RunSettings, layout: ParallelLayout | None) -> str:
    """Return the files of conf/precision that would do here: 'precision=fp8-tensorwise or precision=bf16'."""
    chosen, capability = settings.precision.fp8, _capability(settings.cluster.gpu)
    possible = []
    for recipe in ("tensorwise", "blockwise"):
        can_run = capability is None or capability >= NEEDED_CAPABILITY[recipe]
        # The preset of `tensorwise` has a first and a last layer in bf16.
        has_layers = recipe != "tensorwise" or settings.model.num_layers > 2
        does_fit = layout is not None and all(
            size.fits for size in _sizes(settings.model, layout, settings.data.sequence_length, recipe)
        )
        if recipe != chosen and can_run and has_layers and does_fit:
            possible.append(f"precision=fp8-{recipe}")
    return " or ".join([", ".join(possible), "precision=bf16"] if possible else ["precision=bf16"])


def _has_stage_without_fp8(settings: RunSettings, layout: ParallelLayout) -> bool:
    """Whether the first or the last pipeline stage, which hold the bf16 layers, has nothing else."""
    precision, held = settings.precision, settings.model.num_layers // layout.pipeline_parallel
    if layout.pipeline_parallel == 1 or layout.virtual_pipeline_parallel > 1:
        return False
    return held in (precision.first_bf16_layers, precision.last_bf16_layers)


def _capability(gpu: str) -> float | None:
    """Return the compute capability of a GPU by its name, such as 'h100' or 'NVIDIA H100 SXM'."""
    known = [CAPABILITIES[word] for word in re.split(r"[^a-z0-9]+", gpu.lower()) if word in CAPABILITIES]
    return known[0] if known else None
