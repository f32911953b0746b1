"""The rules of FP8, each broken for itself, and the sizes they speak of against megatron-core's own modules.

Transformer Engine does not run here: what it demands was read in its source (orchestrator/fp8_rules.py names where),
and no test can tell that it demands no more.
"""

import contextlib
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_solar.cpu import cuda_calls_on_cpu
from orchestrator.changes import change_problems, changes_between
from orchestrator.checks import build_layout, settings_problems
from orchestrator.commands.main import group
from orchestrator.config import compose, recompose, to_yaml
from orchestrator.errors import ConfigError
from orchestrator.files import write_json
from orchestrator.fp8_rules import (
    CAPABILITIES,
    NEEDED_CAPABILITY,
    SHARD_UNITS,
    UNITS,
    LinearPart,
    bf16_layers,
    fp8_warnings,
    linear_parts,
    version_problems,
)
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import TransformerShape, divisors
from orchestrator.plan import make_plan, read_plan, write_plan
from orchestrator.provenance import provenance
from orchestrator.resume import notes_on, prepare_resume
from orchestrator.settings import (
    ClusterSettings,
    DataSettings,
    LayoutSettings,
    PrecisionSettings,
    Rule,
    RunSettings,
    TrainingSettings,
)
from tests.checkpoint_records import write_checkpoint
from tests.conftest import Trainer

Recipe = Literal["tensorwise", "delayed", "blockwise"]
RECIPES: list[Recipe] = ["tensorwise", "delayed", "blockwise"]
"""Those that an H100 has."""
at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


# Sizes, against what megatron-core builds and computes.


@contextlib.contextmanager
def one_of(layout: ParallelLayout) -> Iterator[None]:
    """Be the first rank of a grid whose others are not there: collectives have their shapes, and no sense."""
    from megatron.core import parallel_state

    from megatron_solar import compat

    with cuda_calls_on_cpu():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
        try:
            compat.initialize_parallel(layout, 1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def parts_seen(request: RunSettings, layout: ParallelLayout) -> tuple[LinearPart, ...]:
    """Return what the linear parts of a layer of megatron-core take in, hold and give in a forward pass."""
    from megatron_solar import compat

    seen: dict[str, LinearPart] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, given: tuple[torch.Tensor, ...], made: tuple[torch.Tensor, torch.Tensor]) -> None:
            came, left = given[0].shape[:-1].numel(), made[0].shape[:-1].numel()
            seen[name] = LinearPart(
                name=name,
                tokens=max(came, left),
                outputs=module.weight.shape[0],
                inputs=module.weight.shape[1],
                gathered_from=came if came < left else None,
            )

        return see

    with warnings.catch_warnings(action="ignore"), one_of(layout):  # of a variable that a GPU launch sets
        config = compat.transformer_config(request.model, layout, request.training, PRESET["fp32"], "cpu")
        chunk = compat.build_chunk(request.model, config, request.data.sequence_length, "cpu", None)
        layer = chunk.decoder.layers[0]
        for name, module in (
            ("qkv", layer.self_attention.linear_qkv),
            ("projection", layer.self_attention.linear_proj),
            ("FFN in", layer.mlp.linear_fc1),
            ("FFN out", layer.mlp.linear_fc2),
        ):
            module.register_forward_hook(hook(name))
        whole_BS = torch.zeros(layout.micro_batch_size, request.data.sequence_length, dtype=torch.int64)
        share_BS = compat.context_share(whole_BS)
        with torch.no_grad():
            chunk(share_BS, share_BS, None, labels=share_BS)
    return tuple(seen.values())


def request_of(
    shape: TransformerShape,
    layout: LayoutSettings,
    *,
    length: int,
    recipe: Recipe = "tensorwise",
    nodes: int = 1,
    first: int = 0,
    last: int = 0,
) -> RunSettings:
    """Return settings of nodes of 8 H100."""
    return RunSettings(
        name="x",
        base="random",
        model=shape,
        data=DataSettings(train=("a",), sequence_length=length),
        training=TrainingSettings(tokens=10**9),
        layout=layout,
        precision=PrecisionSettings(fp8=recipe, first_bf16_layers=first, last_bf16_layers=last),
        cluster=ClusterSettings(name="c", scheduler="slurm", device="cuda", gpu="h100", nodes=nodes, ranks_per_node=8),
    )


