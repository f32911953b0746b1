"""`orchestrate data`: look into data sets, merge them, build a run's sample index ahead, see what was read."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.request import request_options, requested_settings

if TYPE_CHECKING:
    from megatron_solar.sample_request import SampleRequest


@click.group(short_help="Look into data sets, merge them, index them, see what a run has read.")
def command() -> None:
    """Look into data sets, merge them, build a run's sample index ahead, see what a run or a step has read."""


@command.command(short_help="Show what a data set holds, and check every byte.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--documents", type=click.IntRange(min=0), default=3, show_default=True, help="How many to decode.")
@click.option("--document", "numbers", type=click.IntRange(min=0), multiple=True, help="Decode this one; repeatable.")
@click.option("--seed", type=int, help="Draw the documents, instead of taking them evenly.")
@click.option("--grep", "wanted", metavar="TEXT", help="Decode the first documents that have TEXT in them.")
@click.option("--tokens", type=click.IntRange(min=1), default=400, show_default=True, help="Decoded of each document.")
@click.option("--verify", is_flag=True, help="Read every byte and compare it with the manifest; exit 1 where damaged.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def inspect(
    folder: Path,
    documents: int,
    numbers: tuple[int, ...],
    seed: int | None,
    wanted: str | None,
    tokens: int,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what the data set DIR holds: counts, shards, bad records by reason, and some documents decoded.

    Special ids are shown as ⟨</s>⟩, control characters as \\x1b.
    """
    from orchestrator.commands.data_screen import show_inspection
    from orchestrator.errors import DataError
    from orchestrator.progress import progress_bar
    from orchestrator.screen import print_json, print_next
    from orchestrator.tokenize.decoder import load_decoder
    from orchestrator.tokenize.inspection import bad_reasons, choose_documents, find_documents, show_documents
    from orchestrator.tokenize.manifest import parse_manifest, read_manifest
    from orchestrator.tokenize.verification import verify_data_set
    from orchestrator.values import to_plain

    if verify:
        manifest = parse_manifest(folder)
        with progress_bar("verify", "bytes") as show:
            problems = verify_data_set(folder, manifest, show)
        if problems:
            raise DataError(
                f"the data set {folder} is damaged; copy it again or tokenize again; {len(problems)} found:", problems
            )
    manifest = read_manifest(folder)
    decoder = load_decoder(folder / manifest.tokenizer_file)
    chosen = list(numbers)
    if wanted is not None:
        with progress_bar("search", "documents") as show:
            chosen = list(find_documents(folder, manifest, wanted, decoder, documents, show))
    elif not numbers:
        chosen = choose_documents(manifest, documents, seed)
    shown = list(show_documents(folder, manifest, chosen, decoder, tokens))
    reasons = bad_reasons(folder)
    if as_json:
        print_json(
            {
                "folder": str(folder.absolute()),
                "manifest": to_plain(manifest),
                "quarantine": to_plain(reasons),
                "documents": to_plain(shown),
                "is_verified": True if verify else None,
            }
        )
        return
    show_inspection(folder, manifest, reasons, shown)
    if wanted is not None and not shown:
        click.echo(f"no document has {wanted!r} in it")
    if verify:
        click.echo("verified: every byte of shards and tokenizer is as the manifest says")
        print_next(f"orchestrate plan solar-10.7b data.train={shlex.quote(str(folder.absolute()))}")
    else:
        print_next(f"orchestrate data inspect {shlex.quote(str(folder))} --verify")


@command.command(short_help="Put data sets together without decoding.")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder to make.")
@click.option("--shards", type=click.IntRange(min=1), metavar="N", help="Make N shards of about the same size.")
@click.option("--shard-tokens", type=click.IntRange(min=1), metavar="N", help="Largest shard.  [default: 1073741824]")
@click.option("--json", "as_json", is_flag=True, help="Print the new manifest as JSON.")
def merge(folders: tuple[Path, ...], output: Path, shards: int | None, shard_tokens: int | None, as_json: bool) -> None:
    """Put the data sets DIR... together into one, in this order, without decoding.

    All must have one tokenizer. A shard of the result is made of whole shards, and every byte is compared with
    its checksum on the way. OUTPUT appears when all is done, or not at all.
    """
    from orchestrator.progress import progress_bar
    from orchestrator.screen import print_json, print_next
    from orchestrator.tokenize.concatenate import SHARD_TOKENS
    from orchestrator.tokenize.merge import merge_data_sets
    from orchestrator.units import format_count
    from orchestrator.values import to_plain

    if shards is not None and shard_tokens is not None:
        raise click.UsageError("--shards and --shard-tokens both say how large a shard is; give one")
    with progress_bar("merge", "bytes") as show:
        manifest = merge_data_sets(
            folders, output, shards=shards, shard_tokens=shard_tokens or SHARD_TOKENS, progress=show
        )
    if as_json:
        print_json(to_plain(manifest))
        return
    several = f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    click.echo(
        f"{output}: {manifest.documents:,} documents, {format_count(manifest.tokens)} tokens in {several}, "
        f"of {len(folders)} data sets; fingerprint {manifest.fingerprint[:16]}"
    )
    print_next(f"orchestrate data inspect {shlex.quote(str(output))}")


@command.command(short_help="Build a run's sample index ahead.")
@request_options
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder to make.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a CPU, at most 16]")
@click.option("--dry-run", is_flag=True, help="Say how many files and bytes it would be, build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def index(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int | None,
    output: Path,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build the sample index of RECIPE's run ahead, once, where otherwise rank 0 does while all GPUs wait.

    RECIPE is a name in conf/recipe or the path of a YAML file, such as a run's config.yaml; OVERRIDES read
    section.field=value. Give the words of the launch, and launch with data.index=DIR. OUTPUT appears when all is
    done, or not at all; no GPU is needed.
    """
    from megatron_solar.prebuilt_index import expected_size
    from megatron_solar.sample_request import request_of
    from orchestrator.plan import make_plan
    from orchestrator.screen import print_json, print_next
    from orchestrator.units import format_bytes

    plan = make_plan(requested_settings(recipe, overrides, nodes))
    request = request_of(plan)
    facts = {"output": str(output.absolute()), **request.facts()}
    if dry_run:
        files, size = expected_size(request)
        if as_json:
            print_json({**facts, "files": files, "bytes": size})
            return
        click.echo(f"{output} would have about {files:,} files, {format_bytes(size)}")
        print_next(shlex.join(["orchestrate", "data", "index", recipe, *overrides, f"--output={output}"]))
        return
    is_new = _build(request, output, workers)
    paths = [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    if as_json:
        print_json({**facts, "files": len(paths), "bytes": size, "is_new": is_new})
        return
    click.echo(f"{output} {'has' if is_new else 'had'} the index: {len(paths):,} files, {format_bytes(size)}")
    words = [recipe, *overrides, f"data.index={output.absolute()}"]
    print_next(shlex.join(["orchestrate", "launch", *words]) + (f" --nodes {nodes}" if nodes else ""))


def _build(request: "SampleRequest", output: Path, workers: int | None) -> bool:
    import contextlib
    import os

    from megatron_solar.index_builder import build_ahead, epoch_workers
    from orchestrator.progress import progress_bar

    count = workers or min(16, len(os.sched_getaffinity(0)))
    bars: dict[str, Callable[[int, int], None]] = {}
    with epoch_workers(count) as each, contextlib.ExitStack() as shown:

        def show(split: str, done: int, total: int) -> None:
            if split not in bars:
                shown.close()  # the bar of the split before
                bars[split] = shown.enter_context(progress_bar(f"index {split}", "epochs of shards"))
            bars[split](done, total)

        return build_ahead(request, output, each, show)


@command.command(short_help="Show what a run has read of which data set in which phase.")
@click.argument("run", default="last")
@click.option("--index", type=click.Path(path_type=Path), help="Index to read, where the run's own is gone.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def ledger(run: str, index: Path | None, as_json: bool) -> None:
    """Show what RUN has read of which data set in which phase, and what it still will.

    RUN is a name, a unique prefix of one, the path of a run folder, or `last`. Samples are counted in the run's sample
    index; steps that were done again count once, those whose gradients were dropped count and are named as well.
    """
    from orchestrator.commands.data_screen import show_ledger
    from orchestrator.config import paths_in_force
    from orchestrator.data_ledger import data_ledger
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain

    found = find_run(run, Path(paths_in_force().runs))
    counted = data_ledger(found, index)
    if as_json:
        print_json(to_plain(counted))
        return
    show_ledger(counted)
    if counted.step:
        print_next(f"orchestrate data show {found.name} --step {counted.step}")
    else:
        print_next(f"orchestrate status {found.name}")


@command.command(short_help="Show which documents a step of a run saw.")
@click.argument("run", default="last")
@click.option("--step", type=click.IntRange(min=1), required=True, help="From 1, as in the logs.")
@click.option("--samples", type=click.IntRange(min=1), default=4, show_default=True, help="Of the step's global batch.")
@click.option("--index", type=click.Path(path_type=Path), help="Index to read, where the run's own is gone.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def show(run: str, step: int, samples: int, index: Path | None, as_json: bool) -> None:
    """Show which documents step N of RUN saw, and how their text begins.

    RUN is a name, a unique prefix of one, the path of a run folder, or `last`. Where several attempts did the
    step, the last one counts.
    """
    from orchestrator.commands.data_screen import show_step
    from orchestrator.config import paths_in_force
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_json, print_next
    from orchestrator.step_documents import step_documents
    from orchestrator.values import to_plain

    found = find_run(run, Path(paths_in_force().runs))
    seen = step_documents(found, step, count=samples, index=index)
    if as_json:
        print_json({"run": found.name, **to_plain(seen)})
        return
    show_step(found.name, seen)
    first = seen.samples[0]
    print_next(f"orchestrate data inspect {shlex.quote(first.folder)} --document {first.parts[0].document}")
