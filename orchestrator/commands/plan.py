"""`orchestrate plan`: what a recipe would do, without starting anything."""

from typing import TYPE_CHECKING

import click

from orchestrator.commands.request import launch_command, request_options, requested_settings

if TYPE_CHECKING:
    from orchestrator.plan import TrainingPlan


@click.command(name="plan", short_help="Show layout, memory, steps and cost of a recipe.")
@request_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe: str, overrides: tuple[str, ...], nodes: int | None, as_json: bool) -> None:
    """Show layout, memory, schedule, steps and cost of RECIPE, without starting anything.

    RECIPE is a name in conf/recipe or the path of a YAML file; OVERRIDES read section.field=value.
    Data and base are not looked at: `orchestrate launch` does.
    """
    from orchestrator.fp8_rules import fp8_plan
    from orchestrator.plan import make_plan
    from orchestrator.schedule_table import schedule_rows
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain

    plan = make_plan(requested_settings(recipe, overrides, nodes))
    if as_json:
        fp8 = fp8_plan(plan.settings, plan.layout)
        shown = {**to_plain(plan), "schedule": to_plain(schedule_rows(plan))}
        print_json({**shown, "fp8": to_plain(fp8)} if fp8 is not None else shown)
        return
    show_plan(plan)
    print_next(launch_command(recipe, overrides, nodes))


def show_plan(plan: "TrainingPlan") -> None:
    """Print a plan as people read it."""
    import shutil
    from pathlib import Path

    from orchestrator.plan import MFU_SCENARIOS
    from orchestrator.retention import kept_at_most
    from orchestrator.screen import print_facts, print_table
    from orchestrator.units import format_bytes, format_count, format_duration

    settings, layout = plan.settings, plan.layout
    cluster, training, shape, precision = settings.cluster, settings.training, settings.model, settings.precision
    memory = f"{format_bytes(plan.static_bytes_per_rank)} of weights, gradients and optimizer on the fullest rank"
    if cluster.gpu_memory_gb is not None:
        memory += f", of {cluster.gpu_memory_gb:.1f} GB; activations are not counted"
    flops = f"{plan.flops_per_token / 1e9:.2f} G" if plan.flops_per_token >= 1e9 else format_count(plan.flops_per_token)
    ranks = "ranks" if layout.world_size > 1 else "rank"
    place = (
        f"{cluster.nodes} x {cluster.ranks_per_node} = {layout.world_size} {ranks} on {cluster.gpu or cluster.device}"
    )
    if cluster.spare_nodes:
        place += f", and {cluster.spare_nodes} spare node{'s' if cluster.spare_nodes > 1 else ''} that idle"
    ramp = "at last " if training.batch_ramp else ""
    batch = f"{ramp}{layout.global_batch_size} sequences of {settings.data.sequence_length}"
    batch += f" = {format_count(plan.tokens_per_step)} tokens a step, {layout.num_microbatches} micro-batches"
    interval, count = settings.checkpoint.interval_steps, kept_at_most(plan.total_steps, settings.checkpoint)
    checkpoints = f"{format_bytes(plan.checkpoint_bytes)} every {interval} steps, at most {count} at once"
    disk = f"{format_bytes(count * plan.checkpoint_bytes)} of checkpoints"
    runs = Path(settings.paths.runs)
    there = next((folder for folder in (runs, *runs.parents) if folder.exists()), None)
    if there is not None:
        disk += f", {format_bytes(shutil.disk_usage(there).free)} are free on {there}"
    facts = [
        ("base", _with_note(settings.base)),
        ("model", f"{shape.num_layers} layers of {shape.hidden_size}, {plan.parameters:,} parameters"),
        ("data", ", ".join(map(_with_note, settings.data.train))),
        *(
            ("phase", f"from {format_count(phase.from_tokens)} tokens on: {', '.join(map(_with_note, phase.train))}")
            for phase in settings.data.phases
        ),
        ("cluster", f"{cluster.name}: {place}"),
        ("layout", layout.describe()),
        ("batch", f"{batch} of {layout.micro_batch_size} a pipeline"),
        ("steps", f"{plan.total_steps:,} for {format_count(plan.total_tokens)} tokens, {precision.label}"),
        ("FLOPs", f"{flops} a token, forward and backward, causal half of the attention"),
        ("memory", memory),
        ("checkpoint", checkpoints),
        ("disk", disk),
        ("job", f"{cluster.time_limit} each, told to save {cluster.warning_seconds} s before its end"),
    ]
    print_facts(settings.name, facts)
    _show_schedule(plan)
    _show_fp8(plan)
    rows = []
    for mfu in MFU_SCENARIOS:
        seconds = plan.seconds_at(mfu)
        if seconds is not None:
            hours = seconds / 3600 * layout.world_size
            cost = f"{hours * cluster.price_per_gpu_hour:,.0f}" if cluster.price_per_gpu_hour else "no price set"
            speed = plan.total_tokens / seconds / layout.world_size
            rows.append((f"{mfu:.0%}", f"{speed:,.0f}", format_duration(seconds), f"{hours:,.0f}", cost))
    if rows:
        share = "if MFU were" if precision.fp8 == "none" else "if MFU of bf16 were"  # the peak is bf16's
        print_table((share, "tokens/s a GPU", "time", "GPU hours", "cost"), rows, right=(1, 2, 3, 4))


