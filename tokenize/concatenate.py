"""Put shards together without decoding: the ids are copied and the index is written anew.

What is read is compared with its checksums on the way, so a damaged source is not copied in silence.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.files import CHUNK_BYTES, sha256_of
from orchestrator.tokenize.manifest import TokenShard
from orchestrator.tokenize.shard import INDEX_CHUNK, Lengths, write_index
from orchestrator.tokenize.shard_reader import ShardReader

SHARD_TOKENS = 1 << 30
"""2 GB of uint16. GPTDataset keeps document ids in int32, so a large corpus needs many shards."""
LARGEST_SHARD_DOCUMENTS = 2**31 - 1
"""GPTDataset numbers documents in int32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A shard to be copied, with its folder."""

    folder: Path
    shard: TokenShard


def group_shards(
    sources: Sequence[Source], *, shards: int | None = None, shard_tokens: int = SHARD_TOKENS
) -> list[list[Source]]:
    """Return which shards become one, in order: `shards` groups of about the same size, or as few as fit. Pure."""
    groups: list[list[Source]] = []
    if shards is None:
        tokens = documents = 0
        for source in sources:
            tokens, documents = tokens + source.shard.tokens, documents + source.shard.documents
            if not groups or tokens > shard_tokens or documents > LARGEST_SHARD_DOCUMENTS:
                groups.append([])
                tokens, documents = source.shard.tokens, source.shard.documents
            groups[-1].append(source)
        return groups
    total, before = sum(source.shard.tokens for source in sources), 0
    for index, source in enumerate(sources):
        middle, left = before + source.shard.tokens / 2, len(sources) - index
        # The group in whose share of the tokens the middle falls; but no group is skipped, none left without a shard.
        due = min(int(middle * shards / total) + 1, len(groups) + 1, shards)
        if not groups or due > len(groups) or left <= shards - len(groups):
            groups.append([])
        groups[-1].append(source)
        before += source.shard.tokens
    return groups


def concatenate(
    sources: Sequence[Source], folder: Path, name: str, copied: Callable[[int], None] = lambda size: None
) -> TokenShard:
    """Write one shard of the documents of several, in their order, comparing what is read with its checksums.

    Args:
        sources: at least one, with ids of one type.
        copied: told of the bytes of the .bin written so far.

    Raises:
        DataError: a source is not what its manifest says.
    """
    dtype, documents = sources[0].shard.dtype, sum(source.shard.documents for source in sources)
    whole, size = hashlib.sha256(), 0
    with (folder / f"{name}.bin").open("xb") as target:
        for number, source in enumerate(sources):
            part = hashlib.sha256()
            with (source.folder / f"{source.shard.name}.bin").open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    target.write(chunk)
                    part.update(chunk)
                    if number:
                        whole.update(chunk)
                    size += len(chunk)
                    copied(size)
            if number == 0:
                whole = part.copy()
            _compare(source, ".bin", part.hexdigest(), source.shard.bin_sha256)
            index = sha256_of(source.folder / f"{source.shard.name}.idx")
            _compare(source, ".idx", index, source.shard.index_sha256)
        target.flush()
        os.fsync(target.fileno())
    index_bytes, index_sha256 = write_index(folder / f"{name}.idx", dtype, documents, lambda: lengths_of(sources))
    return TokenShard(
        name=name,
        documents=documents,
        tokens=sum(source.shard.tokens for source in sources),
        dtype=dtype,
        bin_bytes=size,
        index_bytes=index_bytes,
        bin_sha256=whole.hexdigest(),
        index_sha256=index_sha256,
    )


def _compare(source: Source, ending: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{source.folder / source.shard.name}{ending} should have SHA-256 {expected}, found {found}: it is "
            f"damaged; copy it again, and see all of it with `orchestrate data inspect {source.folder} --verify`"
        )


def lengths_of(sources: Sequence[Source]) -> Iterator[Lengths]:
    """Yield the lengths of all documents, in pieces."""
    for source in sources:
        lengths = ShardReader(source.folder, source.shard).lengths
        for start in range(0, len(lengths), INDEX_CHUNK):
            yield lengths[start : start + INDEX_CHUNK]
