"""`orchestrate tokenize`: text to a Megatron data set folder."""  # noqa: A005, a module is named as its command

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orchestrator.slurm.tokenize_array import ArrayRequest
    from orchestrator.tokenize.engine import EngineChoice
    from orchestrator.tokenize.stage import CarryOut


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="SentencePiece model or tokenizer.json, or a model folder that has one.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder to make.")
@click.option("--text-key", default="text", show_default=True, help="Key of the text in JSON lines, column in parquet.")
@click.option(
    "--validation-every",
    type=int,
    metavar="N",
    help="Hold out one document in N, by the checksum of its text, as a data set of its own.",
)
@click.option(
    "--validation-output",
    type=click.Path(path_type=Path),
    help="Folder for the documents held out.  [default: OUTPUT-validation]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes, with --cluster of each task.  [default: one for each processor; 16]",
)
@click.option("--cluster", metavar="NAME", help="Work by a Slurm job array of that cluster (conf/cluster).")
@click.option("--tasks", type=click.IntRange(min=1), metavar="N", help="Most tasks of the array.  [default: 64]")
@click.option("--partition", help="Slurm's partition.  [default: the cluster's]")
@click.option("--time", "time_limit", metavar="H:MM:SS", help="Time limit of a task.  [default: the cluster's]")
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of the records that may be bad; with more it stops.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "sentencepiece", "tokenizers"]),
    default="auto",
    show_default=True,
    help="What turns text into ids.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, with a guess at tokens and disk.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, and only that, on stdout.")
