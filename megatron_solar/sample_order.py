"""Which sample of which shard is sample k of a run: the same whatever the run's length, layout or attempt.

A shard is read epoch by epoch. Its sample n is sample n % S of its epoch n // S, where S samples make
one epoch, and each epoch is a permutation of its own, drawn from seed + epoch. Megatron shuffles the
documents of all epochs asked for in one go, so that a prolonged run would read some samples again and
others never. Over shards the next sample comes from the one furthest behind its weight; that choice
looks back only, so a longer order begins with the shorter one.

In phases (`data.phases`) the choice begins anew with each, among the phase's shards by its weights; a shard that was
read before goes on with its next sample, so that none is lost, and none comes again before all others of its epoch.

What is left below one sequence at the end of a shard's epoch is not read in that epoch: at most
sequence_length tokens, others in each epoch since the documents are shuffled.

    data_index/train/                      and data_index/validation/
      <md5>-GPTDataset-train-*.npy .txt    three indexes and a description for each epoch of a shard
      blend_shards.npy                     int16, the shard of each sample; only with several shards
      blend_samples.npy                    int64, its number within the shard
      complete.json                        written last: of which request, and the sizes of the files

Rank 0 builds; the others read after a barrier. A folder without `complete.json`, with another
request's, or with a file that lacks bytes is thrown away and built anew. An index that was built ahead
(`prebuilt_index`) lies in such folders too, and is only ever read.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json, sync_folder, write_json

ORDER = 2
"""Raised when the order changes: a checkpoint of another order must not go on with this one."""

COMPLETE = "complete.json"
BLEND_SHARDS = "blend_shards.npy"
BLEND_SAMPLES = "blend_samples.npy"
LARGEST_BLEND = 1 << 15
"""Shards that an int16 can tell apart."""
COUNT_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlendPhase:
    """Which shards are read from a sample on, and how much of each."""

    first_sample: int
    shards: tuple[int, ...]
    """Their numbers in the source, in the order in which the phase names them: of equal ones the first is next."""
    weights: tuple[float, ...]
    """Shares of the phase's samples, of any sum, each above zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlendSource:
    """Shards of one split, with their weights and what is wanted of them."""

    prefixes: tuple[str, ...]
    """The first phase's shards, then those that only later ones read."""
    weights: tuple[float, ...] | None
    """Shares of the first phase's samples, of any sum; None means in proportion to `epoch_samples`."""
    epoch_samples: tuple[int, ...]
    """Samples in one epoch of each shard, at least one."""
    samples: int
    """Samples wanted, over all epochs."""
    later_phases: tuple[BlendPhase, ...] = ()
    """In their order."""

    def phases(self) -> tuple[tuple[BlendPhase, int], ...]:
        """Return each phase of which samples are wanted, with the sample before which it ends."""
        weights = self.weights or tuple(map(float, self.epoch_samples))
        first = BlendPhase(first_sample=0, shards=tuple(range(len(weights))), weights=weights)
        phases = [first, *self.later_phases]
        ends = [*(min(phase.first_sample, self.samples) for phase in self.later_phases), self.samples]
        return tuple(
            (phase, end) for phase, end in zip(phases, ends, strict=True) if phase.first_sample < end or phase is first
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseFacts:
    """What decides the order of the samples in a phase."""

    first_sample: int
    data_sets: tuple[str, ...]
    """Fingerprints."""
    weights: tuple[float, ...]
    """As they were given; empty means in proportion to the data sets' samples."""


def history_fingerprint(phases: Sequence[PhaseFacts], consumed_samples: int, *, sequence_length: int, seed: int) -> str:
    """Return what decides which sample has which number among the first `consumed_samples`, as one SHA-256.

    A phase of which no sample was read yet is no part of it; the first is always.
    """
    first, *later = phases
    facts = {
        "order": ORDER,
        "train": list(first.data_sets),
        "weights": list(first.weights),
        "sequence_length": sequence_length,
        "seed": seed,
    }
    begun = [phase for phase in later if phase.first_sample < consumed_samples]
    if begun:  # without phases the fingerprint is that of versions before they were there
        facts["phases"] = [dataclasses.asdict(phase) for phase in begun]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class OpenEpoch(Protocol):
    """Opens one epoch of a shard as a sequence of items, after building its indexes unless `is_built`."""

    def __call__(self, folder: Path, prefix: str, epoch: int, *, is_built: bool) -> Any:
        """Open epoch `epoch` of the shard at `prefix`, with its indexes in `folder`."""


Blend = Callable[[NDArray[np.int16], NDArray[np.int64], NDArray[np.float64]], None]
"""Fills the shard of each sample and its number within the shard, by weights that sum to one."""


def request_digest(source: BlendSource, *, sequence_length: int, seed: int, tokenizer_fingerprint: str) -> str:
    """Return a SHA-256 of all that decides what an index holds; the shards' sizes stand for their contents.

    Raises:
        FileNotFoundError: a shard is not there.
    """
    described = dataclasses.asdict(source)
    if not source.later_phases:  # an index of a version without phases is still good
        del described["later_phases"]
    facts = {
        "order": ORDER,
        "source": described,
        "bytes": [[Path(f"{prefix}{end}").stat().st_size for end in (".bin", ".idx")] for prefix in source.prefixes],
        "sequence_length": sequence_length,
        "seed": seed,
        "tokenizer": tokenizer_fingerprint,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


Epoch = tuple[str, int]
"""Prefix of a shard, and which of its epochs."""

EachEpoch = Callable[[Callable[[Epoch], int], Sequence[Epoch]], Iterable[int]]
"""Calls a function with every epoch and gives the results in their order, as `map` does."""


def build_index(
    source: BlendSource, folder: Path, request: str, open_epoch: OpenEpoch, blend: Blend, each: EachEpoch = map
) -> None:
    """Build every index that reading `source` needs, unless the folder has them already; for one process alone.

    The folder is this function's own: whatever else lies in it is removed.

    Args:
        each: how the epochs are gone through; each has files of its own.

    Raises:
        DataError: a shard has another number of samples than its manifest says, or the shards are too many.
    """
    if not index_problem(folder, request):
        return
    _wipe(folder)
    folder.mkdir(parents=True)
    counts = zip(source.prefixes, source.epoch_samples, _blended_counts(source, folder, blend), strict=True)
    # Of a data set that is named twice each epoch is built once.
    sizes = {(prefix, epoch): size for prefix, size, count in counts for epoch in range(-(-count // size))}
    found = each(functools.partial(_build_epoch, open_epoch, folder), list(sizes))
    for ((prefix, _), size), built in zip(sizes.items(), found, strict=True):
        if built != size:
            raise DataError(f"{prefix} should hold {size} samples, found {built}; copy it again or tokenize again")
    files = sorted(folder.iterdir())
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
    write_json(folder / COMPLETE, {"request": request, "files": {path.name: path.stat().st_size for path in files}})


def _build_epoch(open_epoch: OpenEpoch, folder: Path, epoch: Epoch) -> int:
    """Build one epoch and return its samples."""
    prefix, number = epoch
    return len(open_epoch(folder, prefix, number, is_built=False))


def index_problem(folder: Path, request: str) -> str:
    """Return why a folder does not hold the whole index of a request, or nothing."""
    record = _record(folder)
    if not record:
        return f"{folder} has no {COMPLETE}, which is written last" if folder.exists() else f"{folder} is not there"
    if record.get("request") != request:
        return f"{folder} holds the index of other samples"
    sizes = {folder / name: size for name, size in record["files"].items()}
    torn = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
    return f"{folder} lacks bytes of {len(torn)} files, such as {torn[0]}" if torn else ""


class SamplePlaces:
    """Where each sample of a split comes from, by an index that is built."""

    def __init__(self, source: BlendSource, folder: Path) -> None:
        self._source = source
        self._blend: tuple[NDArray[np.int16], NDArray[np.int64]] | None = None
        if len(source.prefixes) > 1:
            self._blend = (
                np.load(folder / BLEND_SHARDS, mmap_mode="r"),
                np.load(folder / BLEND_SAMPLES, mmap_mode="r"),
            )

    def place(self, number: int) -> tuple[int, int, int]:
        """Return (shard, epoch of the shard, sample within the epoch) of a sample's number.

        Raises:
            IndexError: the number is not of this order.
        """
        if not 0 <= number < self._source.samples:
            raise IndexError(f"sample {number} should be from 0 to below {self._source.samples}")
        shard, sample = 0, number
        if self._blend is not None:
            shard, sample = int(self._blend[0][number]), int(self._blend[1][number])
        return shard, *divmod(sample, self._source.epoch_samples[shard])

    def count(self, first: int, end: int) -> NDArray[np.int64]:
        """Return how many of the samples from `first` to below `end` each shard gives, as the index has them."""
        if self._blend is None:
            return np.array([end - first])
        shards = len(self._source.prefixes)
        found = np.zeros(shards, dtype=np.int64)
        for start in range(first, end, COUNT_AT_ONCE):
            found += np.bincount(self._blend[0][start : min(start + COUNT_AT_ONCE, end)], minlength=shards)
        return found


class OrderedSamples:
    """The samples of one split by number.

    A shard's epoch is opened when its first sample is asked for, and closed when another epoch of the
    same shard is: runs read forward, so at most one epoch a shard is open at any time.

    Raises:
        DataError: the folder does not hold the index of this request.
    """

    def __init__(self, source: BlendSource, folder: Path, request: str, open_epoch: OpenEpoch) -> None:
        if _record(folder).get("request") != request:
            raise DataError(
                f"{folder} should hold the sample index of this run, but this rank does not see it there; "
                "put its folder on a file system that all nodes share"
            )
        self._source = source
        self._folder = folder
        self._open_epoch = open_epoch
        self._epochs: dict[int, tuple[int, Any]] = {}
        self._places = SamplePlaces(source, folder)

    def __len__(self) -> int:
        """Return the number of samples that were asked for."""
        return self._source.samples

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """Return an item with int64 `tokens`, `labels` and `position_ids` of sequence_length."""
        shard, epoch, sample = self.place(number)
        is_open = shard in self._epochs and self._epochs[shard][0] == epoch
        if not is_open:
            prefix = self._source.prefixes[shard]
            self._epochs[shard] = (epoch, self._open_epoch(self._folder, prefix, epoch, is_built=True))
        item: Mapping[str, Any] = self._epochs[shard][1][sample]
        return item

    def place(self, number: int) -> tuple[int, int, int]:
        """Return (shard, epoch of the shard, sample within the epoch) of a sample's number; raises IndexError."""
        return self._places.place(number)


def _blended_counts(source: BlendSource, folder: Path, blend: Blend) -> Sequence[int]:
    """Write the blend of several shards, and return how many samples each shard gives."""
    count = len(source.prefixes)
    if count == 1:  # a later phase has the same shard
        return [source.samples]
    if count > LARGEST_BLEND:
        raise DataError(
            f"data sets should have at most {LARGEST_BLEND} shards together, found {count}; use larger ones"
        )
    shards = np.zeros(source.samples, dtype=np.int16)
    samples = np.zeros(source.samples, dtype=np.int64)
    read = np.zeros(count, dtype=np.int64)
    for phase, end in source.phases():
        weights = np.array(phase.weights, dtype=np.float64)
        part = slice(phase.first_sample, end)
        blend(shards[part], samples[part], weights / weights.sum())
        before = read.copy()
        numbers = np.array(phase.shards, dtype=np.int16)
        for start in range(phase.first_sample, end, COUNT_AT_ONCE):  # what numpy makes of it are copies in int64
            piece = slice(start, min(start + COUNT_AT_ONCE, end))
            shards[piece] = numbers[shards[piece]]
            samples[piece] += before[shards[piece]]
            read += np.bincount(shards[piece], minlength=count)
    np.save(folder / BLEND_SHARDS, shards)
    np.save(folder / BLEND_SAMPLES, samples)
    return [int(number) for number in read]


def _record(folder: Path) -> Mapping[str, Any]:
    """Return what `complete.json` says, or nothing."""
    try:
        record = read_json(folder / COMPLETE)
    except (FileNotFoundError, OrchestrateError):
        return {}
    return record if isinstance(record, dict) else {}


def _wipe(folder: Path) -> None:
    """Remove the folder, first of all what makes it trusted."""
    if folder.exists():
        (folder / COMPLETE).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)
