"""What a data set holds, for people: some of its documents as text, and what was quarantined and why."""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.files import read_json_lines
from orchestrator.tokenize.decoder import Decoder
from orchestrator.tokenize.manifest import QUARANTINE, DatasetManifest
from orchestrator.tokenize.shard_reader import ShardReader

EXAMPLES = 2
"""Bad records shown of each reason."""
TOLD_EVERY = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownDocument:
    """A document of a data set, decoded."""

    number: int
    """In the data set, from 0."""
    shard: str
    number_in_shard: int
    tokens: int
    """Its end included."""
    text: str
    """As far as `shown_tokens` go; special ids as ⟨</s>⟩."""
    shown_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadReason:
    """Quarantined records of one reason."""

    reason: str
    records: int
    examples: tuple[dict[str, Any], ...]
    """The first ones: file, offset, bytes and content."""


def choose_documents(manifest: DatasetManifest, count: int, seed: int | None = None) -> list[int]:
    """Return numbers of documents: evenly over the data set, or drawn with a seed; in order. Pure."""
    count = min(count, manifest.documents)
    if seed is not None:
        return sorted(random.Random(seed).sample(range(manifest.documents), count))
    return [(2 * index + 1) * manifest.documents // (2 * count) for index in range(count)]


def show_documents(
    folder: Path, manifest: DatasetManifest, numbers: Sequence[int], decoder: Decoder, limit: int
) -> Iterator[ShownDocument]:
    """Yield documents by number, decoded up to `limit` tokens.

    Raises:
        ConfigError: there is no document of a number.
    """
    for number in numbers:
        if not 0 <= number < manifest.documents:
            raise ConfigError(f"document {number} should be from 0 to {manifest.documents - 1}, which {folder} has")
        place = number
        for shard in manifest.shards:
            if place < shard.documents:
                ids = ShardReader(folder, shard).document(place)
                yield ShownDocument(
                    number=number,
                    shard=shard.name,
                    number_in_shard=place,
                    tokens=len(ids),
                    text=decoder.text(ids[:limit]),
                    shown_tokens=min(limit, len(ids)),
                )
                break
            place -= shard.documents


def find_documents(
    folder: Path,
    manifest: DatasetManifest,
    wanted: str,
    decoder: Decoder,
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[int]:
    """Yield the numbers of the first documents whose text has `wanted` in it; every document before is decoded.

    Args:
        progress: told now and then of the documents looked at and of all.
    """
    number = found = 0
    for shard in manifest.shards:
        reader = ShardReader(folder, shard)
        for place in range(shard.documents):
            if wanted in decoder.text(reader.document(place)):
                yield number
                found += 1
                if found == count:
                    return
            number += 1
            if number % TOLD_EVERY == 0:
                progress(number, manifest.documents)
    progress(number, manifest.documents)


def bad_reasons(folder: Path) -> list[BadReason]:
    """Return the quarantined records by reason, the most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    for _, record in read_json_lines(folder / QUARANTINE):
        reason = str(record["reason"])
        counts[reason] += 1
        if len(examples.setdefault(reason, [])) < EXAMPLES:
            examples[reason].append({key: value for key, value in record.items() if key != "reason"})
    return [
        BadReason(reason=reason, records=count, examples=tuple(examples[reason]))
        for reason, count in counts.most_common()
    ]