def command(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    output: Path,
    text_key: str,
    validation_every: int | None,
    validation_output: Path | None,
    workers: int | None,
    cluster: str | None,
    tasks: int | None,
    partition: str | None,
    time_limit: str | None,
    max_bad: float,
    engine: "EngineChoice",
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn text into a Megatron data set.

    INPUT is a file, a folder or a quoted glob of JSON lines (.jsonl, also .gz and .zst; one document a
    line), .parquet (a row), and .txt, .py, .rst and .md (a file), in UTF-8. The folder OUTPUT gets
    .bin/.idx shards, manifest.json, the tokenizer and a picture of the document lengths. A record that
    cannot be read is kept in OUTPUT/quarantine.jsonl, with file, byte and reason.

    OUTPUT appears when all is done. What is under way lies in OUTPUT.partial: after a kill, or with the
    disk full, the same command goes on from there, and the result is that of an undisturbed run.

    With --cluster CPU tasks of a Slurm job array do the same work, with the same result. This command
    submits them and follows; left or killed, they go on, and the same command follows them again and
    publishes what they made.

    \b
    orchestrate tokenize corpus/ --tokenizer base/tokenizer.model --output data/train
    orchestrate tokenize 'web/*.jsonl' more.txt --tokenizer base --output data --validation-every 1000
    orchestrate tokenize corpus/ --tokenizer base --output data --cluster h100 --partition cpu --tasks 64
    """
    from orchestrator.tokenize.manifest import to_json
    from orchestrator.tokenize.stage import choose_validation_output, tokenize_corpus

    validation_folder = choose_validation_output(output, validation_output, validation_every)
    places = [*inputs, output, *([] if validation_folder is None else [validation_folder])]
    request = _array_request(cluster, tasks, workers, partition, time_limit, places)
    if dry_run:
        _print_estimate(inputs, tokenizer, output, validation_folder, text_key, engine, as_json, request)
        return
    try:
        manifest = tokenize_corpus(
            inputs,
            tokenizer,
            output,
            text_key=text_key,
            validation_output=validation_folder,
            validation_every=validation_every,
            max_bad=max_bad,
            workers=workers,
            engine=engine,
            carry_out=None if request is None else _carry_out_by(request),
        )
    except KeyboardInterrupt:
        click.echo(f"notice: what is done is kept in {output}.partial, and the same command goes on", err=True)
        raise
    _print_notices(output, manifest.quarantined_documents, manifest.skipped_files)
    if as_json:
        click.echo(to_json(manifest))
        return
    _print_summary(output)
    data = f"data.train={output.absolute()}"
    if validation_folder is not None:
        _print_summary(validation_folder)
        data = f"{shlex.quote(data)} {shlex.quote(f'data.validation={validation_folder.absolute()}')}"
    click.echo(f"next: orchestrate plan solar-10.7b {data}")


def _array_request(
    cluster: str | None,
    tasks: int | None,
    workers: int | None,
    partition: str | None,
    time_limit: str | None,
    places: list[Path],
) -> "ArrayRequest | None":
    """Return what is asked of a cluster, or None where this machine does the work."""
    if cluster is None:
        given = {"--tasks": tasks, "--partition": partition, "--time": time_limit}
        misplaced = [name for name, value in given.items() if value is not None]
        if misplaced:
            raise click.UsageError(f"{misplaced[0]} is for --cluster; add that, or leave it away")
        return None
    from orchestrator.config import load_cluster
    from orchestrator.slurm.tokenize_array import TASKS, WORKERS, ArrayRequest
    from orchestrator.slurm.tokenize_tasks import check_array

    profile = load_cluster(cluster)
    profile = dataclasses.replace(
        profile, partition=partition or profile.partition, time_limit=time_limit or profile.time_limit
    )
    request = ArrayRequest(cluster=profile, tasks=tasks or TASKS, workers=workers or WORKERS)
    check_array(request, places)
    return request


def _carry_out_by(request: "ArrayRequest") -> "CarryOut":
    from orchestrator.slurm.tokenize_tasks import carry_out_by

    return carry_out_by(request)


def _print_estimate(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    output: Path,
    validation_folder: Path | None,
    text_key: str,
    engine: "EngineChoice",
    as_json: bool,
    request: "ArrayRequest | None",
) -> None:
    from orchestrator.files import free_room
    from orchestrator.screen import print_facts, print_json
    from orchestrator.tokenize.estimate import estimate
    from orchestrator.units import format_bytes, format_count
    from orchestrator.values import to_plain

    outputs = [output] if validation_folder is None else [output, validation_folder]
    made = estimate(inputs, tokenizer, text_key=text_key, engine=engine, leave_out=outputs)
    if as_json:
        print_json(to_plain(made))
        return
    place = next(path for path in output.absolute().parents if path.exists())
    files = [
        (kind.kind, f"{kind.files:,} file{'s' if kind.files > 1 else ''}, {format_bytes(kind.source_bytes)}")
        for kind in made.kinds
    ]
    bad = f", {made.sampled_bad:,} bad" if made.sampled_bad else ""
    print_facts(
        f"would tokenize to {', '.join(map(str, outputs))}",
        [
            *files,
            ("units", f"{made.units:,}, of about {format_bytes(made.unit_bytes)} of text"),
            ("engine", made.engine),
            ("documents", f"about {format_count(made.documents)}, from a sample of {made.sampled_documents:,}{bad}"),
            ("tokens", f"about {format_count(made.tokens)}"),
            ("disk", f"about {format_bytes(made.disk_bytes)}; {format_bytes(free_room(place)[0])} are free"),
        ],
    )
    for taken in (path for path in outputs if path.exists()):
        click.echo(f"notice: {taken} exists already; name another or remove it", err=True)
    if request is not None:
        _print_script(request, output, made.units)
    click.echo("next: the same command without --dry-run")


def _print_script(request: "ArrayRequest", output: Path, units: int) -> None:
    from orchestrator.slurm.tokenize_array import array_script, divide, job_name
    from orchestrator.tokenize.work_folder import WorkFolder

    folder = WorkFolder(output.absolute().with_name(f"{output.name}.partial"))
    script = array_script(folder, request, divide(range(units), request), job_name(output.name, "TOKEN"))
    click.echo(f"\nwould be submitted:\n\n{script.text().rstrip()}\n")


def _print_notices(output: Path, quarantined: int, skipped: dict[str, int]) -> None:
    from orchestrator.files import read_json_lines
    from orchestrator.tokenize.manifest import QUARANTINE

    if skipped:
        by_count = sorted(skipped.items(), key=lambda item: -item[1])
        names = ", ".join(f"{count:,} {suffix}" for suffix, count in by_count[:6])
        more = f" and {len(by_count) - 6} more kinds" if len(by_count) > 6 else ""
        click.echo(f"notice: files of other kinds were not read: {names}{more}", err=True)
    if quarantined:
        _, first = next(read_json_lines(output / QUARANTINE))
        click.echo(
            f"notice: {quarantined:,} bad records are kept in {output / QUARANTINE}; the first: "
            f"{first['file']}, byte {first['offset']}: {first['reason']}",
            err=True,
        )


def _print_summary(folder: Path) -> None:
    from orchestrator.tokenize.manifest import PICTURE, read_manifest
    from orchestrator.units import format_bytes, format_count

    manifest = read_manifest(folder)
    fates = {
        "held out": manifest.held_out_documents,
        "empty": manifest.empty_documents,
        "quarantined": manifest.quarantined_documents,
    }
    others = "".join(f", {count:,} {fate}" for fate, count in fates.items() if count)
    shards = f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    click.echo(
        f"{manifest.part} data set {folder}\n"
        f"  documents    {manifest.documents:,} of {manifest.documents_read:,} read{others}\n"
        f"  tokens       {manifest.tokens:,} ({format_count(manifest.tokens)}) in {shards}, "
        f"{manifest.shards[0].dtype}\n"
        f"  text         {format_bytes(manifest.text_bytes)}, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes a token\n"
        f"  engine       {manifest.engine}, vocabulary {manifest.vocab_size:,}, "
        f"end of document {manifest.end_of_document}\n"
        f"  fingerprint  {manifest.fingerprint[:16]}\n"
        f"  lengths      {folder / PICTURE}"
    )
