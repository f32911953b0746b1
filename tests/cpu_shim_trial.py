"""Train a step, save and load on two ranks without one patch at a time; run as a process by test_cpu_shim.

    python -m tests.cpu_shim_trial FOLDER

Imports torch once, forks two ranks for each patch, and prints {patch: exception or ""} as JSON.
"""

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed

from megatron_solar.cpu import PATCHES, cuda_calls_on_cpu
from orchestrator.checkpoints import checkpoint_name, mark_complete, read_checkpoint, read_parts
from orchestrator.config import compose
from orchestrator.plan import make_plan
from tests.checkpoint_records import facts

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=64",
    "model.max_position_embeddings=16",
    "data.sequence_length=16",
    "data.train=unused",
    "data.validation=[]",
    "layout.micro_batch_size=1",
    "layout.global_batch_size=2",
    "layout.pipeline_parallel=2",
    "model.tie_embeddings=true",
    "cluster.ranks_per_node=2",
    "training.tokens=32",
)


def train(folder: Path, rank: int, without: str) -> None:
    """Build, train one step, save and load, as a run does."""
    with cuda_calls_on_cpu(without):
        queued = len(torch.cuda._queued_calls)
        from megatron_solar import checkpoint, compat, one_step
        from megatron_solar.replica import build_replica, weight_source

        plan = make_plan(compose("demo-base", SMALL))
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        compat.initialize_parallel(plan.layout, 1)
        replica = build_replica(plan, weight_source(plan))
        tokens_BS = torch.arange(16).unsqueeze(0)
        batch = {"tokens": tokens_BS, "labels": tokens_BS, "position_ids": tokens_BS}
        for chunk in replica.chunks:
            chunk.zero_grad_buffer()
        compat.run_schedule(
            one_step.forward_step, replica.chunks, [batch] * plan.layout.num_microbatches, plan.layout, 16
        )
        replica.optimizer.step()
        if len(torch.cuda._queued_calls) > queued + 4:  # the few of torch's own start are fine
            raise MemoryError(f"{len(torch.cuda._queued_calls) - queued} calls wait for CUDA after one step")
        writer = checkpoint.CheckpointWriter(rank)
        writer.save(folder / checkpoint_name(1, 1), replica.pieces)
        writer.wait()
        torch.distributed.barrier()
        parts = read_parts(folder / checkpoint_name(1, 1), 2)
        if parts is None:
            raise FileNotFoundError("a rank's record is missing after its save")
        if rank == 0:
            mark_complete(folder / checkpoint_name(1, 1), facts(1, model=plan.settings.model), parts)
        torch.distributed.barrier()
        checkpoint.load_newest([read_checkpoint(folder / checkpoint_name(1, 1))], replica.pieces, lambda *_: None)
        compat.publish_weights(replica.chunks, replica.optimizer, lambda frozen_steps: 1)


def try_without(folder: Path, without: str) -> str:
    """Fork two ranks and return what the first that failed says, or nothing."""
    folder.mkdir()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                train(folder, rank, without)
            except BaseException as error:
                (folder / f"rank{rank}").write_text(f"{type(error).__name__}: {str(error)[:150]}")
                os._exit(1)
            os._exit(0)
        children.append(child)
    for _ in children:
        child, status = os.wait()
        if status:  # the other one waits for it for ever
            for other in set(children) - {child}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    said = [path.read_text() for path in sorted(folder.glob("rank*"))]
    return said[0] if said else ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = ["", *(patch.name for patch in PATCHES)]
    print(json.dumps({name: try_without(Path(sys.argv[1]) / (name or "all"), name) for name in names}))
