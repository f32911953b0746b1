"""Training samples by number: the same sample for the same number, whatever the layout or the attempt."""

import dataclasses
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.sample_order import OrderedSamples
from megatron_solar.sample_request import SampleRequest, request_of
from megatron_solar.shard_files import check_shards, files_of
from megatron_solar.staging import stage
from orchestrator.events import StageEvent
from orchestrator.layout import ParallelLayout
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Training and held-out samples of a run."""

    request: SampleRequest
    train: OrderedSamples
    validation: Mapping[str, OrderedSamples]
    """Of each held-out data set by its name."""

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


def samples_of_run(
    run: RunDirectory, plan: TrainingPlan, alive: Callable[[], None], tell: Callable[[StageEvent], None]
) -> Samples:
    """Open the samples of a run, after a look at its shards or a copy of them to this node; collective.

    Args:
        alive: called while shards are read or copied, which may take longer than anything else at the start.

    Raises:
        DataError: as `request_samples` and `open_samples`; or a shard is not what its manifest says.
        DiskFullError: the node has no room for the shards.
    """
    request = request_of(plan)
    files, folder = files_of(request), request.data.stage_to
    if not folder:
        if torch.distributed.get_rank() == 0:
            check_shards(files, run.shard_record, alive)
        return open_samples(request, run.data_index)
    staged = stage(files, Path(folder), alive)
    tell(
        StageEvent(
            time=time.time(),
            step=0,
            folder=folder,
            host=socket.gethostname(),
            files=len(files),
            bytes=sum(file.bytes for file in files),
            copied_bytes=staged.copied_bytes,
            seconds=staged.seconds,
        )
    )
    return open_samples(request, run.data_index, staged.prefixes)


def open_samples(request: SampleRequest, cache: Path, copies: Mapping[str, str] | None = None) -> Samples:
    """Open the samples of a request; rank 0 builds their index first, the others wait.

    Args:
        cache: where the index is built, unless `data.index` names a folder that has it.
        copies: prefixes of shards to read in place of their own.

    Raises:
        DataError: the index that was built ahead is not of these samples.
    """
    opened = compat.build_datasets(request, cache, copies or {})
    held_out = list(opened.values())[1:]
    return Samples(
        request=request, train=opened["train"], validation=dict(zip(request.validation, held_out, strict=True))
    )
