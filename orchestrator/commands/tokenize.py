"""`orchestrate tokenize`: text to a Megatron data set folder."""  # noqa: A005, a module is named as its command

import shlex
from pathlib import Path

import click


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="SentencePiece model, or a model folder that has a tokenizer.model.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder to make.")
@click.option("--text-key", default="text", show_default=True, help="Key of the text in JSON lines.")
@click.option(
    "--validation-every",
    type=int,
    metavar="N",
    help="Hold out each N-th document that has text, as a data set of its own.",
)
@click.option(
    "--validation-output",
    type=click.Path(path_type=Path),
    help="Folder for the documents held out.  [default: OUTPUT-validation]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, and only that, on stdout.")
def command(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    output: Path,
    text_key: str,
    validation_every: int | None,
    validation_output: Path | None,
    as_json: bool,
) -> None:
    """Turn text into a Megatron data set.

    INPUT is a file, a folder or a quoted glob of .jsonl (one document a line), and .txt, .py, .rst and
    .md (one document a file), in UTF-8. The folder OUTPUT gets .bin/.idx shards, manifest.json, the
    tokenizer and a picture of the document lengths. A record that cannot be read is kept in
    OUTPUT/quarantine.jsonl, with file, byte and reason. OUTPUT appears when all is done, or not at all.

    \b
    orchestrate tokenize corpus/ --tokenizer base/tokenizer.model --output data/train
    orchestrate tokenize 'web/*.jsonl' more.txt --tokenizer base --output data --validation-every 1000
    """
    from orchestrator.tokenize.manifest import to_json
    from orchestrator.tokenize.stage import choose_validation_output, tokenize_corpus

    validation_folder = choose_validation_output(output, validation_output, validation_every)
    manifest = tokenize_corpus(
        inputs,
        tokenizer,
        output,
        text_key=text_key,
        validation_output=validation_folder,
        validation_every=validation_every,
    )
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
