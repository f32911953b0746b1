"""Read every byte of a data set and compare it with its manifest; all problems at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json_lines, sha256_of
from orchestrator.tokenize.manifest import QUARANTINE, DatasetManifest, TokenShard, file_problems
from orchestrator.tokenize.shard_reader import ShardReader

PIECE_TOKENS = 1 << 22
NAMED = 3
"""Documents that a message names of many."""


def verify_data_set(
    folder: Path, manifest: DatasetManifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Return what is wrong with a data set; nothing where all is as its manifest says.

    Args:
        progress: told of the bytes read and of all.
    """
    total, done = sum(shard.bin_bytes for shard in manifest.shards), 0
    found = [*file_problems(folder, manifest), *_count_problems(manifest)]
    for shard in manifest.shards:
        if not _has_sizes(folder, shard):
            continue  # told above

        def read(size: int, before: int = done) -> None:
            progress(before + size, total)

        try:
            found += _shard_problems(folder, shard, manifest, read)
        except (OSError, DataError) as error:
            found.append(f"{shard.name}: {error}")
        done += shard.bin_bytes
    return [*found, *_other_problems(folder, manifest)]


def _has_sizes(folder: Path, shard: TokenShard) -> bool:
    sizes = {f"{shard.name}.bin": shard.bin_bytes, f"{shard.name}.idx": shard.index_bytes}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _count_problems(manifest: DatasetManifest) -> Iterator[str]:
    fates = ("documents", "held_out_documents", "empty_documents", "quarantined_documents")
    accounted = sum(getattr(manifest, name) for name in fates)
    if manifest.documents_read != accounted:
        yield f"manifest.json: {manifest.documents_read} documents were read, {accounted} are accounted for"
    for name in ("documents", "tokens"):
        in_shards = sum(getattr(shard, name) for shard in manifest.shards)
        if getattr(manifest, name) != in_shards:
            yield f"manifest.json: {getattr(manifest, name)} {name} in all, {in_shards} in its shards"


def _shard_problems(
    folder: Path, shard: TokenShard, manifest: DatasetManifest, read: Callable[[int], None]
) -> Iterator[str]:
    path = folder / f"{shard.name}.bin"
    if (found := sha256_of(path, read)) != shard.bin_sha256:
        yield f"{path.name} should have SHA-256 {shard.bin_sha256}, found {found}"
    if (found := sha256_of(folder / f"{shard.name}.idx")) != shard.index_sha256:
        yield f"{shard.name}.idx should have SHA-256 {shard.index_sha256}, found {found}"
    reader = ShardReader(folder, shard)
    lengths = reader.lengths.astype(numpy.int64)
    ends = numpy.cumsum(lengths)
    if not lengths.size or lengths.min() < 1:
        yield f"{shard.name}.idx has documents without a token, or none"
        return
    if not numpy.array_equal(reader.offsets, (ends - lengths) * reader.tokens.itemsize):
        yield f"{shard.name}.idx has offsets that do not follow from its lengths"
    if not numpy.array_equal(reader.order, numpy.arange(len(lengths) + 1)):
        yield f"{shard.name}.idx has document indices that are not 0 to {len(lengths)}"
    if int(ends[-1]) != shard.tokens or len(reader.tokens) != shard.tokens:
        yield (
            f"{shard.name} should have {shard.tokens} tokens; its index counts {ends[-1]}, its .bin holds "
            f"{len(reader.tokens)}"
        )
        return
    yield from _token_problems(shard.name, reader, ends, manifest)


def _token_problems(
    name: str, reader: ShardReader, ends: NDArray[numpy.int64], manifest: DatasetManifest
) -> Iterator[str]:
    """Say which documents do not end with the end of document, have it inside, or have ids beyond the vocabulary."""
    without_end: list[int] = []
    with_inner: list[int] = []
    beyond: list[int] = []
    for start in range(0, len(reader.tokens), PIECE_TOKENS):
        piece = reader.tokens[start : start + PIECE_TOKENS]
        at_end = numpy.zeros(len(piece), dtype=bool)
        first, last = numpy.searchsorted(ends, (start + 1, start + len(piece) + 1))
        at_end[ends[first:last] - 1 - start] = True
        is_end = piece == manifest.end_of_document
        for found, places in (
            (without_end, at_end & ~is_end),
            (with_inner, is_end & ~at_end),
            (beyond, (piece >= manifest.vocab_size) | (piece < 0)),
        ):
            documents = numpy.searchsorted(ends, start + numpy.flatnonzero(places), side="right")
            found.extend(numpy.unique(documents).tolist())
    for found, what in (
        (without_end, f"do not end with the end of document {manifest.end_of_document}"),
        (with_inner, f"have the end of document {manifest.end_of_document} inside"),
        (beyond, f"have ids that are not below the vocabulary's {manifest.vocab_size}"),
    ):
        distinct = sorted(set(found))
        if distinct:
            named = ", ".join(map(str, distinct[:NAMED]))
            yield f"{name}: {len(distinct)} documents {what}, such as {named}"


def _other_problems(folder: Path, manifest: DatasetManifest) -> Iterator[str]:
    if (folder / manifest.tokenizer_file).is_file():
        found = sha256_of(folder / manifest.tokenizer_file)
        if found != manifest.tokenizer_sha256:
            yield f"{manifest.tokenizer_file} should have SHA-256 {manifest.tokenizer_sha256}, found {found}"
    path = folder / QUARANTINE
    try:
        records = sum(1 for _ in read_json_lines(path))
    except OrchestrateError as error:
        yield str(error)
        return
    if records != manifest.quarantined_documents:
        yield f"{QUARANTINE} should have {manifest.quarantined_documents} whole records, found {records}"
