"""What a rehearsal trains: the settings of a real run on CPU ranks, its model shrunk. Pure.

How a run is launched, laid out, checked, saved, restarted and tracked stays as it is; sizes that only
cost time and memory shrink. A toy keeps what the layout is sensitive to: chunks of layers, heads a
group, a sequence that sequence parallelism can split, micro-batches that fill the pipeline. What a
person gives on the command line is kept, two things apart: the name, which the real run still needs,
and `training.tokens`, for which the number of steps stands.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

from orchestrator.checks import build_layout, settings_problems
from orchestrator.errors import ConfigError
from orchestrator.model_shape import TransformerShape, divisors
from orchestrator.plan import make_plan
from orchestrator.settings import ClusterSettings, LayoutSettings, PrecisionSettings, RunSettings
from orchestrator.units import format_bytes, format_count

T = TypeVar("T")

SUFFIX = "-rehearsal"
LONGEST_NAME = 100 - len(SUFFIX) - len("-99")
"""How much of the real name is kept: a run's has 100 characters at most."""
HIDDEN = 32
"""Width of the toy, unless its heads are so many that each would be too narrow."""
SEQUENCE = 32
"""Tokens a sample, rounded up for sequence parallelism."""
LARGEST_HEADS_PER_GROUP = 8
"""Where the real model has more, as with one group for all heads, the toy has not its ratio."""
OVER_ANY_CLUSTER = (
    "time_limit",
    "warning_seconds",
    "environment",
    "fork_ranks",
    "checks",
    "node_write_gb_per_second",
)
"""What a person gives of a cluster and means wherever the ranks run; the rest names things of one site."""