def _show_schedule(plan: "TrainingPlan") -> None:
    """Print rate and batch over tokens as lines, and what holds from which step to which."""
    from orchestrator.schedule_table import schedule_lines, schedule_rows
    from orchestrator.screen import print_facts, print_table
    from orchestrator.units import format_count

    print_facts("", [(f"{name:<10}", line) for name, line in schedule_lines(plan, 60)])
    rows = []
    for row in schedule_rows(plan):
        values = [value for value in (row.begins_with, row.ends_with) if value is not None]
        ends = [f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in values]
        rows.append(
            (
                row.what,
                f"{row.first_step:,} to {row.last_step:,}",
                f"{format_count(row.first_token)} to {format_count(row.last_token)}",
                " to ".join(dict.fromkeys(ends)),
            )
        )
    print_table(("schedule", "steps", "tokens", "rate or sequences"), rows)


def _show_fp8(plan: "TrainingPlan") -> None:
    """Print what a rank multiplies in FP8, what stays in bf16, and what is doubtful; nothing without FP8."""
    import math

    from orchestrator.fp8_rules import fp8_plan
    from orchestrator.screen import print_facts, print_table

    fp8 = fp8_plan(plan.settings, plan.layout)
    if fp8 is None:
        return
    rows = []
    for part in fp8.parts:
        common = math.gcd(part.tokens, part.outputs, part.inputs)
        cast = f"shards of {part.gathered_from:,}" if part.gathered_from is not None else "all"
        fits = "yes" if part.fits(fp8.recipe) else "no"
        rows.append((part.name, *map(_count, (part.tokens, part.outputs, part.inputs, common)), cast, fits))
    columns = ("FP8 on a rank", "tokens M", "outputs N", "inputs K", "all divide by", "tokens cast", "fits")
    print_table(columns, rows, right=(1, 2, 3, 4))
    needed = f"M, N and K multiples of {fp8.unit}"
    if any(part.gathered_from is not None for part in fp8.parts):
        needed += f", shards of tokens of {fp8.shard_unit}"
    layers = plan.settings.model.num_layers
    first, last = plan.settings.precision.first_bf16_layers, plan.settings.precision.last_bf16_layers
    ends = [_layers(begin, count) for begin, count in ((0, first), (layers - last, last)) if count]
    kept = f"{' and '.join(ends)} of 0 to {layers - 1}" if ends else "no whole layer"
    facts = [
        (f"{fp8.recipe} needs", needed),
        ("in FP8", f"linear parts of {layers - len(fp8.bf16_layers)} of {layers} layers, forward and both gradients"),
        ("in bf16", f"{kept}; everywhere embedding, attention's own products, norms and output layer"),
    ]
    print_facts("", [*facts, *(("warning", warning) for warning in fp8.warnings)])


def _layers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first} to {first + count - 1}"


def _count(value: int) -> str:
    return f"{value:,}"


def _with_note(folder: str) -> str:
    """Return a folder of the plan, with a note where it is not there yet."""
    from pathlib import Path

    from orchestrator.settings import RANDOM_BASE

    return folder if folder == RANDOM_BASE or Path(folder).is_dir() else f"{folder} (not there yet)"