@st.composite
def requests(draw: st.DrawFn, pipelines: Sequence[int] = (1, 2), longest: int = 4096) -> RunSettings:
    """Draw sizes that a grid of 16 or 32 GPUs divides, and FP8 may or may not multiply."""
    tensor, context, pipeline = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2), pipelines))
    nodes = draw(st.sampled_from([2, 4]))
    micro = draw(st.sampled_from([1, 2, 3, 4]))
    heads = tensor * draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([n for n in divisors(heads) if n % tensor == 0 or tensor % n == 0]))
    head_dim = draw(st.sampled_from([4, 8, 16, 32, 128]))
    unit = draw(st.sampled_from([8, 16, 128]))
    parts = math.lcm(2 * context, tensor * context)
    shape = TransformerShape(
        num_layers=2 * pipeline, hidden_size=unit * draw(st.integers(1, 3)),
        ffn_hidden_size=tensor * draw(st.sampled_from([4, 8, 16, 24, 32, 128])),
        num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim, vocab_size=32,
        max_position_embeddings=4096,
    )  # fmt: skip
    assume((shape.query_size + 2 * shape.key_size) % tensor == 0)
    layout = LayoutSettings(
        tensor_parallel=tensor, context_parallel=context, pipeline_parallel=pipeline,
        sequence_parallel=draw(st.booleans()), micro_batch_size=micro,
        global_batch_size=micro * draw(st.sampled_from([1, 2, 4, 8])) * (nodes * 8 // (tensor * context * pipeline)),
    )  # fmt: skip
    length = parts * draw(st.sampled_from([n for n in (1, 2, 4, 8, 15, 16, 64) if parts * n <= longest]))
    return request_of(shape, layout, length=length, nodes=nodes, recipe=draw(st.sampled_from(RECIPES)))


SMALL = TransformerShape(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=32,
    max_position_embeddings=4096,
)  # fmt: skip
SHARED_GROUP = dataclasses.replace(SMALL, num_query_groups=1, head_dim=8)
TP4_CP2_SP = LayoutSettings(
    tensor_parallel=4, context_parallel=2, sequence_parallel=True, micro_batch_size=2, global_batch_size=2
)


@settings(at_any_speed, max_examples=10)
@given(requests(pipelines=[1], longest=128))
@example(request_of(SMALL, TP4_CP2_SP, length=64))
@example(request_of(SHARED_GROUP, TP4_CP2_SP, length=64))
def test_a_run_is_refused_exactly_where_a_product_of_megatron_core_has_a_size_that_does_not_divide(
    request: RunSettings,
) -> None:
    layout = build_layout(request)
    seen = parts_seen(request, dataclasses.replace(layout, data_parallel=1))
    assert linear_parts(request.model, layout, request.data.sequence_length) == seen
    unit, shard_unit = {"blockwise": (128, 128)}.get(request.precision.fp8, (16, 8))
    odd = [size for part in seen for size in (part.tokens, part.outputs, part.inputs) if size % unit]
    odd += [part.gathered_from for part in seen if part.gathered_from is not None and part.gathered_from % shard_unit]
    assert bool(settings_problems(request)) == bool(odd)
    assert all(part.fits(request.precision.fp8) for part in seen) == (not odd)


FIELDS = re.compile(r"use (\w+) ([\d, or]+?)(?=, or precision=|$)")
PRESETS = re.compile(r"precision=(\w[\w-]*)")


def with_field(request: RunSettings, name: str, value: int) -> RunSettings:
    for section in ("model", "layout", "data"):
        part = getattr(request, section)
        if name in {field.name for field in dataclasses.fields(part)}:
            return dataclasses.replace(request, **{section: dataclasses.replace(part, **{name: value})})
    raise AssertionError(name)


PRESET = {name: compose("solar-10.7b", [f"precision={name}"]).precision
          for name in ("fp32", "bf16", "fp8-tensorwise", "fp8-delayed", "fp8-blockwise")}  # fmt: skip


def with_preset(request: RunSettings, name: str) -> RunSettings:
    return dataclasses.replace(request, precision=PRESET[name])


def source(problem: str) -> str:
    """Return of which dimension a problem tells."""
    (found,) = re.findall(r" \(([^)]*)\) should be a multiple of", problem)
    return str(found)


@settings(at_any_speed, max_examples=80)
@given(requests())
def test_every_size_and_preset_that_a_problem_names_would_do(request: RunSettings) -> None:
    found = settings_problems(request)
    sources = [source(problem) for problem in found]
    assert len(set(sources)) == len(sources)
    for problem, where in zip(found, sources, strict=True):
        presets = PRESETS.findall(problem)
        assert presets[-1] == "bf16"
        for preset in presets:
            assert settings_problems(with_preset(request, preset)) == [], (problem, preset)
        for field, values in FIELDS.findall(problem):
            for size in re.findall(r"\d+", values):
                left = settings_problems(with_field(request, field, int(size)))
                assert {source(other) for other in left} <= {*sources} - {where}, (problem, field, size, left)


# Each rule for itself.


def problem_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose("solar-10.7b", overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("overrides", "told", "remedies"),
    [
        pytest.param(
            ["precision=fp8-tensorwise", "cluster.device=cpu", "cluster.gpu="],
            "precision.fp8=tensorwise needs cluster.device=cuda, found cpu; use precision=fp32 or precision=bf16",
            [["precision=fp32"], ["precision=bf16"]], id="a CPU",
        ),
        pytest.param(
            ["precision=fp8-delayed", "precision.dtype=fp32"],
            "precision.fp8=delayed needs precision.dtype=bf16 for all that is not FP8, found fp32; use "
            "precision.dtype=bf16",
            [["precision.dtype=bf16"]], id="fp32 beside FP8",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "precision.fp8=mxfp8"],
            "precision.fp8=mxfp8 needs a GPU of compute capability 10.0 or higher, cluster.gpu=h100 has 9.0; use "
            "precision=fp8-tensorwise, precision=fp8-blockwise or precision=bf16",
            [["precision=fp8-tensorwise"], ["precision=fp8-blockwise"], ["precision=bf16"], ["cluster.gpu=b200"]],
            id="mxfp8 on H100",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "cluster.gpu=A100-SXM4"],
            "precision.fp8=tensorwise needs a GPU of compute capability 8.9 or higher, cluster.gpu=A100-SXM4 has 8.0; "
            "use precision=bf16",
            [["precision=bf16"]], id="A100",
        ),
        pytest.param(
            ["precision=fp8-delayed", "precision.first_bf16_layers=2"],
            "precision.first_bf16_layers=2 with last_bf16_layers=0 cannot be together with fp8=delayed, which turns "
            "FP8 on once for all layers; set both to 0, or use precision=fp8-tensorwise, precision=fp8-blockwise or "
            "precision=bf16",
            [["precision.first_bf16_layers=0"], ["precision=fp8-tensorwise"], ["precision=fp8-blockwise"],
             ["precision=bf16"]], id="bf16 layers with delayed scaling",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "precision.first_bf16_layers=25", "layout.pipeline_parallel=2"],
            "precision.first_bf16_layers=25 is more than the 24 layers that a pipeline stage holds; use at most 24",
            [["precision.first_bf16_layers=24"]], id="more first layers than a stage has",
        ),
        pytest.param(
            ["precision=fp8-blockwise", "precision.last_bf16_layers=13", "layout.pipeline_parallel=4"],
            "precision.last_bf16_layers=13 is more than the 12 layers that a pipeline stage holds; use at most 12",
            [["precision.last_bf16_layers=12"]], id="more last layers than a stage has",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "precision.first_bf16_layers=24", "precision.last_bf16_layers=24"],
            "precision.first_bf16_layers=24 and last_bf16_layers=24 leave none of 48 layers in FP8; use at most 47 "
            "together, or precision=bf16",
            [["precision.last_bf16_layers=23"], ["precision=bf16"]], id="no layer in FP8",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "precision.first_bf16_layers=-1"],
            "precision.first_bf16_layers should be at least 0, found -1",
            [["precision.first_bf16_layers=0"]], id="first layers below 0",
        ),
        pytest.param(
            ["precision.last_bf16_layers=-1"],
            "precision.last_bf16_layers should be at least 0, found -1",
            [["precision.last_bf16_layers=0"]], id="last layers below 0",
        ),
        pytest.param(
            ["precision=fp8-delayed", "precision.amax_history=0"],
            "precision.amax_history should be at least 1, found 0",
            [["precision.amax_history=1"]], id="no history",
        ),
        pytest.param(
            ["precision.gap_check_steps=-1"],
            "precision.gap_check_steps should be at least 0, found -1",
            [["precision.gap_check_steps=0"]], id="gap steps",
        ),
        pytest.param(
            ["precision.ffn_input_steps=-5"],
            "precision.ffn_input_steps should be at least 0, found -5",
            [["precision.ffn_input_steps=0"]], id="steps of the FFN's input",
        ),
        pytest.param(
            ["precision.gap_alarm=0"],
            "precision.gap_alarm should be above 0, found 0.0; precision.gap_check_steps=0 leaves the watch out",
            [["precision.gap_alarm=0.1"]], id="gap alarm",
        ),
        pytest.param(
            ["precision.ffn_input_alarm=.inf"],
            "precision.ffn_input_alarm should be above 0, found inf; precision.ffn_input_steps=0 leaves the watch out",
            [["precision.ffn_input_alarm=1e9"]], id="alarm of the FFN's input",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "model.hidden_size=4104", "model.head_dim=128"],
            "model.hidden_size=4104 (K of qkv and FFN in, N of projection and FFN out) should be a multiple of 16 for "
            "precision.fp8=tensorwise; use hidden_size 4080, 4096, 4112 or 4128, or precision=bf16",
            [["model.hidden_size=4096"], ["model.hidden_size=4128"], ["precision=bf16"]], id="hidden",
        ),
        pytest.param(
            ["precision=fp8-blockwise", "layout.tensor_parallel=8", "model.num_query_groups=2"],
            "4096 query and 2 x 256 key and value rows / layout.tensor_parallel=8 = 576 (N of qkv) should be a "
            "multiple of 128 for precision.fp8=blockwise; use tensor_parallel 1, 2 or 4, or precision=fp8-tensorwise "
            "or precision=bf16",
            [["layout.tensor_parallel=4"], ["precision=fp8-tensorwise"], ["precision=bf16"]], id="rows of qkv",
        ),
        pytest.param(
            ["precision=fp8-blockwise", "layout.tensor_parallel=8", "model.head_dim=24", "model.num_attention_heads=64",
             "model.num_query_groups=32"],
            "1536 query rows / layout.tensor_parallel=8 = 192 (K of projection) should be a multiple of 128 for "
            "precision.fp8=blockwise; use tensor_parallel 1, 2 or 4, or precision=fp8-tensorwise or precision=bf16",
            [["layout.tensor_parallel=4"], ["precision=fp8-tensorwise"]], id="rows of the query",
        ),
        pytest.param(
            ["precision=fp8-delayed", "layout.tensor_parallel=8", "model.ffn_hidden_size=14400"],
            "model.ffn_hidden_size=14400 / layout.tensor_parallel=8 = 1800 (K of FFN out, half of N of FFN in) should "
            "be a multiple of 16 for precision.fp8=delayed; use tensor_parallel 1, 2 or 4, or precision=bf16",
            [["layout.tensor_parallel=4"], ["layout.tensor_parallel=1"], ["precision=bf16"]], id="FFN",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "data.sequence_length=4088", "layout.sequence_parallel=false"],
            "data.sequence_length=4088 (M of every part) should be a multiple of 16 for precision.fp8=tensorwise; use "
            "micro_batch_size 2, 4 or 8, or precision=bf16",
            [["layout.micro_batch_size=2"], ["precision=bf16"]], id="tokens",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "data.sequence_length=4088", "layout.sequence_parallel=false",
             "training.batch_ramp=[{global_batch_size: 256, until_tokens: 1.0e9}]"],
            "data.sequence_length=4088 (M of every part) should be a multiple of 16 for precision.fp8=tensorwise; use "
            "micro_batch_size 2, or precision=bf16",
            [["layout.micro_batch_size=2"]], id="tokens where a ramp begins with smaller batches",
        ),
        pytest.param(
            ["precision=fp8-blockwise", "data.sequence_length=3712", "layout.context_parallel=4",
             "layout.sequence_parallel=false"],
            "data.sequence_length=3712 / layout.context_parallel=4 = 928 (M of every part) should be a multiple of 128 "
            "for precision.fp8=blockwise; use micro_batch_size 4, 8, 16 or 32, or precision=fp8-tensorwise or "
            "precision=bf16",
            [["layout.micro_batch_size=4"], ["layout.context_parallel=1"], ["precision=fp8-tensorwise"]],
            id="tokens of a context rank",
        ),
        pytest.param(
            ["precision=fp8-tensorwise", "data.sequence_length=4048", "layout.tensor_parallel=4"],
            "data.sequence_length=4048 / layout.tensor_parallel=4 = 1012 (tokens that a rank scales before "
            "sequence_parallel gathers them) should be a multiple of 8 for precision.fp8=tensorwise; use "
            "micro_batch_size 2, 4, 8 or 16, or precision=bf16",
            [["layout.micro_batch_size=2"], ["layout.tensor_parallel=2"], ["layout.sequence_parallel=false"]],
            id="a shard of tokens",
        ),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_told_with_what_mends_it(
    overrides: list[str], told: str, remedies: Sequence[list[str]]
) -> None:
    assert problem_of(*overrides) == told
    for remedy in remedies:
        is_preset = any(PRESETS.match(override) for override in remedy)
        kept = [override for override in overrides if not (is_preset and override.startswith("precision"))]
        compose("solar-10.7b", [*kept, *remedy])


