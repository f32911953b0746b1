"""Put several data sets together into one: shards are copied without decoding, their indexes written anew.

A shard of the result is made of whole shards of the sources, in their order. Every byte is hashed on its way and
compared with its manifest's checksum, so that damage is not carried on.
"""

import collections
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError, DataError
from orchestrator.files import CHUNK_BYTES, check_room, new_folder, write_atomic
from orchestrator.tokenize.concatenate import SHARD_TOKENS, Source, concatenate, group_shards, lengths_of
from orchestrator.tokenize.document_lengths import DocumentLengths, count_lengths, draw_lengths
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
from orchestrator.units import format_time


def merge_data_sets(
    folders: Sequence[Path],
    output: Path,
    *,
    shards: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetManifest:
    """Put data sets together into a new folder, in the order given, and return its manifest.

    Args:
        shards: how many the result has, of about the same size; None: as few as `shard_tokens` allows.
        shard_tokens: largest size of a shard that is made of more than one.
        progress: told of the bytes copied and of all.

    Raises:
        ConfigError: data sets that do not go together, or a number of shards that cannot be; all at once.
        DataError: a source is none, or damaged; nothing is left behind.
        DiskFullError: the disk has no room for it; nothing is written.
        OrchestrateError: the output exists already.
    """
    manifests = [read_manifest(folder) for folder in folders]
    sources = [
        Source(folder=folder, shard=shard)
        for folder, manifest in zip(folders, manifests, strict=True)
        for shard in manifest.shards
    ]
    problems = _problems(folders, manifests)
    if shards is not None and not 1 <= shards <= len(sources):
        problems.append(f"--shards {shards} should be from 1 to the {len(sources)} that there are; no shard is split")
    if shard_tokens < 1:
        problems.append(f"--shard-tokens {shard_tokens} should be 1 or more")
    if problems:
        raise ConfigError(f"{len(folders)} data sets cannot be merged; {len(problems)} to mend:", problems)
    groups = group_shards(sources, shards=shards, shard_tokens=shard_tokens)
    needed = sum(source.shard.bin_bytes + source.shard.index_bytes for source in sources)
    check_room(output, needed, 2 * len(groups) + 4, "the merged data set")
    total = sum(source.shard.bin_bytes for source in sources)
    try:
        with new_folder(output) as folder:
            done, made, lengths = 0, [], DocumentLengths()
            for number, group in enumerate(groups):

                def copied(size: int, before: int = done) -> None:
                    progress(before + size, total)

                made.append(concatenate(group, folder, f"shard_{number:05d}", copied))
                lengths = sum((count_lengths(part) for part in lengths_of(group)), lengths)
                done += made[-1].bin_bytes
            first = manifests[0]
            shutil.copyfile(folders[0] / first.tokenizer_file, folder / first.tokenizer_file)
            _concatenate_quarantine(folders, folder)
            draw_lengths(folder / PICTURE, output.name, lengths)
            merged = _merged(manifests, made, shard_tokens if shards is None else None)
            write_atomic(folder / MANIFEST, to_json(merged) + "\n")
    except OSError as error:
        raise DataError(f"cannot write the data set {output}: {error}; nothing of it was kept") from error
    return merged


def _problems(folders: Sequence[Path], manifests: Sequence[DatasetManifest]) -> list[str]:
    """Return why data sets do not go together."""
    first, found = manifests[0], []
    if len(folders) < 2:
        found.append(f"{folders[0]} is one data set alone; give two or more")
    seen: dict[str, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.fingerprint in seen:
            found.append(
                f"{folder} has the documents of {seen[manifest.fingerprint]}, which would be read twice; give it once, "
                "and a larger share with data.weights"
            )
        seen.setdefault(manifest.fingerprint, folder)
        if (manifest.tokenizer_sha256, manifest.end_of_document) != (first.tokenizer_sha256, first.end_of_document):
            found.append(
                f"{folder} was made with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:16]}) than "
                f"{folders[0]} ({first.tokenizer_sha256[:16]}); tokenize both with one"
            )
        if (manifest.part == "validation") != (first.part == "validation"):
            found.append(
                f"{folder} is a {manifest.part} part and {folders[0]} a {first.part} part: what was held out would be "
                "trained on; merge the validation parts apart"
            )
    return found


def _merged(
    manifests: Sequence[DatasetManifest], shards: Sequence[TokenShard], shard_tokens: int | None
) -> DatasetManifest:
    """Return the manifest of data sets put together: counts are sums, and what differs is told as well as it can be."""
    first = manifests[0]
    parts, every = {manifest.part for manifest in manifests}, {manifest.validation_every for manifest in manifests}
    skipped: collections.Counter[str] = collections.Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped_files)
    source_bytes = [manifest.source_bytes for manifest in manifests if manifest.source_bytes is not None]
    max_bad = [manifest.max_bad for manifest in manifests if manifest.max_bad is not None]

    def total(field: str) -> int:
        return sum(getattr(manifest, field) for manifest in manifests)

    def joined(field: str) -> str:
        return ", ".join(dict.fromkeys(getattr(manifest, field) for manifest in manifests))

    merged = dataclasses.replace(
        first,
        engine=joined("engine"),
        documents_read=total("documents_read"),
        documents=total("documents"),
        held_out_documents=total("held_out_documents"),
        empty_documents=total("empty_documents"),
        quarantined_documents=total("quarantined_documents"),
        tokens=total("tokens"),
        text_bytes=total("text_bytes"),
        part=first.part if len(parts) == 1 else "training",
        validation_every=first.validation_every if len(every) == 1 else None,
        text_key=joined("text_key"),
        inputs=tuple(name for manifest in manifests for name in manifest.inputs),
        files=total("files"),
        skipped_files=dict(skipped),
        source_bytes=sum(source_bytes) if len(source_bytes) == len(manifests) else None,
        unit_bytes=None,
        shard_tokens=shard_tokens,
        max_bad=max(max_bad) if len(max_bad) == len(manifests) else None,
        created=format_time(time.time()),
        shards=tuple(shards),
    )
    return dataclasses.replace(merged, fingerprint=fingerprint_of(merged))


def _concatenate_quarantine(folders: Sequence[Path], target: Path) -> None:
    present = [folder / QUARANTINE for folder in folders if (folder / QUARANTINE).exists()]
    if present:
        with (target / QUARANTINE).open("wb") as out:
            for path in present:
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, out, CHUNK_BYTES)
