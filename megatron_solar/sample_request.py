"""Which samples a run reads, in which order: told from its plan and its data sets, before any index is there.

The launching machine asks this as well, to check an index that was built ahead; so no torch here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_solar.sample_order import BlendSource, data_fingerprint, request_digest
from orchestrator.errors import DataError
from orchestrator.model_shape import TransformerShape
from orchestrator.plan import TrainingPlan
from orchestrator.settings import DataSettings
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The samples of a run, training and held-out, and all that decides their order."""

    data: DataSettings
    train: BlendSource
    validation: BlendSource | None
    seed: int
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    fingerprint: str
    """Of what decides which training sample has which number, whatever their count."""

    @property
    def sources(self) -> Mapping[str, BlendSource]:
        """The splits by name, as their index's folders are called."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation is not None else {})

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

    def facts(self) -> dict[str, Any]:
        """Return what people call it by, to tell two requests apart."""
        return {
            "data.train": list(self.data.train),
            "data.weights": list(self.data.weights),
            "data.validation": list(self.data.validation),
            "data.sequence_length": self.data.sequence_length,
            "training.seed": self.seed,
            "training samples": self.train.samples,
            "validation samples": self.validation.samples if self.validation is not None else 0,
            "data fingerprint": self.fingerprint,
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
    )


def validation_passes(plan: TrainingPlan) -> int:
    """Return the micro-batches a data-parallel rank reads in one validation; pipelines need whole rounds."""
    layout = plan.layout
    passes = -(-plan.settings.training.validation_samples // (layout.micro_batch_size * layout.data_parallel))
    rounds = layout.pipeline_parallel if layout.virtual_pipeline_parallel > 1 else 1
    return -(-passes // rounds) * rounds


def request_samples(
    data: DataSettings, shape: TransformerShape, *, seed: int, training_samples: int, validation_samples: int
) -> SampleRequest:
    """Read the manifests of the data sets and say which samples are wanted of them.

    Raises:
        DataError: a data set was made for another vocabulary, two with different tokenizers, or one holds
            no sample at all.
    """
    manifests = [read_manifest(Path(folder)) for folder in data.train]
    held_out = [read_manifest(Path(folder)) for folder in data.validation]
    for manifest, folder in zip([*manifests, *held_out], [*data.train, *data.validation], strict=True):
        if manifest.vocab_size > shape.vocab_size:
            raise DataError(
                f"{folder} holds ids up to {manifest.vocab_size - 1}, the model knows {shape.vocab_size}; "
                "tokenize with the model's own tokenizer"
            )
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise DataError(f"{folder} was made with another tokenizer than {data.train[0]}; tokenize both with one")
    length = data.sequence_length
    return SampleRequest(
        data=data,
        train=blend_source(manifests, data.train, data.weights, length, training_samples),
        validation=blend_source(held_out, data.validation, (), length, validation_samples) if held_out else None,
        seed=seed,
        tokenizer_sha256=manifests[0].tokenizer_sha256,
        vocab_size=manifests[0].vocab_size,
        end_of_document=manifests[0].end_of_document,
        fingerprint=data_fingerprint(data, manifests, seed),
    )


def blend_source(
    manifests: Sequence[DatasetManifest],
    folders: Sequence[str],
    weights: Sequence[float],
    sequence_length: int,
    samples: int,
) -> BlendSource:
    """Return the shards of data sets, a data set's weight spread over its shards by their samples.

    So the shards of one data set come to the end of an epoch together, to within a sample: a data set
    alone gives each of its samples once before any of them again. A shard below one sample, which is
    sequence_length + 1 tokens, is left out where the data set has others: it is a tail like the one that
    every shard leaves unread.

    Raises:
        DataError: a data set without a single sample.
    """
    prefixes: list[str] = []
    shares: list[float] = []
    epoch_samples: list[int] = []
    empty = []
    for index, (manifest, folder) in enumerate(zip(manifests, folders, strict=True)):
        counts = {shard.name: (shard.tokens - 1) // sequence_length for shard in manifest.shards}
        readable = {name: count for name, count in counts.items() if count > 0}
        if not readable:
            shards = ", ".join(f"{shard.name} with {shard.tokens} tokens" for shard in manifest.shards)
            empty.append(f"{folder} has {shards}")
        weight = weights[index] if weights else sum(readable.values())
        for name, count in readable.items():
            prefixes.append(str(Path(folder) / name))
            shares.append(weight * count / sum(readable.values()))
            epoch_samples.append(count)
    if empty:
        raise DataError(
            f"a data set should have a shard of at least {sequence_length + 1} tokens, one sample at "
            f"data.sequence_length={sequence_length}; add text or shorten the sequences:",
            empty,
        )
    return BlendSource(
        prefixes=tuple(prefixes),
        weights=tuple(shares) if len(prefixes) > 1 else None,
        epoch_samples=tuple(epoch_samples),
        samples=samples,
    )