def test_without_fp8_nothing_of_the_kind_is_asked() -> None:
    assert settings_problems(with_preset(request_of(SMALL, TP4_CP2_SP, length=72), "bf16")) == []
    assert len(settings_problems(request_of(SMALL, TP4_CP2_SP, length=72))) == 3  # query 16, FFN 24, tokens, shard 18
    on_cpu = ("cluster.device=cpu", "cluster.gpu=")
    compose("solar-10.7b", [*on_cpu, "precision=fp32"])
    compose("solar-10.7b", [*on_cpu, "precision=bf16", "precision.first_bf16_layers=99"])


def test_sizes_are_not_told_of_where_the_layout_cannot_be() -> None:
    assert problem_of("precision=fp8-blockwise", "layout.tensor_parallel=16").startswith("layout.tensor_parallel=16")
    both = ["precision=fp8-tensorwise", "precision.dtype=fp32", "layout.global_batch_size=1000"]
    with pytest.raises(ConfigError) as caught:
        compose("solar-10.7b", both)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "layout.global_batch_size",
        "precision.fp8",
    ]


@pytest.mark.parametrize("recipe", UNITS)
def test_the_units_are_those_of_megatron_core_where_it_has_them(recipe: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.enums import Fp8Recipe
        from megatron.core.fp8_utils import get_fp8_align_size
    upstream = get_fp8_align_size(Fp8Recipe(recipe))
    assert UNITS[recipe] == (128 if recipe == "blockwise" else upstream)
    assert UNITS[recipe] % SHARD_UNITS[recipe] == 0
    assert min(CAPABILITIES.values()) < NEEDED_CAPABILITY[recipe] <= max(CAPABILITIES.values())


@at_any_speed
@given(
    layers=st.integers(1, 12),
    stages=st.sampled_from([1, 2, 3]),
    first=st.integers(-1, 13),
    last=st.integers(-1, 13),
    recipe=st.sampled_from(["tensorwise", "delayed"]),
)
def test_layers_in_bf16_are_refused_where_megatron_core_refuses_them_or_nothing_is_left(
    layers: int, stages: int, first: int, last: int, recipe: Recipe
) -> None:
    from megatron_solar import compat

    assume(layers % stages == 0)
    shape = dataclasses.replace(SMALL, num_layers=layers)
    request = request_of(
        shape, LayoutSettings(pipeline_parallel=stages, global_batch_size=48), length=64, recipe=recipe, nodes=3,
        first=first, last=last,
    )  # fmt: skip
    layout = build_layout(request)
    refusal = ""
    try:
        compat.transformer_config(shape, layout, request.training, request.precision, "cpu")
    except ValueError as error:
        refusal = str(error)
    assert bool(settings_problems(request)) == (bool(refusal) or first + last >= layers)


def test_the_layers_in_bf16_are_those_of_megatron_core() -> None:
    from megatron_solar import compat

    with warnings.catch_warnings(action="ignore"):
        from megatron.core.fp8_utils import is_first_last_bf16_layer
    for first, last in ((0, 0), (1, 1), (0, 2), (3, 0), (5, 6)):
        chosen = compose(
            "solar-10.7b",
            ["precision=fp8-tensorwise", f"precision.first_bf16_layers={first}", f"precision.last_bf16_layers={last}"],
        )
        config = compat.transformer_config(chosen.model, build_layout(chosen), chosen.training, chosen.precision, "cpu")
        theirs = tuple(n for n in range(48) if is_first_last_bf16_layer(config, n))
        assert bf16_layers(chosen.precision, 48) == theirs


# What is doubtful.


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["precision=bf16", "cluster.gpu=b999"], []),
        (["precision=fp8-tensorwise"], []),
        (["precision=fp8-blockwise", "precision.fp8_format=e4m3"], []),
        (["precision=fp8-delayed"], ["begins its history"]),
        (["precision=fp8-delayed", "precision.amax_history=1"], ["amax_history=1 with amax_choice=max", "begins"]),
        (["precision=fp8-delayed", "precision.amax_choice=most_recent"], ["amax_history=1024 with", "begins"]),
        (["precision=fp8-tensorwise", "precision.fp8_format=e4m3"], ["arXiv 2209.05433"]),
        (["precision=fp8-tensorwise", "cluster.gpu=b999"], ["cluster.gpu='b999' is not known here"]),
        (["precision=fp8-tensorwise", "cluster.gpu=NVIDIA H100 80GB HBM3"], []),
        (
            ["precision=fp8-tensorwise", "precision.last_bf16_layers=12", "layout.pipeline_parallel=4"],
            ["a stage of the pipeline has no layer in FP8"],
        ),
        (["precision=fp8-tensorwise", "precision.last_bf16_layers=11", "layout.pipeline_parallel=4"], []),
    ],
)
def test_what_is_doubtful_is_told_and_allowed(overrides: list[str], told: list[str]) -> None:
    chosen = compose("solar-10.7b", overrides)
    warned = fp8_warnings(chosen, build_layout(chosen))
    assert len(warned) == len(told)
    assert all(text in warning for text, warning in zip(told, warned, strict=True))


