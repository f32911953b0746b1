"""What can be known to be wrong with settings before anything is touched, and the rank grid they give. Pure."""

import dataclasses
import math
import re
from collections.abc import Sequence

from orchestrator.fp8_rules import fp8_problems
from orchestrator.gpu_environment import environment_problems
from orchestrator.layout import ParallelLayout, splits_groups
from orchestrator.model_shape import choose, divisors
from orchestrator.schedule_checks import schedule_problems
from orchestrator.settings import ClusterSettings, NumericsSettings, RunSettings, SlurmSettings
from orchestrator.traced_steps import profile_problems
from orchestrator.units import format_bytes


def build_layout(settings: RunSettings) -> ParallelLayout:
    """Return the rank grid of checked settings; data parallelism is what is left of the ranks."""
    chosen = settings.layout
    ranks = settings.cluster.nodes * settings.cluster.ranks_per_node
    model_ranks = chosen.tensor_parallel * chosen.context_parallel * chosen.pipeline_parallel
    # Every field of the settings is one of the layout.
    return ParallelLayout(**dataclasses.asdict(chosen), data_parallel=max(1, ranks // max(1, model_ranks)))


def settings_problems(settings: RunSettings) -> list[str]:
    """Return everything that can be known to be wrong without looking at a disk, each with its remedy."""
    shape_problems = settings.model.problems()
    found = [
        *_name_problems(settings.name),
        *shape_problems,
        *_data_problems(settings),
        *_training_problems(settings),
        *_numerics_problems(settings.numerics),
        *_cluster_problems(settings),
        *_secret_problems(settings),
    ]
    grid_problems = _grid_problems(settings)
    found += grid_problems
    layout, is_sound = None, False
    if not shape_problems and not grid_problems and settings.data.sequence_length > 0:
        layout = build_layout(settings)
        cluster = settings.cluster
        # Links between GPUs of a node are why tensor parallelism stays in one; between CPU ranks there are none.
        within = cluster.ranks_per_node if cluster.device == "cuda" else layout.world_size
        layout_problems = layout.problems(settings.model, settings.data.sequence_length, within)
        found += layout_problems
        found += profile_problems(settings.profile, layout.world_size)
        found += environment_problems(settings, layout)
        is_sound = not layout_problems
    found += fp8_problems(settings, layout if is_sound else None)
    found += schedule_problems(settings, layout)
    return found


def _name_problems(name: str) -> list[str]:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) and name != "last":
        return []
    return [f"name={name!r} should be a plain folder name and not `last`; use letters, digits, dots, dashes and _"]


def _data_problems(settings: RunSettings) -> list[str]:
    data = settings.data
    found = []
    if not 0 < data.sequence_length <= settings.model.max_position_embeddings:
        found.append(
            f"data.sequence_length={data.sequence_length} should be between 1 and "
            f"model.max_position_embeddings={settings.model.max_position_embeddings}"
        )
    found += _blend_problems("data", data.train, data.weights)
    before = 0
    for number, phase in enumerate(data.phases):
        found += _blend_problems(f"data.phases[{number}]", phase.train, phase.weights)
        if phase.from_tokens <= before:
            found.append(
                f"data.phases[{number}].from_tokens={phase.from_tokens} should be above {before}, where the phase "
                "before it begins"
            )
        before = phase.from_tokens
    if data.stage_to and not data.stage_to.startswith("/"):
        found.append(f"data.stage_to={data.stage_to} should be the absolute path of a folder on each node")
    if not 0 < data.wait_alarm_share < math.inf:
        found.append(f"data.wait_alarm_share={data.wait_alarm_share} should be above 0; 1 and more tells nothing")
    return found


def _blend_problems(where: str, train: Sequence[str], weights: Sequence[float]) -> list[str]:
    found = []
    if not train:
        found.append(f"{where}.train names no data set; give the folder that `orchestrate tokenize` wrote")
    if weights and len(weights) != len(train):
        found.append(f"{where}.weights has {len(weights)} entries for {len(train)} data sets; give one each")
    if not all(0 < weight < math.inf for weight in weights):
        found.append(f"{where}.weights={list(weights)} should all be above 0; leave a data set out instead")
    return found


def _training_problems(settings: RunSettings) -> list[str]:
    training, layout = settings.training, settings.layout
    found = []
    for name, value, low, high in (
        ("adam_beta1", training.adam_beta1, 0.0, 1.0),
        ("adam_beta2", training.adam_beta2, 0.0, 1.0),
        ("weight_decay", training.weight_decay, 0.0, math.inf),
    ):
        if not low <= value < high:
            found.append(f"training.{name}={value} should be from {low:g} to below {high:g}")
    for name, value in (("adam_eps", training.adam_eps), ("gradient_clip", training.gradient_clip)):
        if not 0 < value < math.inf:
            found.append(f"training.{name}={value} should be above 0")
    if not 0 <= training.seed < 2**31:
        found.append(f"training.seed={training.seed} should be from 0 to below 2147483648")
    tokens_per_step = layout.global_batch_size * settings.data.sequence_length
    if training.tokens < max(1, tokens_per_step):
        found.append(
            f"training.tokens={training.tokens} is below one step of {max(0, tokens_per_step):,} tokens; "
            f"use at least {max(1, tokens_per_step)}"
        )
    for name, value in (
        ("checkpoint.interval_steps", settings.checkpoint.interval_steps),
        ("checkpoint.keep_last", settings.checkpoint.keep_last),
        ("training.validation_interval_steps", training.validation_interval_steps),
        ("training.validation_samples", training.validation_samples),
        ("max_restarts_without_progress", settings.max_restarts_without_progress),
        ("max_preemptions_without_progress", settings.max_preemptions_without_progress),
        *((f"patience.{name}", seconds) for name, seconds in dataclasses.asdict(settings.patience).items()),
    ):
        if not 1 <= value < math.inf:
            found.append(f"{name} should be at least 1, found {value}")
    for name, value in (
        ("keep_every_steps", settings.checkpoint.keep_every_steps),
        ("keep_best", settings.checkpoint.keep_best),
    ):
        if value < 0:
            found.append(f"checkpoint.{name} should be 0 or more, found {value}")
    return found


def _numerics_problems(numerics: NumericsSettings) -> list[str]:
    found = []
    if numerics.window < 8:
        found.append(f"numerics.window={numerics.window} should be at least 8 steps; fewer have no median to speak of")
    if not (numerics.spike_score == 0 or 3 <= numerics.spike_score < math.inf):
        found.append(
            f"numerics.spike_score={numerics.spike_score} should be 0 for none, or at least 3: less is ordinary noise"
        )
    for name, least in (
        ("max_skipped_steps", 0),
        ("max_hardware_events", 1),
        ("replica_check_steps", 0),
        ("rank_time_steps", 0),
    ):
        if getattr(numerics, name) < least:
            found.append(f"numerics.{name}={getattr(numerics, name)} should be at least {least}")
    return found


def _cluster_problems(settings: RunSettings) -> list[str]:
    cluster = settings.cluster
    found = []
    limit = time_limit_seconds(cluster.time_limit)
    if limit is None:
        found.append(f"cluster.time_limit={cluster.time_limit!r} should be [days-]hours:minutes:seconds")
    elif limit < 60:
        found.append(f"cluster.time_limit={cluster.time_limit} should be at least a minute, which is Slurm's unit")
    elif not 0 <= cluster.warning_seconds < limit:
        found.append(
            f"cluster.warning_seconds={cluster.warning_seconds} should be from 0 to below "
            f"cluster.time_limit={cluster.time_limit}"
        )
    elif cluster.scheduler == "slurm" and cluster.nodes > 0 and 0 < cluster.node_write_gb_per_second < math.inf:
        found += _save_problems(settings, limit)
    for name, value in (
        ("peak_tflops", cluster.peak_tflops),
        ("gpu_memory_gb", cluster.gpu_memory_gb),
        ("node_write_gb_per_second", cluster.node_write_gb_per_second),
        ("price_per_gpu_hour", cluster.price_per_gpu_hour),
    ):
        is_possible = value is None or 0 < value < math.inf or (name == "price_per_gpu_hour" and value == 0)
        if not is_possible:
            found.append(f"cluster.{name}={value} should be above 0; leave it out where it is not known")
    if cluster.spare_nodes < 0:
        found.append(f"cluster.spare_nodes should be 0 or more, found {cluster.spare_nodes}")
    if cluster.scheduler == "local" and (cluster.nodes > 1 or cluster.spare_nodes > 0):
        found.append(
            f"cluster.nodes={cluster.nodes} with spare_nodes={cluster.spare_nodes} needs a cluster; {cluster.name} is "
            "this machine alone, use 1 and 0"
        )
    is_one_machine = cluster.one_machine or cluster.scheduler == "local"
    if cluster.fork_ranks and cluster.device == "cpu" and not is_one_machine:
        found.append(
            f"cluster.fork_ranks=true needs one_machine=true, found one_machine={str(cluster.one_machine).lower()}; "
            "set fork_ranks=false, and each rank is started by itself"
        )
    return [*found, *_slurm_problems(cluster.slurm), *_container_problems(cluster), *_variable_problems(cluster)]


def save_seconds(settings: RunSettings) -> float:
    """Return how long a save takes at least, in seconds: each node writes its share of a checkpoint as fast as it can.

    12 bytes a parameter: fp32 weights and two moments. The step under way is not in it.
    """
    cluster = settings.cluster
    return settings.model.parameters() * 12 / (cluster.nodes * cluster.node_write_gb_per_second * 1e9)


def _save_problems(settings: RunSettings, limit_seconds: int) -> list[str]:
    """Return whether there is no time to save between the warning and the end of a job."""
    cluster, needed = settings.cluster, int(save_seconds(settings))
    if cluster.warning_seconds >= needed:
        return []
    what = (
        f"a save of {format_bytes(settings.model.parameters() * 12)} takes at least {needed} s on {cluster.nodes} "
        f"nodes at cluster.node_write_gb_per_second={cluster.node_write_gb_per_second:g}"
    )
    if limit_seconds <= needed:
        return [f"cluster.time_limit={cluster.time_limit} is too short: {what}; allow some times as much"]
    return [
        f"cluster.warning_seconds={cluster.warning_seconds} is too short: {what}; set it to at least {needed} and a "
        "step, or the speed that was measured"
    ]


def _slurm_problems(slurm: SlurmSettings) -> list[str]:
    found = []
    if slurm.cpus_per_rank is not None and slurm.cpus_per_rank < 1:
        found.append(f"cluster.slurm.cpus_per_rank should be at least 1, found {slurm.cpus_per_rank}")
    if slurm.gpu_type and slurm.gpus == "none":
        found.append(
            f"cluster.slurm.gpu_type={slurm.gpu_type} is asked for with gpus=none; choose gres or gpus-per-node"
        )
    for name, lines in (("sbatch_lines", slurm.sbatch_lines), ("srun_lines", slurm.srun_lines)):
        found += [
            f"cluster.slurm.{name} has {line!r}, which is no option; write it as --name=value"
            for line in lines
            if not line.startswith("-") or "\n" in line
        ]
    return found


def _container_problems(cluster: ClusterSettings) -> list[str]:
    container = cluster.container
    if container.runtime == "none":
        if container.image:
            return [f"cluster.container.image={container.image} needs a runtime; set cluster.container.runtime"]
        return []
    what = f"cluster.container.runtime={container.runtime}"
    found = []
    if not container.image:
        found.append(f"{what} needs an image; set cluster.container.image to a file of the shared disk")
    elif container.image.startswith(("~", ".")) or re.fullmatch(r"[^/:#]+\.(sqsh|squashfs|sif|img)", container.image):
        found.append(f"cluster.container.image={container.image} should be a whole path, beginning with /")
    if cluster.worker_python is None:
        found.append(f"{what} needs cluster.worker_python, the interpreter in the image, such as /usr/bin/python3")
    if cluster.scheduler == "local" or cluster.fork_ranks:
        found.append(f"{what} needs ranks that srun starts; set it to none for scheduler=local and for fork_ranks=true")
    found += [
        f"cluster.container.mounts has {mount!r}, which should read /from:/to or /from:/to:ro"
        for mount in container.mounts
        if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", mount)
    ]
    return found


def _variable_problems(cluster: ClusterSettings) -> list[str]:
    found = [
        f"cluster.environment has {name!r}, which is no name of a variable; use letters, digits and _"
        for name in cluster.environment
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    ]
    found += [
        f"cluster.environment.{name} would hide the run's own copy of the code; leave it out, and install what ranks "
        "need for cluster.worker_python"
        for name in ("PYTHONPATH", "PYTHONSAFEPATH")
        if name in cluster.environment
    ]
    return found


def _secret_problems(settings: RunSettings) -> list[str]:
    """Return what must not lie in a run's folder, which the group may read."""
    cluster = settings.cluster
    secret = r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY"
    remedy = (
        "looks like a secret, and a run's folder is read by others; export it in the shell that launches, the job "
        "inherits it"
    )
    found = [f"cluster.environment.{name} {remedy}" for name in cluster.environment if re.search(secret, name.upper())]
    for field, lines in (
        ("slurm.setup", cluster.slurm.setup),
        ("slurm.pre_command", cluster.slurm.pre_command),
        ("slurm.sbatch_lines", cluster.slurm.sbatch_lines),
        ("slurm.srun_lines", cluster.slurm.srun_lines),
        ("container.arguments", cluster.container.arguments),
    ):
        # NAME=value, but not NAME=$OTHER or NAME=$(...), which is read on the node.
        names = re.findall(rf"\b(\w*(?:{secret})\w*)=(?!\"?\$)\S", "\n".join(lines), re.IGNORECASE)
        found += [f"cluster.{field}: {name} {remedy}" for name in names]
    if re.search(r"//[^/@]*:[^/@]*@", settings.tracking.uri):
        found.append(
            "tracking.uri holds a password, and a run's folder is read by others; leave it out of the address and "
            "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return found


def _grid_problems(settings: RunSettings) -> list[str]:
    """Return what keeps the ranks from forming a grid at all."""
    cluster, chosen = settings.cluster, settings.layout
    found = [
        f"cluster.{name} should be at least 1, found {value}"
        for name, value in (("nodes", cluster.nodes), ("ranks_per_node", cluster.ranks_per_node))
        if value < 1
    ]
    ranks, tensor, pipeline = cluster.nodes * cluster.ranks_per_node, chosen.tensor_parallel, chosen.pipeline_parallel
    context = chosen.context_parallel
    if found or tensor < 1 or pipeline < 1 or context < 1 or ranks % (tensor * context * pipeline) == 0:
        return found
    ranks_of_each = ranks // context
    if context > 1 and ranks % (tensor * pipeline) == 0:
        remedy = choose("context_parallel", divisors(ranks // (tensor * pipeline)), context)
    elif ranks % context:
        remedy = choose("a product of", divisors(ranks), tensor * context * pipeline)
    elif ranks_of_each % pipeline == 0:
        shape = settings.model
        sizes = divisors(math.gcd(ranks_of_each // pipeline, cluster.ranks_per_node, max(1, shape.num_attention_heads)))
        remedy = choose("tensor_parallel", [n for n in sizes if shape.problems() or splits_groups(shape, n)], tensor)
    elif ranks_of_each % tensor == 0:
        layers = math.gcd(ranks_of_each // tensor, max(1, settings.model.num_layers))
        remedy = choose("pipeline_parallel", divisors(layers), pipeline)
    else:
        remedy = choose("a product of", divisors(ranks_of_each), tensor * pipeline)
    return [
        f"cluster has {cluster.nodes} x {cluster.ranks_per_node} = {ranks} ranks, which do not divide by "
        f"layout.tensor_parallel={tensor} x "
        + (f"context_parallel={context} x " if context > 1 else "")
        + f"pipeline_parallel={pipeline}; {remedy}"
    ]


def time_limit_seconds(text: str) -> int | None:
    """Return the seconds of [days-]hours:minutes:seconds, or None where it is not so written."""
    parts = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)", text)
    if parts is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
