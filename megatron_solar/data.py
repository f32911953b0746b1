"""Training samples by number: the same sample for the same number, whatever the layout or the attempt."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_solar import compat
from megatron_solar.sample_order import OrderedSamples
from megatron_solar.sample_request import request_samples
from orchestrator.layout import ParallelLayout
from orchestrator.model_shape import TransformerShape
from orchestrator.settings import DataSettings


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

    Args:
        cache: where the index is built, unless `data.index` names a folder that has it.

    Raises:
        DataError: as `request_samples`; or the index that was built ahead is not of these samples.
    """
    request = request_samples(
        data, shape, seed=seed, training_samples=training_samples, validation_samples=validation_samples
    )
    train, validation = compat.build_datasets(request, cache)
    return Samples(
        train=train,
        validation=validation,
        fingerprint=request.fingerprint,
        tokenizer_sha256=request.tokenizer_sha256,
    )
