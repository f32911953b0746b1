"""Training samples by number: the same sample for the same number, whatever the layout or the attempt."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_solar import compat
from megatron_solar.sample_order import BlendSource, OrderedSamples, data_fingerprint
from orchestrator.errors import DataError
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import TransformerShape
from orchestrator.settings import DataSettings
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Training and held-out samples of a run."""

    train: OrderedSamples
    validation: OrderedSamples | None
    fingerprint: str
    tokenizer_sha256: str

    def micro_batches(
        self, split: OrderedSamples, first_sample: int, layout: ParallelLayout, count: int, device: str
    ) -> list[dict[str, Tensor]]:
        """Return `count` micro-batches of this rank, from a global sample number on.

        Micro-batch m of data-parallel rank d holds samples first + (m * DP + d) * MBS + [0, MBS).
        """
        size, data_rank = layout.micro_batch_size, compat.data_rank()
        batches = []
        for number in range(count):
            start = first_sample + (number * layout.data_parallel + data_rank) * size
            items = [split[start + offset] for offset in range(size)]
            batches.append(
                {
                    name: torch.from_numpy(np.stack([np.asarray(item[name]) for item in items])).to(device)
                    for name in ("tokens", "labels", "position_ids")
                }
            )
        return batches


def open_samples(
    data: DataSettings,
    shape: TransformerShape,
    *,
    seed: int,
    training_samples: int,
    validation_samples: int,
    cache: Path,
) -> Samples:
    """Open the data sets of a run; rank 0 builds the sample index first.

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
    train, validation = compat.build_datasets(
        blend_source(manifests, data.train, data.weights, data.sequence_length, training_samples),
        blend_source(held_out, data.validation, (), data.sequence_length, validation_samples) if held_out else None,
        sequence_length=data.sequence_length,
        seed=seed,
        tokenizer_fingerprint=manifests[0].tokenizer_sha256,
        vocab_size=manifests[0].vocab_size,
        end_of_document=manifests[0].end_of_document,
        cache=cache,
    )
    return Samples(
        train=train,
        validation=validation,
        fingerprint=data_fingerprint(data, manifests, seed),
        tokenizer_sha256=manifests[0].tokenizer_sha256,
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