# What only a node knows.


@pytest.mark.parametrize(
    ("preset", "transformer_engine", "cuda", "told"),
    [
        ("bf16", "", "", []),
        ("fp8-tensorwise", "2.11.0+c188b53", "13.0", []),
        ("fp8-tensorwise", "2.2", "12.4", []),
        (
            "fp8-tensorwise",
            "2.1.0",
            "13.0",
            ["Engine 2.2 or later, found 2.1.0; install that (docs/clusters.md), or use precision=bf16"],
        ),
        ("fp8-delayed", "1.13.0", "12.4", []),
        ("fp8-blockwise", "2.3.0.dev0+abc", "12.9", []),
        ("fp8-blockwise", "2.10.0", "12.10", []),
        ("fp8-blockwise", "2.2.1", "13.0", ["Transformer Engine 2.3 or later, found 2.2.1"]),
        (
            "fp8-blockwise",
            "2.11.0",
            "12.8",
            ["CUDA 12.9 or later, found 12.8; install that (docs/clusters.md), or use precision=fp8-tensorwise or"],
        ),
        ("fp8-blockwise", "1.9", "12.4", ["Transformer Engine 2.3", "CUDA 12.9"]),
        ("fp8-delayed", "", "13.0", ["needs Transformer Engine, found version ''"]),
        ("fp8-tensorwise", "2.11.0", "", ["needs CUDA, found version ''"]),
        ("fp8-tensorwise", "unknown", "13.0", ["needs Transformer Engine, found version 'unknown'"]),
    ],
)
def test_libraries_that_are_too_old_for_a_recipe_are_named(
    preset: str, transformer_engine: str, cuda: str, told: list[str]
) -> None:
    found = version_problems(PRESET[preset], transformer_engine, cuda)
    assert len(found) == len(told)
    assert all(text in problem for text, problem in zip(told, found, strict=True))


