"""`orchestrate upscale`: a deeper Hugging Face folder from a base."""

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_solar.depth import (
    STRATEGIES,
    depth_map,
    draw,
    explicit_map,
    is_measured,
    paper_of,
    rule_of,
    solar_depth_map,
)
from orchestrator.errors import OrchestrateError
from orchestrator.units import format_bytes, format_count

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from megatron_solar.depth import DepthMap
    from megatron_solar.lineage import Lineage
    from megatron_solar.model_folder import ModelFolder
    from megatron_solar.upscale import UpscalePlan

SOLAR_PARAMETERS = 10_731_524_096
DEFAULT_LENGTH = 1024
WRITTEN_FILES = 20  # about; for the check of inodes
COSINES_A_ROW = 8


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="New folder for the result.")
@click.option("--strategy", help=f"Rule: {', '.join(STRATEGIES)}.  [default: solar]", metavar="NAME")
@click.option("--drop", type=int, help="Of solar: layers left out of each copy.  [default: a quarter of the base's]")
@click.option("--layers", type=int, help="Depth wanted.  [default: the rule's usual one]")
@click.option("--map", "map_text", metavar="LAYERS", help="Base layers in their order, such as 0-23,8-31.")
@click.option("--dtype", type=click.Choice(["as-is", "bf16", "fp32"]), default="as-is", show_default=True,
              help="Precision of the result's weights.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), help="Of yi-middle: text to measure the base's layers on.")
@click.option("--evaluate", "held_out", type=click.Path(path_type=Path), metavar="TEXT",
              help="Record what base and result make of a held-out text, which a launch compares its first loss with: "
              "text as `orchestrate tokenize` reads it, or a data set.")  # fmt: skip
@click.option("--sequences", type=click.IntRange(min=1), default=16, show_default=True,
              help="Sequences of such a text.")  # fmt: skip
@click.option("--sequence-length", type=click.IntRange(min=1),
              help=f"Tokens of each.  [default: {DEFAULT_LENGTH}, or the base's context]")  # fmt: skip
@click.option("--explain", is_flag=True, help="Draw which layer comes from where; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    base: Path,
    output: Path | None,
    strategy: str | None,
    drop: int | None,
    layers: int | None,
    map_text: str | None,
    dtype: str,
    text: Path | None,
    held_out: Path | None,
    sequences: int,
    sequence_length: int | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Deepen a Hugging Face model: layers of BASE are stacked again by a published rule, SOLAR's by default.

    A base of 32 layers becomes one of 48: layers 0-23, then 8-31. Weights are copied as they are, with
    the tokenizer and a lineage.json of sources and checksums.
    """
    if sum(given is not None for given in (drop, layers, map_text)) > 1:
        raise click.UsageError("--drop, --layers and --map all say how deep; give one")
    if map_text is not None and strategy is not None:
        raise click.UsageError("--map says each layer itself; leave --strategy away")
    if drop is not None and strategy not in (None, "solar"):
        raise click.UsageError(f"--drop is how solar counts; give {strategy} --layers")
    if output is None and not explain:
        raise click.UsageError("--output DIR is missing; or see what would be done with --explain")
    try:
        from megatron_solar.model_folder import ModelFolder
        from megatron_solar.upscale import plan_upscale
        from megatron_solar.weights import PRECISION_DTYPES

        folder = ModelFolder.open(base)
        length = sequence_length or min(DEFAULT_LENGTH, folder.shape.max_position_embeddings)
        cosines: tuple[float, ...] = ()
        if map_text is None and is_measured(strategy or "solar") and text is not None:
            cosines = _measure(folder, _tokens(text, folder, sequences, length))
        chosen = _choose(folder.shape.num_layers, strategy or "solar", drop, layers, map_text, cosines)
        plan = plan_upscale(folder, chosen, dtype=PRECISION_DTYPES.get(dtype), cosines=cosines)
        summary = _summary_of(base, plan)
        if not as_json:
            _print_summary(plan, drawn=explain)
        if explain or output is None:
            next_command = _without_explain(output)
        else:
            lineage = _write(folder, plan, output, held_out, (sequences, length))
            summary |= _written(output, lineage)
            if not as_json:
                _print_written(output, lineage)
            next_command = _next(output, lineage)
    except OSError as error:
        raise OrchestrateError(f"up-scaling {base} failed: {error}") from error
    click.echo(json.dumps(summary, indent=2) if as_json else f"next: {next_command}")


def _choose(
    base_layers: int,
    strategy: str,
    drop: int | None,
    layers: int | None,
    map_text: str | None,
    cosines: tuple[float, ...],
) -> "DepthMap":
    if map_text is not None:
        return explicit_map(map_text, base_layers)
    if drop is not None:
        return solar_depth_map(base_layers, drop)
    return depth_map(strategy, base_layers, layers, cosines=cosines)


def _tokens(text: Path, base: "ModelFolder", sequences: int, length: int) -> "NDArray[numpy.int32]":
    from orchestrator.tokenize.held_out import held_out_tokens

    vocab_size = base.shape.vocab_size
    return held_out_tokens(text, base.path, sequences=sequences, length=length, vocab_size=vocab_size)


def _measure(base: "ModelFolder", tokens: "NDArray[numpy.int32]") -> tuple[float, ...]:
    from megatron_solar.evaluate import layer_cosines
    from orchestrator.progress import progress_bar

    with progress_bar("measuring layers", unit="tokens x layers") as show:
        return layer_cosines(base, tokens, show)


def _write(
    base: "ModelFolder", plan: "UpscalePlan", output: Path, held_out: Path | None, size: tuple[int, int]
) -> "Lineage":
    """Evaluate where that is asked for, and write; what would stop the writing is looked at first."""
    from megatron_solar.evaluate import evaluate
    from megatron_solar.upscale import write_upscaled
    from orchestrator.files import check_room
    from orchestrator.progress import progress_bar

    for left in output.parent.glob(f".{output.name}.*.partial"):  # of a killed run; perhaps as large as the result
        click.echo(f"{left} is of an unfinished run; remove it if that is not running any more", err=True)
    if output.exists():
        raise OrchestrateError(f"output {output} exists already; name another or remove it")
    check_room(output, plan.result_bytes, WRITTEN_FILES, "the deeper model in")
    evaluation = None
    if held_out is not None:
        tokens = _tokens(held_out, base, *size)
        with progress_bar("evaluating", unit="tokens x layers") as show:
            evaluation = evaluate(base, plan.layers, plan.dtype, tokens, show)
        chance = math.log(base.shape.vocab_size)
        if float(evaluation.base_losses.mean()) > chance:
            click.echo(
                f"the base's loss of {float(evaluation.base_losses.mean()):.3f} nats is above that of guessing, "
                f"{chance:.3f}: it has never seen text of this kind, or has not been trained",
                err=True,
            )
    itemsize = plan.dtype.itemsize
    with progress_bar("copying", unit="parameters") as show:
        return write_upscaled(
            base,
            plan,
            output,
            evaluation=evaluation,
            text=str(held_out),
            progress=lambda done_bytes, total_bytes: show(done_bytes // itemsize, total_bytes // itemsize),
        )


def _summary_of(base: Path, plan: "UpscalePlan") -> dict[str, Any]:
    from megatron_solar.upscale import dtype_name

    return {
        "base": str(base),
        "strategy": plan.layers.strategy,
        "drop": plan.drop,
        "layer_sources": list(plan.layers.sources),
        "zeroed_layers": sorted(plan.layers.zeroed),
        "cosines": list(plan.cosines),
        "dtype": dtype_name(plan.dtype),
        "base_parameters": plan.base_shape.parameters(),
        "base_bytes": plan.base_bytes,
        "parameters": plan.shape.parameters(),
        "bytes": plan.result_bytes,
    }


def _print_summary(plan: "UpscalePlan", *, drawn: bool) -> None:
    from megatron_solar.upscale import dtype_name

    strategy = plan.layers.strategy
    drop = "" if plan.drop is None else f", drop {plan.drop}"
    click.echo(f"{strategy} ({paper_of(strategy)}){drop}: {rule_of(strategy)}")
    for title, shape, size, dtype in (
        ("base", plan.base_shape, plan.base_bytes, plan.base_dtype),
        ("result", plan.shape, plan.result_bytes, plan.dtype),
    ):
        click.echo(
            f"{title:7}  {shape.num_layers:3} layers  {shape.parameters():>14,} parameters "
            f"({format_count(shape.parameters())})  {format_bytes(size)} of {dtype_name(dtype)}"
        )
    if plan.cosines:
        click.echo("cosine of each layer's input and output:")
        shown = [f"{number:>3} {cosine:.3f}" for number, cosine in enumerate(plan.cosines)]
        for first in range(0, len(shown), COSINES_A_ROW):
            click.echo("  " + "  ".join(shown[first : first + COSINES_A_ROW]))
    if drawn:
        click.echo(f"\n{draw(plan.layers)}\n")


def _written(output: Path, lineage: "Lineage") -> dict[str, Any]:
    files = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    evaluation = None if lineage.evaluation is None else dataclasses.asdict(lineage.evaluation)
    return {"output": str(output), "licence": lineage.licence, "files": files, "evaluation": evaluation}


def _print_written(output: Path, lineage: "Lineage") -> None:
    count = sum(file.is_file() for file in output.rglob("*"))
    click.echo(f"written  {output}, {count} files; lineage.json has sources and checksums")
    click.echo(f"licence  of the base: {lineage.licence}")
    if (found := lineage.evaluation) is not None:
        click.echo(
            f"loss     held out: base {found.base_loss:.4f}, result {found.result_loss:.4f} nats a token, over "
            f"{found.sequences} sequences of {found.sequence_length}"
        )


def _next(output: Path, lineage: "Lineage") -> str:
    is_solar = lineage.result.parameters == SOLAR_PARAMETERS
    request = "solar-10.7b" if is_solar else f"RECIPE model.num_layers={len(lineage.layer_sources)}"
    return f"orchestrate plan {request} base={shlex.quote(str(output))}"


def _without_explain(output: Path | None) -> str:
    """Return the command that was typed, now to be carried out."""
    words = [word for word in sys.argv[1:] if word != "--explain"]
    return shlex.join(["orchestrate", *words]) + ("" if output is not None else " --output DIR")
