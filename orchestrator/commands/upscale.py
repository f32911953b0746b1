"""`orchestrate upscale`: a deeper Hugging Face folder from a base."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_solar.depth import STRATEGIES, default_drop, draw, drop_for_layers
from orchestrator.errors import OrchestrateError
from orchestrator.units import format_bytes, format_count

if TYPE_CHECKING:
    from megatron_solar.upscale import UpscalePlan

SOLAR_PARAMETERS = 10_731_524_096


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="New folder for the result.")
@click.option("--strategy", default="solar", show_default=True, help=f"Rule: {', '.join(STRATEGIES)}.", metavar="NAME")
@click.option("--drop", type=int, help="Layers left out of each copy.  [default: a quarter of the base's]")
@click.option("--layers", type=int, help="Depth wanted, instead of --drop.")
@click.option("--explain", is_flag=True, help="Draw which layer comes from where; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    base: Path,
    output: Path | None,
    strategy: str,
    drop: int | None,
    layers: int | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Deepen a Hugging Face model: stack two copies of BASE with layers left out, by SOLAR's rule.

    A base of 32 layers becomes one of 48: layers 0-23, then 8-31. Weights are copied as they are, in
    their own precision, with the tokenizer and a lineage.json of sources and checksums.
    """
    if drop is not None and layers is not None:
        raise click.UsageError("--drop and --layers say the same thing; give one")
    if output is None and not explain:
        raise click.UsageError("--output DIR is missing; or see what would be done with --explain")
    try:
        _run(base, output, strategy, drop, layers, explain, as_json)
    except OSError as error:
        raise OrchestrateError(f"up-scaling {base} failed: {error}") from error


def _run(
    base: Path,
    output: Path | None,
    strategy: str,
    drop: int | None,
    layers: int | None,
    explain: bool,
    as_json: bool,
) -> None:
    from megatron_solar.model_folder import ModelFolder
    from megatron_solar.upscale import plan_upscale, upscale

    folder = ModelFolder.open(base)
    if layers is not None:
        drop = drop_for_layers(strategy, folder.shape.num_layers, layers)
    elif drop is None:
        drop = default_drop(folder.shape.num_layers)
    plan = plan_upscale(folder, drop=drop, strategy=strategy)
    summary = _summary_of(base, plan)
    if not as_json:
        _print_summary(plan, drawn=explain)
    if explain or output is None:
        target = shlex.quote(str(output or "DIR"))
        next_command = f"orchestrate upscale {shlex.quote(str(base))} --output {target} --drop {drop}"
    else:
        _notice_leftovers(output)
        with _progress_bar(plan.result_bytes) as progress:
            lineage = upscale(base, output, drop=drop, strategy=strategy, progress=progress)
        files = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
        summary |= {"output": str(output), "licence": lineage.licence, "files": files}
        is_solar = lineage.result.parameters == SOLAR_PARAMETERS
        request = "solar-10.7b" if is_solar else f"RECIPE model.num_layers={len(lineage.layer_sources)}"
        next_command = f"orchestrate plan {request} base={shlex.quote(str(output))}"
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    if "output" in summary:
        click.echo(f"written  {output}, {len(summary['files'])} files; lineage.json has sources and checksums")
        click.echo(f"licence  of the base: {summary['licence']}")
    click.echo(f"next: {next_command}")


def _summary_of(base: Path, plan: "UpscalePlan") -> dict[str, Any]:
    return {
        "base": str(base),
        "strategy": plan.strategy,
        "drop": plan.drop,
        "layer_sources": list(plan.layers.sources),
        "dtype": plan.dtype_name,
        "base_parameters": plan.base_shape.parameters(),
        "base_bytes": plan.base_bytes,
        "parameters": plan.shape.parameters(),
        "bytes": plan.result_bytes,
    }


def _print_summary(plan: "UpscalePlan", *, drawn: bool) -> None:
    rule = STRATEGIES[plan.strategy]
    click.echo(f"{plan.strategy} ({rule.paper}), drop {plan.drop}: {rule.rule}")
    for title, shape, size in (
        ("base", plan.base_shape, plan.base_bytes),
        ("result", plan.shape, plan.result_bytes),
    ):
        click.echo(
            f"{title:7}  {shape.num_layers:3} layers  {shape.parameters():>14,} parameters "
            f"({format_count(shape.parameters())})  {format_bytes(size)} of {plan.dtype_name}"
        )
    if drawn:
        click.echo(f"\n{draw(plan.layers)}\n")


def _notice_leftovers(output: Path) -> None:
    """Tell of what a killed run left, which may be as large as the result."""
    for left in output.parent.glob(f".{output.name}.*.partial"):
        click.echo(f"{left} is of an unfinished run; remove it if that is not running any more", err=True)


@contextmanager
def _progress_bar(total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("copying", total=total_bytes)

        def progress(done_bytes: int, total: int) -> None:
            bar.update(task, completed=done_bytes)
            if done_bytes == total:
                bar.update(task, description="flushing to disk")

        yield progress
