"""What can be known to be wrong with settings before anything is touched, and the rank grid they give. Pure."""

from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import could_be
from orchestrator.settings import RunSettings
from orchestrator.units import format_count


def build_layout(settings: RunSettings) -> ParallelLayout:
    """Return the rank grid of checked settings; data parallelism is what is left of the ranks."""
    chosen = settings.layout
    ranks = settings.cluster.nodes * settings.cluster.ranks_per_node
    return ParallelLayout(
        tensor_parallel=chosen.tensor_parallel,
        pipeline_parallel=chosen.pipeline_parallel,
        virtual_pipeline_parallel=chosen.virtual_pipeline_parallel,
        sequence_parallel=chosen.sequence_parallel,
        micro_batch_size=chosen.micro_batch_size,
        global_batch_size=chosen.global_batch_size,
        data_parallel=max(1, ranks // max(1, chosen.tensor_parallel * chosen.pipeline_parallel)),
    )


def settings_problems(settings: RunSettings) -> list[str]:
    """Return everything that can be known to be wrong without looking at a disk, each with its remedy."""
    found = settings.model.problems()
    data, training, cluster, chosen = settings.data, settings.training, settings.cluster, settings.layout
    if "/" in settings.name or settings.name.startswith(".") or not settings.name:
        found.append(f"name={settings.name!r} should be a plain folder name; use letters, digits, dots and dashes")
    if not 0 < data.sequence_length <= settings.model.max_position_embeddings:
        found.append(
            f"data.sequence_length={data.sequence_length} should be between 1 and "
            f"model.max_position_embeddings={settings.model.max_position_embeddings}"
        )
    if data.weights and len(data.weights) != len(data.train):
        found.append(f"data.weights has {len(data.weights)} entries for {len(data.train)} data sets; give one each")
    if not data.train:
        found.append("data.train names no data set; give the folder that `orchestrate tokenize` wrote")
    if not 0 <= training.warmup_share < 1:
        found.append(f"training.warmup_share={training.warmup_share} should be from 0 to below 1")
    if not 0 <= training.minimum_learning_rate <= training.learning_rate:
        found.append(
            f"training.minimum_learning_rate={training.minimum_learning_rate} should be from 0 to "
            f"training.learning_rate={training.learning_rate}"
        )
    tokens_per_step = chosen.global_batch_size * data.sequence_length
    if training.tokens < tokens_per_step:
        found.append(
            f"training.tokens={training.tokens} is below one step of {format_count(tokens_per_step)} tokens; "
            f"use at least {tokens_per_step}"
        )
    for name, value in (
        ("checkpoint.interval_steps", settings.checkpoint.interval_steps),
        ("training.validation_interval_steps", training.validation_interval_steps),
        ("training.validation_samples", training.validation_samples),
        ("cluster.nodes", cluster.nodes),
        ("cluster.ranks_per_node", cluster.ranks_per_node),
    ):
        if value < 1:
            found.append(f"{name} should be at least 1, found {value}")
    if time_limit_seconds(cluster.time_limit) is None:
        found.append(f"cluster.time_limit={cluster.time_limit!r} should be [days-]hours:minutes:seconds")
    if cluster.scheduler == "local" and cluster.nodes != 1:
        found.append(f"cluster.nodes={cluster.nodes} needs a cluster; {cluster.name} is this machine alone, use 1")
    ranks = max(1, cluster.nodes * cluster.ranks_per_node)
    grid = chosen.tensor_parallel * chosen.pipeline_parallel
    if grid > 0 and ranks % grid:
        found.append(
            f"cluster has {cluster.nodes} x {cluster.ranks_per_node} = {ranks} ranks, which do not divide by "
            f"layout.tensor_parallel={chosen.tensor_parallel} x pipeline_parallel={chosen.pipeline_parallel}; "
            f"their product could be: {could_be(ranks, grid)}"
        )
    if not found:
        found += build_layout(settings).problems(settings.model, data.sequence_length, cluster.ranks_per_node)
    return found


def time_limit_seconds(text: str) -> int | None:
    """Return the seconds of [days-]hours:minutes:seconds, or None where it is not so written."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in [*parts, days or "0"]):
        return None
    hours, minutes, seconds = map(int, parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