# The run as a whole.


@pytest.mark.parametrize("preset", ["fp8-tensorwise", "fp8-delayed", "fp8-blockwise"])
def test_a_run_in_fp8_is_composed_planned_written_and_read(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = compose("solar-10.7b", [f"precision={preset}", "cluster=h100"])
    assert chosen.precision.label == preset
    plan = make_plan(chosen)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    (tmp_path / "again.yaml").write_text(to_yaml(chosen))
    assert compose("again.yaml") == chosen


def planned(*words: str) -> str:
    result = CliRunner().invoke(group, ["plan", "solar-10.7b", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plan_shows_what_is_multiplied_in_fp8_and_without_fp8_nothing() -> None:
    shown = planned("precision=fp8-tensorwise", "precision.last_bf16_layers=2", "precision.fp8_format=e4m3")
    table = [re.split(r"  +", line.strip()) for line in shown.splitlines()]
    assert ["FFN in", "4,096", "14,336", "4,096", "2,048", "shards of 2,048", "yes"] in table
    assert ["projection", "4,096", "4,096", "2,048", "2,048", "all", "yes"] in table
    told = " ".join(shown.split())
    assert "tensorwise needs M, N and K multiples of 16, shards of tokens of 8" in told
    assert "linear parts of 45 of 48 layers" in told
    assert "layer 0 and layers 46 to 47 of 0 to 47" in told
    assert "warning precision.fp8_format=e4m3" in told
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    for line in ("fp8", "FP8"):
        assert line not in planned("precision=bf16")


def test_a_plan_as_json_has_fp8_only_where_it_is() -> None:
    fp8 = json.loads(planned("precision=fp8-delayed", "--json"))["fp8"]
    assert (fp8["recipe"], fp8["unit"], fp8["bf16_layers"], len(fp8["warnings"])) == ("delayed", 16, [], 1)
    assert [part["name"] for part in fp8["parts"]] == list(fp8["fitting"]) == ["qkv", "projection", "FFN in", "FFN out"]
    assert fp8["parts"][3] == {
        "name": "FFN out", "tokens": 4096, "outputs": 4096, "inputs": 7168, "gathered_from": None,
    }  # fmt: skip
    assert "fp8" not in json.loads(planned("precision=bf16", "--json"))


@pytest.mark.parametrize("preset", ["fp8-tensorwise", "fp8-delayed", "fp8-blockwise"])
def test_fp8_may_be_left_and_taken_up_at_a_resume_and_is_written_down(preset: str) -> None:
    in_fp8, in_bf16 = (compose("solar-10.7b", [f"precision={name}"]) for name in (preset, "bf16"))
    for before, override, after in ((in_fp8, "precision=bf16", in_bf16), (in_bf16, f"precision={preset}", in_fp8)):
        assert recompose(before, [override]) == after
        changes = changes_between(before, after)
        assert "precision.fp8" in [change.field for change in changes]
        assert {change.rule for change in changes} == {Rule.RECORDED}
        assert change_problems(changes) == []


def test_a_run_in_fp8_goes_on_in_bf16_by_one_override(trainer: Trainer) -> None:
    """A run's folder with a checkpoint of two steps, as if a GPU had done them."""
    from megatron_solar.sample_request import request_of as samples_of

    run, plan = trainer.make_run("precision=fp8-tensorwise", "cluster.device=cuda", "cluster.gpu=h100", "base=random")
    write_json(run.provenance, provenance("a test"))
    samples = samples_of(plan)
    consumed = plan.consumed_samples(2)
    write_checkpoint(
        run, 2, model=plan.settings.model, consumed_samples=consumed, data_fingerprint=samples.fingerprint_at(consumed),
        tokenizer_sha256=samples.tokenizer_sha256, precision=plan.settings.precision.label,
    )  # fmt: skip
    prepared = prepare_resume(run, ["precision=bf16"])
    assert prepared.checkpoint is not None and prepared.checkpoint.facts.precision == "fp8-tensorwise"
    assert {change.field: change.after for change in prepared.changes} == {
        "precision.fp8": "none", "precision.first_bf16_layers": 0, "precision.last_bf16_layers": 0,
    }  # fmt: skip
    assert prepared.plan.settings.precision.label == "bf16"
    assert notes_on(prepared) == [
        "the fp32 master weights and the optimizer are kept; from here on in bf16, losses differ by rounding"
    ]
    to_delayed = prepare_resume(run, ["precision=fp8-delayed"])
    assert any("begins its history" in note for note in notes_on(to_delayed))
    with pytest.raises(ConfigError, match=r"precision\.fp8=tensorwise needs cluster\.device=cuda, found cpu"):
        prepare_resume(run, ["cluster.device=cpu"])
