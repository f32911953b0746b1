"""What `orchestrate data` shows on a terminal: data sets, bad records, what a run has read, the documents of a step."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.data_ledger import DataLedger, LedgerEntry
from orchestrator.screen import WIDTH, print_facts, print_table
from orchestrator.step_documents import StepDocuments
from orchestrator.tokenize.decoder import printable
from orchestrator.tokenize.inspection import BadReason, ShownDocument
from orchestrator.tokenize.manifest import PICTURE, DatasetManifest
from orchestrator.units import format_bytes, format_count

SHARDS_SHOWN = 20
EXAMPLE_CHARACTERS = 70
NAME_CHARACTERS = 20
"""Of a data set in the ledger's table."""


def show_inspection(
    folder: Path, manifest: DatasetManifest, reasons: Sequence[BadReason], documents: Sequence[ShownDocument]
) -> None:
    """Print what a data set holds."""
    fates = {
        "held out": manifest.held_out_documents,
        "empty": manifest.empty_documents,
        "quarantined": manifest.quarantined_documents,
    }
    others = "".join(f", {count:,} {fate}" for fate, count in fates.items() if count)
    per_token = manifest.text_bytes / max(1, manifest.tokens)
    print_facts(
        f"{manifest.part} data set {printable(str(folder))}",
        [
            ("documents", f"{manifest.documents:,} of {manifest.documents_read:,} read{others}"),
            ("tokens", f"{manifest.tokens:,} ({format_count(manifest.tokens)})"),
            ("text", f"{format_bytes(manifest.text_bytes)}, {per_token:.2f} bytes a token"),
            ("inputs", printable(", ".join(manifest.inputs))),
            ("engine", f"{manifest.engine}, {manifest.tokenizer_file} {manifest.tokenizer_sha256[:16]}"),
            ("vocabulary", f"{manifest.vocab_size:,} ids, end of document {manifest.end_of_document}"),
            ("fingerprint", manifest.fingerprint[:16]),
            ("made", manifest.created),
            ("lengths", str(folder / PICTURE) if (folder / PICTURE).exists() else "no picture"),
        ],
    )
    click.echo()
    print_table(
        ("shard", "documents", "tokens", "type", "bytes", "SHA-256 of .bin"),
        [
            (
                shard.name,
                f"{shard.documents:,}",
                f"{shard.tokens:,}",
                shard.dtype,
                format_bytes(shard.bin_bytes),
                shard.bin_sha256[:16],
            )
            for shard in manifest.shards[:SHARDS_SHOWN]
        ],
        right=(1, 2, 4),
    )
    if len(manifest.shards) > SHARDS_SHOWN:
        click.echo(f"... {len(manifest.shards) - SHARDS_SHOWN} more")
    for reason in reasons:
        click.echo(f"\nquarantined, {reason.records:,} times: {printable(reason.reason)}")
        for example in reason.examples:
            content = printable(str(example.get("content", ""))[:EXAMPLE_CHARACTERS])
            click.echo(f"  {printable(str(example.get('file')))}, byte {example.get('offset')}: {content}")
    for document in documents:
        click.echo(
            f"\ndocument {document.number:,} ({document.shard}, {document.number_in_shard:,}), "
            f"{document.tokens:,} tokens:"
        )
        click.echo(textwrap.indent(printable(document.text, lines=True), "  | ", lambda line: True))
        if document.shown_tokens < document.tokens:
            click.echo(f"  ... {document.tokens - document.shown_tokens:,} tokens more (--tokens)")
    click.echo()


def show_ledger(ledger: DataLedger) -> None:
    """Print what a run has read of each data set in each phase."""
    saved = "the newest checkpoint" if ledger.is_saved else "not saved yet"
    share = ledger.samples / ledger.planned_samples
    facts = [
        ("read", f"{ledger.samples:,} of {ledger.planned_samples:,} samples ({share:.1%}), {ledger.tokens:,} tokens"),
        ("up to", f"step {ledger.step:,}, {saved}"),
        ("fingerprint", ledger.data_fingerprint[:16]),
    ]
    if ledger.skipped_steps:
        dropped = sum(entry.skipped_samples for entry in ledger.entries)
        steps = "1 step" if ledger.skipped_steps == 1 else f"{ledger.skipped_steps:,} steps"
        facts.append(("skipped", f"{steps}, {dropped:,} of these samples: their gradients were dropped"))
    facts += [
        (f"phase {phase.number}", f"from step {phase.first_step:,} on, samples {phase.first_sample:,} to below "
                                  f"{phase.end_sample:,}")
        for phase in ledger.phases
    ]  # fmt: skip
    facts.append(("epochs", ", ".join(f"{printable(name)} {count:.2f}" for name, count in ledger.epochs.items())))
    if any(entry.planned_samples is None for entry in ledger.entries):
        facts.append(("planned", "not counted, since no attempt has built the index of the whole plan yet"))
    print_facts(f"data of run {ledger.run}", facts)
    click.echo()
    print_table(
        ("phase", "data set", "samples", "tokens", "epochs", "share", "asked", "skipped", "planned"),
        [_ledger_row(entry) for entry in ledger.entries],
        right=(2, 3, 4, 5, 6, 7, 8),
    )


def _ledger_row(entry: LedgerEntry) -> tuple[str, ...]:
    name = printable(entry.data_set)
    return (
        str(entry.phase),
        name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…",
        f"{entry.samples:,}",
        format_count(entry.tokens),
        f"{entry.epochs:.2f}",
        "-" if entry.share is None else f"{entry.share:.2%}",
        f"{entry.share_asked:.2%}",
        f"{entry.skipped_samples:,}",
        "-" if entry.planned_samples is None else format_count(entry.planned_samples),
    )


def show_step(run: str, seen: StepDocuments) -> None:
    """Print which documents a step saw."""
    click.echo(f"step {seen.step} of run {run}, as attempt {seen.attempt} did it")
    if seen.others:
        click.echo(f"attempts {', '.join(map(str, seen.others))} did it before, which counts no more")
    for sample in seen.samples:
        click.echo(f"\nsample {sample.sample}: {sample.folder}, {sample.shard}, epoch {sample.epoch}")
        for part in sample.parts:
            of = f"document {part.document} [{part.start}, {part.stop}) of {part.document_tokens}"
            text = printable(part.begins)
            room = max(20, WIDTH - len(of) - 4)
            click.echo(f"  {of}  {text if len(text) <= room else text[: room - 1] + '…'}")
    if len(seen.samples) < seen.global_batch_size:
        click.echo(f"\n{seen.global_batch_size - len(seen.samples)} samples more (--samples)")
