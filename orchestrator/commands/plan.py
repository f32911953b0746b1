"""`orchestrate plan`: what a recipe would do, without starting anything."""

import click

from orchestrator.commands.request import request_options, requested_settings


@click.command(name="plan", short_help="Show layout, memory, steps and cost of a recipe.")
@request_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe: str, overrides: tuple[str, ...], nodes: int | None, as_json: bool) -> None:
    """Show layout, memory, steps and cost of RECIPE, without starting anything.

    RECIPE is a name in conf/recipe or the path of a YAML file; OVERRIDES read section.field=value.
    Data and base are not looked at: `orchestrate launch` does.
    """
    from orchestrator.plan import make_plan
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain

    plan = make_plan(requested_settings(recipe, overrides, nodes))
    if as_json:
        print_json(to_plain(plan))
        return
    show_plan(plan)
    print_next(f"orchestrate launch {' '.join([recipe, *overrides])}" + (f" --nodes {nodes}" if nodes else ""))


def show_plan(plan: "object") -> None:
    """Print a plan as people read it."""
    from orchestrator.plan import MFU_SCENARIOS, TrainingPlan
    from orchestrator.screen import print_facts, print_table
    from orchestrator.units import format_bytes, format_count, format_duration

    assert isinstance(plan, TrainingPlan)
    settings, layout = plan.settings, plan.layout
    cluster, training, shape = settings.cluster, settings.training, settings.model
    memory = f"{format_bytes(plan.static_bytes_per_rank)} of weights, gradients and optimizer on the fullest rank"
    if cluster.gpu_memory_gb is not None:
        memory += f", of {cluster.gpu_memory_gb:.1f} GB; activations are not counted"
    ranks = "ranks" if layout.world_size > 1 else "rank"
    print_facts(
        f"{settings.name}",
        [
            ("base", settings.base),
            ("model", f"{shape.num_layers} layers of {shape.hidden_size}, {plan.parameters:,} parameters"),
            ("data", ", ".join(settings.data.train)),
            ("cluster", f"{cluster.name}: {cluster.nodes} x {cluster.ranks_per_node} = {layout.world_size} {ranks} on "
                        f"{cluster.gpu or cluster.device}"),  # fmt: skip
            ("layout", layout.describe()),
            ("batch", f"{layout.global_batch_size} sequences of {settings.data.sequence_length} = "
                      f"{format_count(plan.tokens_per_step)} tokens a step, {layout.num_microbatches} micro-batches of "
                      f"{layout.micro_batch_size} a pipeline"),  # fmt: skip
            ("steps", f"{plan.total_steps:,} for {format_count(plan.total_tokens)} tokens, {training.precision}"),
            ("rate", f"{training.learning_rate:g}, {training.decay} to {training.minimum_learning_rate:g}, warm-up over "
                     f"{training.warmup_share:.1%} of the steps"),  # fmt: skip
            ("FLOPs", f"{plan.flops_per_token / 1e9:.2f} G a token, forward and backward, causal half of the attention"),
            ("memory", memory),
            ("checkpoint", f"{format_bytes(plan.checkpoint_bytes)} every {settings.checkpoint.interval_steps} steps"),
            ("job", f"{cluster.time_limit} each, told to save {cluster.warning_seconds} s before its end"),
        ],
    )  # fmt: skip
    rows = []
    for mfu in MFU_SCENARIOS:
        seconds = plan.seconds_at(mfu)
        if seconds is not None:
            hours = seconds / 3600 * layout.world_size
            cost = f"{hours * cluster.price_per_gpu_hour:,.0f}" if cluster.price_per_gpu_hour else "no price set"
            speed = plan.total_tokens / seconds / layout.world_size
            rows.append((f"{mfu:.0%}", f"{speed:,.0f}", format_duration(seconds), f"{hours:,.0f}", cost))
    if rows:
        print_table(("if MFU were", "tokens/s a GPU", "time", "GPU hours", "cost"), rows, right=(1, 2, 3, 4))
