"""From units that are done to data set folders under their final names.

Everything is made complete in folders that nobody takes for data sets; then `published.json` is written, and then each
folder moves by one rename. After a kill between the renames the next start finds `published.json` and goes on there.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path

from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json, sync_folder, write_atomic, write_json
from orchestrator.tokenize.concatenate import Source, concatenate, group_shards
from orchestrator.tokenize.document_lengths import draw_lengths
from orchestrator.tokenize.manifest import (
    MANIFEST,
    PICTURE,
    QUARANTINE,
    DatasetManifest,
    TokenShard,
    fingerprint_of,
    read_manifest,
    to_json,
)
from orchestrator.tokenize.work_folder import PartRecord, UnitRecord, WorkFolder, WorkPlan
from orchestrator.units import format_time


def complete(
    folder: WorkFolder, plan: WorkPlan, records: Sequence[UnitRecord], output: Path, *, max_bad: float
) -> None:
    """Make the data sets of units that are all done, still in the folder of the work under way.

    Args:
        records: of all units, in order.
    """
    training = folder.part("training")
    parts = [record.training for record in records]
    held_out = [record.validation for record in records]
    _write_quarantine(training, [folder.quarantine(record.unit) for record in records if record.quarantined])
    manifest = DatasetManifest(
        fingerprint="",
        tokenizer_file=plan.tokenizer_file,
        tokenizer_sha256=plan.tokenizer_sha256,
        engine=plan.engine,
        vocab_size=plan.vocab_size,
        end_of_document=plan.end_of_document,
        begin_of_document=plan.begin_of_document,
        documents_read=sum(record.records for record in records),
        documents=sum(part.documents for part in parts),
        held_out_documents=sum(part.documents for part in held_out),
        empty_documents=sum(record.empty for record in records),
        quarantined_documents=sum(record.quarantined for record in records),
        tokens=sum(part.tokens for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        part="all" if plan.validation_every is None else "training",
        validation_every=plan.validation_every,
        text_key=plan.text_key,
        inputs=plan.inputs,
        files=plan.files,
        skipped_files=plan.skipped_files,
        source_bytes=sum(record.source_bytes for record in records),
        unit_bytes=plan.unit_bytes,
        shard_tokens=plan.shard_tokens,
        max_bad=max_bad,
        created=format_time(time.time()),
        shards=tuple(shard for part in parts for shard in part.shards),
    )
    fingerprints = {"training": _finish(folder, training, manifest, parts, output)}
    if plan.validation_output is not None:
        validation_output = Path(plan.validation_output)
        made = _new_staging(output, validation_output)
        shards = _concatenated(folder.part("validation"), made, held_out, plan.shard_tokens)
        documents = sum(part.documents for part in held_out)
        manifest = dataclasses.replace(
            manifest,
            documents_read=documents,
            documents=documents,
            held_out_documents=0,
            empty_documents=0,
            quarantined_documents=0,
            tokens=sum(part.tokens for part in held_out),
            text_bytes=sum(part.text_bytes for part in held_out),
            part="validation",
            shards=shards,
        )
        fingerprints["validation"] = _finish(folder, made, manifest, held_out, validation_output)
    write_json(folder.published, fingerprints)


def move_out(folder: WorkFolder, plan: WorkPlan, output: Path) -> DatasetManifest:
    """Give complete data sets their names, those that have not got them yet, and remove the folder of the work.

    Raises:
        OrchestrateError: a name was taken meanwhile.
    """
    fingerprints = read_json(folder.published)
    moves = [(folder.part("training"), output, fingerprints["training"])]
    if plan.validation_output is not None:
        validation_output = Path(plan.validation_output)
        moves.insert(0, (_staging(output, validation_output), validation_output, fingerprints["validation"]))
    for made, target, _ in moves:
        if made.exists() and target.exists():
            raise OrchestrateError(
                f"output {target} exists already, made by something else meanwhile; move it away and give the same "
                "command, which goes on"
            )
    for made, target, fingerprint in moves:
        if made.exists():
            made.rename(target)
            sync_folder(target.parent)
        if read_manifest(target).fingerprint != fingerprint:
            raise DataError(f"{target} is not what {folder.path} made; move it away, remove {folder.path}, start over")
    shutil.rmtree(folder.path)
    return read_manifest(output)


def _finish(
    folder: WorkFolder, made: Path, manifest: DatasetManifest, parts: Sequence[PartRecord], published_as: Path
) -> str:
    """Add tokenizer, picture and, last, the manifest; return its fingerprint."""
    write_atomic(made / manifest.tokenizer_file, (folder.path / manifest.tokenizer_file).read_bytes())
    draw_lengths(made / PICTURE, published_as.name, reduce(add, (part.lengths for part in parts)))
    _sync(made / PICTURE)
    manifest = dataclasses.replace(manifest, fingerprint=fingerprint_of(manifest))
    write_atomic(made / MANIFEST, to_json(manifest) + "\n")
    _remove_strays(made, manifest)
    return manifest.fingerprint


def _remove_strays(made: Path, manifest: DatasetManifest) -> None:
    """Remove what a kill has left under a temporary name; anything else that is too much is our fault."""
    known = {MANIFEST, PICTURE, QUARANTINE, manifest.tokenizer_file}
    known |= {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".bin", ".idx")}
    for name in {entry.name for entry in made.iterdir()} - known:
        if not name.startswith("."):
            raise AssertionError(f"{made / name} belongs to no unit; this is a fault of orchestrator.tokenize")
        (made / name).unlink()


def _write_quarantine(made: Path, sources: Iterable[Path]) -> None:
    (made / QUARANTINE).unlink(missing_ok=True)
    for source in sources:
        with (made / QUARANTINE).open("ab") as target, source.open("rb") as stream:
            shutil.copyfileobj(stream, target)
    if (made / QUARANTINE).exists():
        _sync(made / QUARANTINE)


def _concatenated(folder: Path, made: Path, parts: Sequence[PartRecord], shard_tokens: int) -> tuple[TokenShard, ...]:
    """Put the small shards of the units together."""
    sources = [Source(folder=folder, shard=shard) for part in parts for shard in part.shards]
    return tuple(
        concatenate(group, made, f"shard_{number:05d}")
        for number, group in enumerate(group_shards(sources, shard_tokens=shard_tokens))
    )


def _staging(output: Path, validation_output: Path) -> Path:
    """Return where held-out documents are put together: beside their final place, which may be another disk."""
    return validation_output.with_name(f".{validation_output.name}.of.{output.name}.partial")


def _new_staging(output: Path, validation_output: Path) -> Path:
    staging = _staging(output, validation_output)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
