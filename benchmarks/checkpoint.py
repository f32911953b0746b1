"""Checkpoints: the stall of a step, the cost of hashing, the time to load; beside megatron-core's own format.

    python benchmarks/checkpoint.py [--ranks 2] [--hidden 512] [--rounds 5] [--output DIR]

Two data-parallel CPU ranks of one model save and load the same state, in turn, in the same run:

- ours: `megatron_solar/checkpoint.py`; the stall of an asynchronous save, and of one that is waited for
- torch_dist: megatron-core's `dist_checkpointing` with the optimizer as `fully_reshardable`, its format
  for any layout; synchronous, and asynchronous with its forked writer
- torch_dist of one layout: the same with `dp_reshardable`, which gathers nothing and can be read at
  other data-parallel sizes only

Prints medians over the rounds and each as a ratio to torch_dist's synchronous save. Of the peer only
what megatron's own training script does: nothing is hashed, nothing verified.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_solar.cpu import cuda_calls_on_cpu
from orchestrator.config import compose
from orchestrator.plan import TrainingPlan, make_plan


def plan_of(hidden: int, ranks: int) -> TrainingPlan:
    """Return a plan of 8 layers with the real 32k vocabulary, in bf16."""
    return make_plan(
        compose(
            "demo-base",
            [
                "data.train=unused", "data.validation=[]", "precision=bf16", "model.num_layers=8",
                f"model.hidden_size={hidden}", f"model.ffn_hidden_size={3 * hidden}",
                "model.num_attention_heads=8", "model.num_query_groups=4",
                f"cluster.ranks_per_node={ranks}", "layout.micro_batch_size=1", f"layout.global_batch_size={ranks}",
            ],
        )
    )  # fmt: skip


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Run one rank; rank 0 prints."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with cuda_calls_on_cpu():
        from megatron_solar import compat
        from megatron_solar.replica import build_replica, weight_source

        plan = plan_of(options.hidden, options.ranks)
        store = torch.distributed.FileStore(f"{folder}/store", options.ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
        compat.initialize_parallel(plan.layout, 1)
        replica = build_replica(plan, weight_source(plan) if compat.replica_rank() == 0 else None)
        replica.optimizer.prepare_grads()
        for chunk in replica.chunks:
            chunk.zero_grad_buffer()
        replica.optimizer.step()  # a state that is not all zeros
        found: dict[str, list[float]] = {}
        for number in range(options.rounds):
            for name, measure in MEASURES.items():
                torch.distributed.barrier()
                place = Path(folder) / f"{name.replace(' ', '-')}-{number}"
                for what, seconds in measure(plan, replica, place).items():
                    found.setdefault(what, []).append(seconds)
                torch.distributed.barrier()
                if rank == 0:
                    shutil.rmtree(place, ignore_errors=True)
        every: list[Any] = [None] * options.ranks
        torch.distributed.all_gather_object(every, found)
        if rank == 0:
            report(plan, every, options)
            sys.stdout.flush()
        for child in psutil.Process().children(recursive=True):
            child.kill()  # the peer's manager outlives its rank otherwise
    os._exit(0)


def ours(plan: TrainingPlan, replica: Any, place: Path) -> dict[str, float]:
    """Save asynchronously, wait, mark, load."""
    from megatron_solar.checkpoint import CheckpointWriter, load_newest
    from orchestrator.checkpoints import checkpoint_name, mark_complete, read_checkpoint, read_parts
    from tests.checkpoint_records import facts

    place = place / checkpoint_name(1, 1)

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not hasattr(replica, "writer"):
        object.__setattr__(replica, "writer", CheckpointWriter(rank))
        replica.writer.save(place.with_name("first"), replica.pieces)  # makes its buffer, once in a run
        replica.writer.wait()
    started = time.monotonic()
    stall = replica.writer.save(place, replica.pieces)
    replica.writer.wait()
    whole = time.monotonic() - started
    torch.distributed.barrier()
    parts = read_parts(place, world)
    assert parts is not None
    if rank == 0:
        mark_complete(place, facts(1, model=plan.settings.model), parts)
    torch.distributed.barrier()
    started = time.monotonic()
    load_newest([read_checkpoint(place)], replica.pieces, lambda *_: None)
    return {
        "ours: stall of an asynchronous save": stall,
        "ours: synchronous save": whole,
        "ours: of which hashing": parts[rank].hash_seconds,
        "ours: load, verified": time.monotonic() - started,
    }


def torch_dist(replica: Any, place: Path, *, is_async: bool, sharding: str) -> dict[str, float]:
    """Save with megatron-core's dist_checkpointing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    metadata = {"distrib_optim_sharding_type": sharding, "non_homogeneous_layers": True}
    name = "torch_dist" if sharding == "fully_reshardable" else "torch_dist of one layout"
    if torch.distributed.get_rank() == 0:
        place.mkdir(parents=True)
    torch.distributed.barrier()

    def state(*, is_loading: bool) -> dict[str, Any]:
        model = {"model": replica.chunks[0].module.sharded_state_dict(metadata=metadata)}
        optimizer = replica.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {**model, "optimizer": optimizer}

    started = time.monotonic()
    request = dist_checkpointing.save(
        state(is_loading=False), str(place), async_sharded_save=is_async, content_metadata=metadata
    )
    if not is_async:
        saved = time.monotonic() - started
        started = time.monotonic()
        dist_checkpointing.load(state(is_loading=True), str(place))
        return {f"{name}: synchronous save": saved, f"{name}: load, not verified": time.monotonic() - started}
    calls = AsyncCallsQueue()
    calls.schedule_async_request(request)
    stall = time.monotonic() - started
    calls.maybe_finalize_async_calls(blocking=True)
    whole = time.monotonic() - started
    calls.close()
    return {
        f"{name}: stall of an asynchronous save": stall,
        f"{name}: asynchronous save, until it is done": whole,
    }


MEASURES: dict[str, Callable[[TrainingPlan, Any, Path], dict[str, float]]] = {
    "ours": ours,
    **{
        f"{sharding} {is_async}": lambda _, replica, place, is_async=is_async, sharding=sharding: torch_dist(
            replica, place, is_async=is_async, sharding=sharding
        )
        for sharding in ("fully_reshardable", "dp_reshardable")
        for is_async in (False, True)
    },
}


def report(plan: TrainingPlan, every: list[dict[str, list[float]]], options: argparse.Namespace) -> None:
    """Print the median over the rounds of the slowest rank."""
    reference = 0.0
    rows = []
    for what in every[0]:
        slowest = [max(found[what][number] for found in every) for number in range(options.rounds)]
        rows.append((what, statistics.median(slowest), min(slowest), max(slowest)))
        if what == "torch_dist: synchronous save":
            reference = rows[-1][1]
    print(f"{plan.parameters:,} parameters, {options.ranks} ranks, {plan.checkpoint_bytes / 1e6:.0f} MB a checkpoint "
          f"of ours; medians of {options.rounds} rounds, the slowest rank")  # fmt: skip
    for what, median, low, high in rows:
        print(f"{what:<62} {median:7.3f} s  ({low:.3f} to {high:.3f})  {median / reference:6.2f} x")
    block = os.urandom(1 << 20) * 64
    started = time.monotonic()
    hashlib.sha256(block).hexdigest()
    print(f"SHA-256 alone: {len(block) / (time.monotonic() - started) / 1e9:.2f} GB/s a core")
    print(json.dumps({what: median for what, median, _, _ in rows}))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder to write to; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        torch.multiprocessing.spawn(rank_main, (options, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
