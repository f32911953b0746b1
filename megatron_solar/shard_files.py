"""The files that a run reads its samples from, and whether they are what their manifests say.

Sizes are compared at every start, on every rank, when the manifests are read. Checksums cost a reading: rank 0 reads
those files whose size or time of change is another than at the last start, whole, and up to VERIFIED_BYTES of those
that were never read so. What it found is in the run's `shards.json`. Every byte of a data set is compared by
`orchestrate data inspect DIR --verify`, and by a copy to the node (`staging.py`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_solar.sample_request import SampleRequest
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json, sha256_of, write_json
from orchestrator.units import format_time
from orchestrator.values import from_plain, to_plain

VERIFIED_BYTES = 1 << 30
"""Of files never compared before, in one start: a second or two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One of a shard's two files, as its data set's manifest has it."""

    prefix: str
    """The shard's, in its data set's folder."""
    ending: str
    """`.bin` or `.idx`."""
    data_set: str
    """Fingerprint."""
    shard: str
    """Name in the data set."""
    bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(f"{self.prefix}{self.ending}")


def files_of(request: SampleRequest) -> list[ShardFile]:
    """Return the files of all shards that a run reads, each once."""
    read = {prefix for source in request.sources.values() for prefix in source.prefixes}
    found: dict[Path, ShardFile] = {}
    for folder, manifest in request.manifests.items():
        for shard in manifest.shards:
            prefix = str(Path(folder) / shard.name)
            for ending, size, sha256 in (
                (".bin", shard.bin_bytes, shard.bin_sha256),
                (".idx", shard.index_bytes, shard.index_sha256),
            ):
                file = ShardFile(
                    prefix=prefix,
                    ending=ending,
                    data_set=manifest.fingerprint,
                    shard=shard.name,
                    bytes=size,
                    sha256=sha256,
                )
                if prefix in read:
                    found.setdefault(file.path, file)
    return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """A file as a start found it."""

    bytes: int
    changed_ns: int
    """Time of its last change, in nanoseconds since 1970."""
    is_verified: bool
    """Whether its bytes were those of the manifest then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
    """shards.json."""

    files: dict[str, _Seen]


def check_shards(files: Sequence[ShardFile], record: Path, alive: Callable[[], None]) -> None:
    """Refuse shards whose bytes changed since their manifests were written, as far as that costs little.

    Args:
        record: what earlier starts of the run found; written anew.
        alive: called while files are read.

    Raises:
        DataError: all files that are not what their manifests say.
    """
    before = _read(record)
    now: dict[str, _Seen] = {}
    problems = []
    budget = VERIFIED_BYTES
    for file in files:
        status = file.path.stat()
        seen = before.get(str(file.path))
        is_verified = seen is not None and seen.is_verified
        is_changed = seen is not None and (seen.bytes, seen.changed_ns) != (status.st_size, status.st_mtime_ns)
        if is_changed or (not is_verified and file.bytes <= budget):
            budget -= 0 if is_changed else file.bytes
            found = sha256_of(file.path, lambda _: alive())
            is_verified = found == file.sha256
            if not is_verified:
                problems.append(
                    f"{file.path}, changed at {format_time(status.st_mtime)}, should have SHA-256 {file.sha256[:16]}, "
                    f"found {found[:16]}"
                )
        now[str(file.path)] = _Seen(bytes=status.st_size, changed_ns=status.st_mtime_ns, is_verified=is_verified)
    if problems:
        raise DataError(
            "shards are not what their data set's manifest says; put them back as they were, or tokenize again:",
            problems,
        )
    if now != before:
        write_json(record, to_plain(_Record(files=now)))


def _read(record: Path) -> dict[str, _Seen]:
    """Return what an earlier start found, or nothing."""
    try:
        found = from_plain(_Record, read_json(record), "", [])
    except (FileNotFoundError, OrchestrateError):
        return {}
    return found.files if found is not None else {}
