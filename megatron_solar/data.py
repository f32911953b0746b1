"""Training samples by number: the same sample for the same number, whatever the layout or the attempt."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_solar import compat
from orchestrator.errors import DataError
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import TransformerShape
from orchestrator.settings import DataSettings
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest


def data_fingerprint(data: DataSettings, manifests: Sequence[DatasetManifest], seed: int) -> str:
    """Return what decides which sample has which number, as one SHA-256."""
    facts = {
        "train": [manifest.fingerprint for manifest in manifests],
        "weights": list(data.weights),
        "sequence_length": data.sequence_length,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Training and held-out samples of a run."""

    train: Any
    validation: Any | None
    fingerprint: str

    def micro_batches(
        self, split: Any, first_sample: int, layout: ParallelLayout, count: int, device: str
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
        DataError: a data set was made for another vocabulary, or two with different tokenizers.
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
        _source(manifests, data.train, data.weights, training_samples),
        _source(held_out, data.validation, (), validation_samples) if held_out else None,
        sequence_length=data.sequence_length,
        seed=seed,
        tokenizer_fingerprint=manifests[0].tokenizer_sha256,
        vocab_size=manifests[0].vocab_size,
        end_of_document=manifests[0].end_of_document,
        cache=cache,
    )
    return Samples(train=train, validation=validation, fingerprint=data_fingerprint(data, manifests, seed))


def _source(
    manifests: Sequence[DatasetManifest], folders: Sequence[str], weights: Sequence[float], samples: int
) -> compat.BlendSource:
    """Return the shards of data sets; a data set's weight is spread over its shards by their tokens."""
    prefixes, shares = [], []
    for index, (manifest, folder) in enumerate(zip(manifests, folders, strict=True)):
        weight = weights[index] if weights else float(manifest.tokens)
        for shard in manifest.shards:
            prefixes.append(str(Path(folder) / shard.name))
            shares.append(weight * shard.tokens / max(1, manifest.tokens))
    return compat.BlendSource(
        prefixes=tuple(prefixes), weights=tuple(shares) if len(prefixes) > 1 else None, samples=samples
    )
