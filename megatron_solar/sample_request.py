"""Which samples a run reads, in which order: told from its plan and its data sets, before any index is there.

The launching machine asks this as well, to check an index that was built ahead; so no torch here.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_solar.sample_order import BlendPhase, BlendSource, PhaseFacts, history_fingerprint, request_digest
from orchestrator.errors import DataError
from orchestrator.model_shape import TransformerShape
from orchestrator.phases import planned_phases
from orchestrator.plan import TrainingPlan
from orchestrator.settings import DataSettings
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The samples of a run, training and held-out, and all that decides their order."""

    data: DataSettings
    manifests: Mapping[str, DatasetManifest]
    """Of every data set by its folder."""
    train: BlendSource
    validation: Mapping[str, BlendSource]
    """Each held-out data set by its name."""
    phases: tuple[PhaseFacts, ...]
    """All that are planned, also those that begin after the last sample."""
    seed: int
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int

    @property
    def sources(self) -> Mapping[str, BlendSource]:
        """The splits, as their index's folders are called."""
        held_out = list(self.validation.values())
        names = ["validation"] if len(held_out) == 1 else [f"validation-{number}" for number in range(len(held_out))]
        return {"train": self.train, **dict(zip(names, held_out, strict=True))}

    def digests(self) -> dict[str, str]:
        """Return of each split what its index must be made of."""
        return {
            name: request_digest(
                source,
                sequence_length=self.data.sequence_length,
                seed=self.seed,
                tokenizer_fingerprint=self.tokenizer_sha256,
            )
            for name, source in self.sources.items()
        }

    def fingerprint_at(self, consumed_samples: int) -> str:
        """Return what decides which training sample has which number among the first `consumed_samples`."""
        return history_fingerprint(
            self.phases, consumed_samples, sequence_length=self.data.sequence_length, seed=self.seed
        )

    def facts(self) -> dict[str, Any]:
        """Return what people call it by, to tell two requests apart."""
        phases = [dataclasses.asdict(phase) for phase in self.data.phases]
        return {
            "data.train": list(self.data.train),
            "data.weights": list(self.data.weights),
            **({"data.phases": phases} if phases else {}),
            "data.validation": list(self.data.validation),
            "data.sequence_length": self.data.sequence_length,
            "training.seed": self.seed,
            "training samples": self.train.samples,
            "validation samples": max((source.samples for source in self.validation.values()), default=0),
            "data fingerprint": self.fingerprint_at(self.train.samples),
        }


def request_of(plan: TrainingPlan) -> SampleRequest:
    """Return the samples that a plan will read. Raises as `request_samples`."""
    layout = plan.layout
    return request_samples(
        plan.settings.data,
        plan.settings.model,
        seed=plan.settings.training.seed,
        training_samples=plan.consumed_samples(plan.total_steps),
        validation_samples=validation_passes(plan) * layout.micro_batch_size * layout.data_parallel,
        first_samples=[phase.first_sample for phase in planned_phases(plan)[1:]],
    )


