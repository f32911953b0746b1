"""What a shape counts and how a layout spreads it, against transformers' and megatron-core's own classes."""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from orchestrator.checks import build_layout, settings_problems
from orchestrator.config import compose, recompose
from orchestrator.errors import ConfigError
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import RopeScaling, TransformerShape, choose, divisors
from orchestrator.plan import make_plan, read_plan, static_bytes, write_plan
from orchestrator.settings import ClusterSettings, DataSettings, LayoutSettings, RunSettings, TrainingSettings
from orchestrator.values import from_plain, to_plain

SOLAR = compose("solar-10.7b").model
MISTRAL = dataclasses.replace(SOLAR, num_layers=32)
at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def test_solar_counts_what_its_authors_published() -> None:
    assert SOLAR.parameters() == 10_731_524_096
    assert MISTRAL.parameters() == 7_241_732_096
    assert SOLAR.layer_parameters() == 218_112_000
    assert SOLAR.parameters() - MISTRAL.parameters() == 16 * 218_112_000


def test_flops_a_token_of_solar_at_4096_in_both_conventions() -> None:
    assert SOLAR.flops_per_token(4096) == pytest.approx(68.43e9, rel=1e-4)
    assert SOLAR.flops_per_token(4096, "full_s2") == pytest.approx(73.26e9, rel=1e-4)
    # Palm's closed formula, appendix B of arXiv 2204.02311, on the matrices that multiply.
    matrices = SOLAR.parameters() - SOLAR.vocab_size * 4096 - (2 * 48 + 1) * 4096
    assert SOLAR.flops_per_token(4096, "full_s2") == 6 * matrices + 12 * 48 * 4096 * 4096


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("groups", "head_dim"), [(1, None), (2, None), (4, None), (2, 24)])
def test_the_parameters_are_those_of_the_llama_of_transformers(
    groups: int, head_dim: int | None, is_tied: bool
) -> None:
    import transformers

    shape = TransformerShape(
        num_layers=3, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=groups,
        vocab_size=1000, max_position_embeddings=128, tie_embeddings=is_tied, head_dim=head_dim,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        num_hidden_layers=3, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=groups,
        vocab_size=1000, max_position_embeddings=128, tie_word_embeddings=is_tied, head_dim=head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert shape.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layer_parameters() == sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def test_a_plan_written_before_head_sizes_and_rope_scaling_is_read(tmp_path: Path) -> None:
    plan = make_plan(compose("solar-10.7b"))
    write_plan(tmp_path / "plan.json", plan)
    plain = json.loads((tmp_path / "plan.json").read_text())
    for field in ("head_dim", "rope_scaling"):
        del plain["settings"]["model"][field]
    (tmp_path / "old.json").write_text(json.dumps(plain))
    assert read_plan(tmp_path / "old.json") == plan


def test_the_precision_of_a_plan_of_version_0_5_is_read(tmp_path: Path) -> None:
    plan = make_plan(compose("solar-10.7b", ["precision=fp32"]))
    write_plan(tmp_path / "plan.json", plan)
    plain = json.loads((tmp_path / "plan.json").read_text())
    plain["settings"]["training"]["precision"] = plain["settings"].pop("precision")["dtype"]
    (tmp_path / "old.json").write_text(json.dumps(plain))
    assert read_plan(tmp_path / "old.json") == plan


def test_rope_scaling_and_head_size_are_set_kept_in_plans_and_changed() -> None:
    mapping = "{rope_type: llama3, factor: 8.0, original_max_position_embeddings: 4096}"
    chosen = compose("solar-10.7b", [f"model.rope_scaling={mapping}", "model.head_dim=64"])
    assert chosen.model.rope_scaling == RopeScaling(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=4096
    )
    problems: list[str] = []
    assert from_plain(RunSettings, to_plain(chosen), "", problems) == chosen
    assert recompose(chosen, []) == chosen
    assert recompose(chosen, ["model.rope_scaling=null", "model.head_dim=null"]).model == SOLAR
    # Half the head size: half of all that attention's matrices hold, and of its scores.
    halved = 48 * 4096 * (2 * 2048 + 2 * 512)
    assert SOLAR.parameters() - chosen.model.parameters() == halved
    assert SOLAR.flops_per_token(4096) - chosen.model.flops_per_token(4096) == 6 * halved + 6 * 48 * 2048 * 4096
    with pytest.raises(ConfigError, match="should be one of linear, llama3, found 'yarn'"):
        compose("solar-10.7b", ["model.rope_scaling={rope_type: yarn, factor: 2.0}"])


sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
layouts = st.builds(
    ParallelLayout,
    tensor_parallel=sizes,
    context_parallel=sizes,
    pipeline_parallel=sizes,
    data_parallel=sizes,
    global_batch_size=st.just(48),
)


@at_any_speed
@given(layouts)
def test_every_rank_has_a_place_of_its_own(layout: ParallelLayout) -> None:
    places = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert len(places) == layout.world_size
    assert {place.tensor for place in places} == set(range(layout.tensor_parallel))
    assert {place.context for place in places} == set(range(layout.context_parallel))
    assert {place.data for place in places} == set(range(layout.data_parallel))
    assert {place.pipeline for place in places} == set(range(layout.pipeline_parallel))


@pytest.fixture(scope="module")
def rank_generator() -> type[Any]:
    """megatron-core's own order of ranks; its import warns of what this machine lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.parallel_state import RankGenerator
    generator: type[Any] = RankGenerator
    return generator


@at_any_speed
@given(layout=layouts)
def test_the_places_are_those_of_megatron_core(rank_generator: type[Any], layout: ParallelLayout) -> None:
    theirs = rank_generator(
        tp=layout.tensor_parallel, ep=1, dp=layout.data_parallel, pp=layout.pipeline_parallel,
        cp=layout.context_parallel, order="tp-cp-ep-dp-pp",
    )  # fmt: skip
    for token, axis in (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "pipeline")):
        for group in theirs.get_ranks(token):
            assert [getattr(layout.coordinates(rank), axis) for rank in group] == list(range(len(group)))


def test_a_step_is_worked_through_in_micro_batches() -> None:
    layout = build_layout(compose("solar-10.7b"))
    assert (layout.world_size, layout.data_parallel, layout.num_microbatches) == (256, 128, 8)
    assert layout.num_microbatches * layout.micro_batch_size * layout.data_parallel == layout.global_batch_size


def test_a_layout_says_what_it_is() -> None:
    layout = ParallelLayout(tensor_parallel=2, pipeline_parallel=4, virtual_pipeline_parallel=3, global_batch_size=8)
    assert layout.describe() == "TP 2 × PP 4 (VPP 3) × DP 1"
    everything = dataclasses.replace(
        layout, context_parallel=2, sequence_parallel=True, overlap_gradient_reduce=True, recompute="full"
    )
    assert everything.describe() == (
        "TP 2 × CP 2 × PP 4 (VPP 3) × DP 1, sequence parallel, overlapped gradient reduction, "
        "full recompute (uniform 1)"
    )


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        # bf16 at TP 2, DP 128: half of 10.73 G parameters at 6 + 12/128 bytes.
        ((), 10_731_524_096 / 2 * (6 + 12 / 128) / 1e9),
        # fp32, one rank of everything: weight, gradient and two moments, 16 bytes a parameter.
        (("cluster=local", "layout.tensor_parallel=1", "precision=fp32"), 10_731_524_096 * 16 / 1e9),
        # CP 4: the same, over the 128 ranks of DP 32 and CP 4.
        (("layout.context_parallel=4",), 10_731_524_096 / 2 * (6 + 12 / 128) / 1e9),
        # PP 4: a quarter of the layers, one of the two embeddings, the last norm.
        (("layout.pipeline_parallel=4",), (12 * 218_112_000 + 131_072_000 + 4096) / 2 * (6 + 12 / 32) / 1e9),
    ],
)
def test_the_static_memory_is_that_of_the_closed_formula(overrides: tuple[str, ...], gigabytes: float) -> None:
    chosen = compose("solar-10.7b", overrides)
    assert static_bytes(chosen, build_layout(chosen)) / 1e9 == pytest.approx(gigabytes, rel=1e-6)


def test_time_and_cost_follow_from_tokens_and_peak() -> None:
    plan = make_plan(compose("solar-10.7b"))
    seconds = plan.total_tokens * 68.43e9 / (256 * 989e12 * 0.45)
    assert plan.seconds_at(0.45) == pytest.approx(seconds, rel=1e-4)
    assert plan.total_steps == 238_419
    assert plan.total_steps * 1024 * 4096 >= 10**12 > (plan.total_steps - 1) * 1024 * 4096
    assert make_plan(compose("demo")).seconds_at(0.45) is None


def settings_of(
    *, shape: TransformerShape, layout: LayoutSettings, nodes: int = 1, ranks: int = 8, length: int = 144
) -> RunSettings:
    cluster = ClusterSettings(name="c", scheduler="slurm", device="cuda", nodes=nodes, ranks_per_node=ranks)
    data = DataSettings(train=("a",), sequence_length=length)
    training = TrainingSettings(tokens=10**9)
    return RunSettings(name="x", base="b", model=shape, data=data, training=training, layout=layout, cluster=cluster)


small = st.integers(min_value=1, max_value=4)
SHAPE_FIELDS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
LAYOUT_FIELDS = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "context_parallel",
                 "micro_batch_size", "global_batch_size", "recompute_layers")  # fmt: skip


@st.composite
def good_requests(draw: st.DrawFn) -> RunSettings:
    """Draw settings whose sizes all divide."""
    tensor, pipeline, nodes = draw(st.sampled_from([1, 2, 3, 4])), draw(small), draw(small)
    context = draw(st.sampled_from([1, 2, 3]))  # a sequence has 144 tokens, which 2 x 3 x 4 divides
    ranks = tensor * context * draw(small) * (1 if nodes % pipeline == 0 else pipeline)
    virtual = draw(st.sampled_from([1, 2, 3])) if pipeline > 1 else 1
    data, micro = nodes * ranks // (tensor * context * pipeline), draw(small)
    is_shared = draw(st.booleans())  # a KV group by several ranks, which then split its rows evenly
    groups = draw(st.sampled_from(divisors(tensor))) if is_shared else tensor * draw(small)
    heads = math.lcm(groups, tensor) * draw(small)
    head_dim = draw(st.none() | st.sampled_from([2 * tensor, 4 * tensor]))
    hidden = draw(st.integers(min_value=1, max_value=50)) if head_dim else 2 * tensor * heads * draw(small)
    held, method = draw(small), draw(st.sampled_from(["uniform", "block"]))
    again = draw(st.sampled_from(divisors(held) if method == "uniform" else range(1, held + 1)))
    shape = TransformerShape(
        num_layers=pipeline * virtual * held, hidden_size=hidden, ffn_hidden_size=tensor * draw(small),
        num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim,
        vocab_size=draw(st.integers(min_value=1, max_value=1000)), max_position_embeddings=144,
    )  # fmt: skip
    layout = LayoutSettings(
        tensor_parallel=tensor, pipeline_parallel=pipeline, virtual_pipeline_parallel=virtual,
        context_parallel=context, sequence_parallel=draw(st.booleans()), micro_batch_size=micro,
        global_batch_size=micro * data * pipeline * draw(small),
        recompute="full", recompute_method=method, recompute_layers=again,
    )  # fmt: skip
    return settings_of(shape=shape, layout=layout, nodes=nodes, ranks=ranks)


@st.composite
def doubtful_requests(draw: st.DrawFn) -> RunSettings:
    """Draw good settings with one or two sizes changed to anything."""
    request = draw(good_requests())
    for name in draw(st.lists(st.sampled_from([*SHAPE_FIELDS, *LAYOUT_FIELDS]), min_size=1, max_size=2)):
        request = changed(request, {name: draw(st.integers(min_value=1, max_value=50))})
    return request


SHAPE_FIELDS_TOLD = {"num_attention_heads", "num_query_groups", "hidden_size"}
REMEDY = re.compile(r"use (\w+) ([\d, or]+?)(?: with (\w+) (\d+))?$")


def remedies(problem: str) -> list[dict[str, int]]:
    """Return what a problem tells to use: fields and their values, for each of the sizes."""
    told = REMEDY.search(problem)
    assert told, problem
    more = {told[3]: int(told[4])} if told[3] else {}
    return [{told[1]: int(size), **more} for size in re.findall(r"\d+", told[2])]


def changed(request: RunSettings, fields: dict[str, int]) -> RunSettings:
    for name, value in fields.items():
        section = "model" if name in SHAPE_FIELDS else "layout"
        part = dataclasses.replace(getattr(request, section), **{name: value})
        request = dataclasses.replace(request, **{section: part})
    return request


def topic(problem: str) -> str:
    """Return a problem without its numbers and its remedy."""
    return re.sub(r"\d+", "N", problem.partition(";")[0])


@settings(at_any_speed, max_examples=400)
@given(doubtful_requests())
def test_the_sizes_that_a_problem_names_would_do(request: RunSettings) -> None:
    found = settings_problems(request)
    for problem in found:
        if "should be" in problem or "a product of" in problem:
            continue
        for fields in remedies(problem):
            left = settings_problems(changed(request, fields))
            assert topic(problem) not in map(topic, left), (problem, fields, left)
            if len(found) == 1 and SHAPE_FIELDS_TOLD & fields.keys():
                assert changed(request, fields).model.problems() == [], (problem, fields)
            elif len(found) == 1 and fields.keys() <= {"global_batch_size", "virtual_pipeline_parallel"}:
                assert [
                    other for other in left if "global_batch_size" not in other and "recompute_layers" not in other
                ] == [], (problem, fields)


@at_any_speed
@given(good_requests())
def test_sizes_that_divide_are_no_problem(request: RunSettings) -> None:
    assert settings_problems(request) == []


@settings(at_any_speed, max_examples=300)
@given(good_requests() | doubtful_requests())
def test_a_layout_without_problems_divides_everything(request: RunSettings) -> None:
    assume(not settings_problems(request))
    shape, layout = request.model, build_layout(request)
    tensor, pipeline = layout.tensor_parallel, layout.pipeline_parallel
    parts = 2 * layout.context_parallel if layout.context_parallel > 1 else 1
    assert request.data.sequence_length % parts == 0
    if layout.sequence_parallel:
        assert request.data.sequence_length // layout.context_parallel % tensor == 0
    assert layout.world_size == request.cluster.nodes * request.cluster.ranks_per_node
    assert shape.head_dim is not None or shape.head_size * shape.num_attention_heads == shape.hidden_size
    assert shape.num_attention_heads % tensor == shape.ffn_hidden_size % tensor == 0
    assert shape.num_query_groups % tensor == 0 or tensor % shape.num_query_groups == 0
    assert (shape.query_size + 2 * shape.key_size) % tensor == 0
    assert shape.num_layers % (pipeline * layout.virtual_pipeline_parallel) == 0
    assert layout.num_microbatches * layout.micro_batch_size * layout.data_parallel == layout.global_batch_size
    for first in range(0, layout.world_size, tensor):  # no tensor-parallel group leaves its node
        assert first // request.cluster.ranks_per_node == (first + tensor - 1) // request.cluster.ranks_per_node


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (("layout.tensor_parallel=64", "cluster.ranks_per_node=64"), "use tensor_parallel 4, 8, 16 or 32"),
        (("layout.tensor_parallel=16",), "use tensor_parallel 1, 2, 4 or 8"),
        (("layout.tensor_parallel=3",), "use tensor_parallel 1, 2, 4 or 8"),
        (("layout.tensor_parallel=3", "cluster.nodes=3"), "use tensor_parallel 1, 2, 4 or 8"),
        (("layout.pipeline_parallel=5", "cluster.nodes=5"), "use pipeline_parallel 1, 2 or 4"),
        (("layout.pipeline_parallel=32",), "use pipeline_parallel 2, 4, 8 or 16"),
        (("layout.pipeline_parallel=4", "layout.virtual_pipeline_parallel=5"),
         "use virtual_pipeline_parallel 2, 3, 4 or 6"),
        (("layout.virtual_pipeline_parallel=2",), "use virtual_pipeline_parallel 1"),
        (("layout.context_parallel=3",), "use context_parallel 1, 2, 4 or 8"),
        (("data.sequence_length=4092", "layout.context_parallel=4"), "use context_parallel 1, 2, 3 or 6"),
        (("layout.overlap_parameter_gather=true",), "needs overlap_gradient_reduce=true"),
        (("layout.bucket_parameters=1000000",), "set overlap_gradient_reduce=true, or bucket_parameters=0"),
        (("layout.recompute_layers=4",), "recompute=full, found none"),
        (("layout.recompute=full", "layout.recompute_layers=5"), "use recompute_layers 2, 3, 4 or 6"),
        (("layout.recompute=full", "layout.recompute_method=block", "layout.recompute_layers=60"),
         "use recompute_layers 45, 46, 47 or 48"),
        (("layout.global_batch_size=1000",), "use global_batch_size 896 or 1024"),
        (("layout.micro_batch_size=3",), "use global_batch_size 768 or 1152"),
        (("model.num_attention_heads=48",), "use num_attention_heads 8, 16, 32 or 64"),
        (("model.num_query_groups=5",), "use num_query_groups 1, 2, 4 or 8"),
        (("model.head_dim=127",), "use head_dim 126 or 128"),
        (("model.hidden_size=4095",), "use hidden_size 4032 or 4096"),
    ],
)  # fmt: skip
def test_a_size_of_solar_that_does_not_divide_is_answered_with_those_that_would(
    overrides: tuple[str, ...], remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("solar-10.7b", overrides)
    assert any(remedy in problem for problem in caught.value.problems), caught.value


@given(st.integers(min_value=1, max_value=3000))
@at_any_speed
def test_divisors_are_all_that_divide(total: int) -> None:
    assert divisors(total) == [n for n in range(1, total + 1) if total % n == 0]


def test_the_divisors_of_a_huge_mistyped_size_are_found_at_once() -> None:
    assert len(divisors(10**12)) == 169


def test_choices_lie_near_what_was_wanted() -> None:
    assert choose("tensor_parallel", divisors(64), 5) == "use tensor_parallel 1, 2, 4 or 8"
    assert choose("tensor_parallel", [], 5) == "no tensor_parallel would do"