def rehearsal_settings(
    real: RunSettings,
    *,
    cluster: ClusterSettings,
    ranks_per_node: int,
    steps: int,
    spare_nodes: int = 0,
    given: frozenset[str] = frozenset(),
) -> RunSettings:
    """Return the settings of a real run's rehearsal.

    Args:
        cluster: where the rehearsal runs: a sandbox, or the profile of a real cluster with CPU nodes.
        ranks_per_node: CPU ranks on each of the real run's nodes.
        given: fields that a person set on the command line, `section.field` each; they keep their values.

    Raises:
        ConfigError: it cannot be run as it is, such as ranks that do not divide by the layout; all problems at once.
    """

    def chosen(field: str, value: int) -> int:
        return _value_at(real, field) if field in given else value

    place = _with_given(
        cpu_cluster(cluster, nodes=real.cluster.nodes, ranks_per_node=ranks_per_node, spare_nodes=spare_nodes),
        real.cluster,
        frozenset(field for field in given if any(name in OVER_ANY_CLUSTER for name in field.split(".")[1:2])),
        "cluster",
    )
    layout = real.layout
    tensor = max(1, layout.tensor_parallel)
    shape = toy_shape(real.model, tensor, layout.pipeline_parallel * layout.virtual_pipeline_parallel, chosen)
    multiple = max(1, math.lcm(tensor, build_layout(real).sequence_multiple))
    sequence = chosen("data.sequence_length", min(real.data.sequence_length, -(-SEQUENCE // multiple) * multiple))
    accumulated = min(2, build_layout(real).num_microbatches)  # so that gradients are summed where they will be
    pass_samples = layout.micro_batch_size * build_layout(dataclasses.replace(real, cluster=place)).data_parallel
    batch = chosen("layout.global_batch_size", pass_samples * max(layout.pipeline_parallel, accumulated))
    settings = dataclasses.replace(
        real,
        name=f"{real.name[:LONGEST_NAME]}{SUFFIX}",
        model=shape,
        data=dataclasses.replace(real.data, sequence_length=sequence, index="", stage_to=""),
        training=dataclasses.replace(
            real.training,
            tokens=steps * batch * sequence,
            warmup_steps=None,
            batch_ramp=(),
            frozen=(),  # by layers that the toy does not have
            validation_interval_steps=chosen("training.validation_interval_steps", max(1, steps)),
            validation_samples=chosen("training.validation_samples", pass_samples),
        ),
        layout=dataclasses.replace(
            layout, global_batch_size=batch, recompute_layers=_recompute_layers(layout, shape.num_layers)
        ),
        checkpoint=dataclasses.replace(
            real.checkpoint, interval_steps=chosen("checkpoint.interval_steps", max(1, steps // 2))
        ),
        precision=PrecisionSettings(dtype=real.precision.dtype),  # a CPU has no FP8; its kernels are not rehearsed
        cluster=place,
    )
    problems = settings_problems(settings)
    if problems:
        raise ConfigError(f"run {real.name} cannot be rehearsed as it is; {len(problems)} to mend:",
                          [*problems, *_ranks_that_divide(settings)])  # fmt: skip
    return settings


def _recompute_layers(layout: LayoutSettings, layers: int) -> int:
    """Return how many layers a toy of so many can recompute at once."""
    held = max(1, layers // max(1, layout.pipeline_parallel * layout.virtual_pipeline_parallel))
    return math.gcd(layout.recompute_layers, held)


def cpu_cluster(profile: ClusterSettings, *, nodes: int, ranks_per_node: int, spare_nodes: int = 0) -> ClusterSettings:
    """Return a cluster with CPU ranks on so many of its nodes; a profile with GPUs asks for none of them."""
    slurm = profile.slurm
    if profile.device == "cuda":
        slurm = dataclasses.replace(slurm, gpus="none", gpu_type=None)
    return dataclasses.replace(
        profile,
        device="cpu",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        spare_nodes=spare_nodes,
        gpu="",
        gpu_memory_gb=None,
        peak_tflops=None,
        price_per_gpu_hour=None,
        fork_ranks=profile.fork_ranks and profile.one_machine,
        slurm=slurm,
    )


def toy_shape(
    shape: TransformerShape, tensor_parallel: int, chunks: int, chosen: Callable[[str, int], int]
) -> TransformerShape:
    """Return a small shape that the layout splits as it does the real one; the vocabulary stays.

    Args:
        chunks: of layers, over all pipeline ranks.
        chosen: returns the value of a field, given the one proposed here.
    """
    groups = chosen("model.num_query_groups", tensor_parallel)
    ratio = max(
        n for n in divisors(shape.num_attention_heads // shape.num_query_groups) if n <= LARGEST_HEADS_PER_GROUP
    )
    heads = chosen("model.num_attention_heads", groups * ratio)
    hidden = chosen("model.hidden_size", heads * max(2, HIDDEN // heads // 2 * 2))
    return dataclasses.replace(
        shape,
        num_layers=chosen("model.num_layers", toy_layers(chunks)),
        hidden_size=hidden,
        ffn_hidden_size=chosen("model.ffn_hidden_size", 3 * hidden),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=None,
    )


def toy_layers(chunks: int) -> int:
    """Return the fewest layers that the chunks divide and SOLAR's rule makes of a base of which it drops some.

    2 (n - m) of n layers, so an even number; with m > 0 four at least.
    """
    unit = math.lcm(max(1, chunks), 2)
    return max(unit, -(-4 // unit) * unit)


def unused_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """Return a name, or with the first free number behind it: NAME-2, NAME-3."""
    number, found = 1, name
    while is_taken(found):
        number += 1
        found = f"{name}-{number}"
    return found


def differences(real: RunSettings, rehearsal: RunSettings) -> list[tuple[str, str, str]]:
    """Return what is another thing in the rehearsal: its name, the real run's value, the rehearsal's."""
    before, after = _facts(real), _facts(rehearsal)
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


def in_common(real: RunSettings, rehearsal: RunSettings) -> list[tuple[str, str]]:
    """Return what is rehearsed as it will be: its name and its value."""
    before, after = _facts(real), _facts(rehearsal)
    return [(name, before[name]) for name in before if before[name] == after[name]]


def _facts(settings: RunSettings) -> dict[str, str]:
    """Return a run in words that a person compares."""
    plan = make_plan(settings)
    cluster, layout, shape = settings.cluster, plan.layout, settings.model
    nodes = f"{cluster.nodes}" + (f" and {cluster.spare_nodes} to spare" if cluster.spare_nodes else "")
    if cluster.device == "cuda":
        device = f"{cluster.gpu or 'GPU'}: CUDA kernels, NCCL, GPU memory"
    else:
        device = "CPU, gloo: nothing is learnt of kernels, NCCL, GPU memory or speed"
    grid = f"TP {layout.tensor_parallel} × PP {layout.pipeline_parallel}"
    grid += f" × CP {layout.context_parallel}" if layout.context_parallel > 1 else ""
    grid += f" × VPP {layout.virtual_pipeline_parallel}" if layout.virtual_pipeline_parallel > 1 else ""
    container = cluster.container
    starts = f"forked on {cluster.name}" if cluster.fork_ranks else f"by {cluster.scheduler} on {cluster.name}"
    return {
        "nodes": nodes,
        "machines": "this one alone" if cluster.one_machine else "one a node",
        "ranks": f"{cluster.nodes} x {cluster.ranks_per_node} = {layout.world_size}",
        "rank starts": starts,
        "device": device,
        "container": "none" if container.runtime == "none" else f"{container.runtime} {container.image}",
        "grid": grid + (", sequence parallel" if layout.sequence_parallel else ""),
        "data parallel": f"{layout.data_parallel}",
        "micro batch": f"{layout.micro_batch_size}",
        "micro-batches": f"{layout.num_microbatches} a step",
        "batch ramp": ", ".join(str(each.global_batch_size) for each in settings.training.batch_ramp) or "none",
        "frozen": ", ".join(f"{each.what} for {each.steps:,} steps" for each in settings.training.frozen) or "nothing",
        "precision": settings.precision.label,
        "layers": f"{shape.num_layers}",
        "width": f"{shape.hidden_size}, {shape.num_attention_heads} heads in {shape.num_query_groups} groups",
        "vocabulary": f"{shape.vocab_size}",
        "parameters": format_count(plan.parameters),
        "sample": f"{settings.data.sequence_length} tokens",
        "steps": f"{plan.total_steps:,} of {format_count(plan.tokens_per_step)} tokens",
        "checkpoint": f"{format_bytes(plan.checkpoint_bytes)} every {settings.checkpoint.interval_steps} steps",
        "base": settings.base,
        "data": ", ".join(settings.data.train),
        "tracking": f"experiment {settings.tracking.experiment}",
    }


def _ranks_that_divide(settings: RunSettings) -> list[str]:
    """Return the remedy of a rehearsal alone for ranks that do not divide: other ranks on each node."""
    cluster = settings.cluster
    unit = settings.layout.tensor_parallel * settings.layout.pipeline_parallel
    if min(unit, cluster.nodes, cluster.ranks_per_node) < 1 or cluster.nodes * cluster.ranks_per_node % unit == 0:
        return []
    fitting = unit // math.gcd(unit, cluster.nodes)
    return [f"--ranks-per-node {fitting} gives {cluster.nodes * fitting} ranks, which the layout as it is divides"]


def _value_at(settings: RunSettings, field: str) -> int:
    section, _, name = field.partition(".")
    value: int = getattr(getattr(settings, section), name)
    return value


def _with_given(lower: T, upper: T, given: frozenset[str], path: str) -> T:
    """Return `lower` with the fields of `upper` that were given, also within its parts."""
    changes: dict[str, object] = {}
    for field in dataclasses.fields(lower):  # type: ignore[arg-type]
        where = f"{path}.{field.name}"
        below, above = getattr(lower, field.name), getattr(upper, field.name)
        if where in given:
            changes[field.name] = above
        elif dataclasses.is_dataclass(below):
            changes[field.name] = _with_given(below, above, given, where)
        elif isinstance(below, dict):
            changes[field.name] = below | {key: value for key, value in above.items() if f"{where}.{key}" in given}
    return dataclasses.replace(lower, **changes)  # type: ignore[type-var]