def validation_passes(plan: TrainingPlan) -> int:
    """Return the micro-batches a data-parallel rank reads in one validation; pipelines need whole rounds."""
    layout = plan.layout
    passes = -(-plan.settings.training.validation_samples // (layout.micro_batch_size * layout.data_parallel))
    rounds = layout.pipeline_parallel if layout.virtual_pipeline_parallel > 1 else 1
    return -(-passes // rounds) * rounds


def request_samples(
    data: DataSettings,
    shape: TransformerShape,
    *,
    seed: int,
    training_samples: int,
    validation_samples: int,
    first_samples: Sequence[int] = (),
) -> SampleRequest:
    """Read the manifests of the data sets and say which samples are wanted of them.

    Args:
        validation_samples: of each held-out data set.
        first_samples: how many samples are read before each of `data.phases`.

    Raises:
        DataError: a data set was made for another vocabulary, two with different tokenizers, or one holds
            no sample at all.
    """
    folders = dict.fromkeys([*data.training_folders, *data.validation])
    manifests = {folder: read_manifest(Path(folder)) for folder in folders}
    first = manifests[data.train[0]]
    for folder, manifest in manifests.items():
        if manifest.vocab_size > shape.vocab_size:
            raise DataError(
                f"{folder} holds ids up to {manifest.vocab_size - 1}, the model knows {shape.vocab_size}; "
                "tokenize with the model's own tokenizer"
            )
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(f"{folder} was made with another tokenizer than {data.train[0]}; tokenize both with one")
    blends = [(data.train, data.weights), *((phase.train, phase.weights) for phase in data.phases)]
    begins = [0, *first_samples]
    length = data.sequence_length
    return SampleRequest(
        data=data,
        manifests=manifests,
        train=phased_source(manifests, blends, begins, length, training_samples),
        validation={
            name: blend_source([manifests[folder]], [folder], (), length, validation_samples)
            for name, folder in zip(unique_names(data.validation), data.validation, strict=True)
        },
        phases=tuple(
            PhaseFacts(
                first_sample=begin,
                data_sets=tuple(manifests[folder].fingerprint for folder in train),
                weights=tuple(weights),
            )
            for begin, (train, weights) in zip(begins, blends, strict=True)
        ),
        seed=seed,
        tokenizer_sha256=first.tokenizer_sha256,
        vocab_size=first.vocab_size,
        end_of_document=first.end_of_document,
    )


def unique_names(folders: Sequence[str]) -> list[str]:
    """Return what data sets are called: the names of their folders, with a number behind each that comes again."""
    seen: Counter[str] = Counter()
    found = []
    for folder in folders:
        name = Path(folder).name
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def phased_source(
    manifests: Mapping[str, DatasetManifest],
    blends: Sequence[tuple[Sequence[str], Sequence[float]]],
    first_samples: Sequence[int],
    sequence_length: int,
    samples: int,
) -> BlendSource:
    """Return the shards of all phases; a shard that several phases read is one, with one place where it is read.

    A data set is known again by its fingerprint, wherever a later phase finds it. One that a phase names twice is
    two: each is the one that an earlier phase named first or second.

    Args:
        blends: folders and weights of each phase.

    Raises:
        DataError: a data set without a single sample.
    """
    numbers: dict[tuple[str, int, str], int] = {}
    prefixes: list[str] = []
    epoch_samples: list[int] = []
    phases: list[BlendPhase] = []
    for begin, (train, weights) in zip(first_samples, blends, strict=True):
        if phases and begin >= samples:
            continue  # it is read by a longer run
        named: Counter[tuple[str, str]] = Counter()
        shards, shares = [], []
        for shard in _blended_shards([manifests[folder] for folder in train], train, weights, sequence_length):
            data_set = manifests[train[shard.data_set]].fingerprint
            named[data_set, shard.name] += 1
            key = (data_set, named[data_set, shard.name], shard.name)
            if key not in numbers:
                numbers[key] = len(prefixes)
                prefixes.append(str(Path(train[shard.data_set]) / shard.name))
                epoch_samples.append(shard.epoch_samples)
            shards.append(numbers[key])
            shares.append(shard.share)
        phases.append(BlendPhase(first_sample=begin, shards=tuple(shards), weights=tuple(shares)))
    return BlendSource(
        prefixes=tuple(prefixes),
        weights=phases[0].weights if len(prefixes) > 1 else None,
        epoch_samples=tuple(epoch_samples),
        samples=samples,
        later_phases=tuple(phases[1:]),
    )


def blend_source(
    manifests: Sequence[DatasetManifest],
    folders: Sequence[str],
    weights: Sequence[float],
    sequence_length: int,
    samples: int,
) -> BlendSource:
    """Return the shards of data sets that are read in one phase.

    Raises:
        DataError: a data set without a single sample.
    """
    shards = _blended_shards(manifests, folders, weights, sequence_length)
    return BlendSource(
        prefixes=tuple(str(Path(folders[shard.data_set]) / shard.name) for shard in shards),
        weights=tuple(shard.share for shard in shards) if len(shards) > 1 else None,
        epoch_samples=tuple(shard.epoch_samples for shard in shards),
        samples=samples,
    )


class _BlendedShard(NamedTuple):
    data_set: int
    """Which of the data sets it is of."""
    name: str
    share: float
    epoch_samples: int


def _blended_shards(
    manifests: Sequence[DatasetManifest], folders: Sequence[str], weights: Sequence[float], sequence_length: int
) -> list[_BlendedShard]:
    """Return the shards of data sets, a data set's weight spread over its shards by their samples.

    So the shards of one data set come to the end of an epoch together, to within a sample: a data set
    alone gives each of its samples once before any of them again. A shard below one sample, which is
    sequence_length + 1 tokens, is left out where the data set has others: it is a tail like the one that
    every shard leaves unread.

    Raises:
        DataError: a data set without a single sample.
    """
    found: list[_BlendedShard] = []
    empty = []
    for index, (manifest, folder) in enumerate(zip(manifests, folders, strict=True)):
        counts = {shard.name: (shard.tokens - 1) // sequence_length for shard in manifest.shards}
        readable = {name: count for name, count in counts.items() if count > 0}
        if not readable:
            shards = ", ".join(f"{shard.name} with {shard.tokens} tokens" for shard in manifest.shards)
            empty.append(f"{folder} has {shards}")
        weight = weights[index] if weights else sum(readable.values())
        for name, count in readable.items():
            found.append(_BlendedShard(index, name, weight * count / sum(readable.values()), count))
    if empty:
        raise DataError(
            f"a data set should have a shard of at least {sequence_length + 1} tokens, one sample at "
            f"data.sequence_length={sequence_length}; add text or shorten the sequences:",
            empty,
        )
    return found
