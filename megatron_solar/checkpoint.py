"""Saving and loading a run's state with all ranks, in torch_dist format.

What is saved: weights, optimizer, step. Nothing in a step is random (no dropout), so no random
state is needed for an exact resume; consumed samples follow from the step and stand in the marker.
A rank hashes the files that it wrote; the supervisor marks the checkpoint as complete.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_solar import compat
from orchestrator.checkpoints import Checkpoint, damage
from orchestrator.errors import CheckpointError
from orchestrator.files import sha256_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    """What a save put on disk."""

    files: dict[str, dict[str, Any]]
    """File name to `bytes` and `sha256`."""
    seconds: float


def save(folder: Path, chunks: Sequence[Any], optimizer: Any, step: int) -> WrittenFiles:
    """Write the state into a new folder, flushed to disk and hashed; collective."""
    started = time.monotonic()
    rank = torch.distributed.get_rank()
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    model_state = compat.sharded_model_state(chunks)
    state = {
        **model_state,
        "optimizer": compat.sharded_optimizer_state(optimizer, model_state, is_loading=False),
        "step": step,
    }
    compat.save_state(state, folder)
    torch.distributed.barrier()
    mine = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if _writer(path.name) == rank
    }
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    files = {name: facts for part in parts for name, facts in part.items()}
    return WrittenFiles(files=files, seconds=time.monotonic() - started)


def load(checkpoint: Checkpoint, chunks: Sequence[Any], optimizer: Any) -> int:
    """Verify a checkpoint's files, each rank its share, and load it; collective.

    Returns:
        the step after which it was saved.

    Raises:
        CheckpointError: a file is missing or damaged, or the state is of another model.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, damage(checkpoint, rank, world))
    found = [problem for part in parts for problem in part]
    if found:
        raise CheckpointError(
            f"checkpoint {checkpoint.name} is damaged and was not loaded:",
            found,
        )
    model_state = compat.sharded_model_state(chunks)
    wanted = {
        **model_state,
        "optimizer": compat.sharded_optimizer_state(optimizer, model_state, is_loading=True),
        "step": 0,
    }
    try:
        state = compat.load_state(wanted, checkpoint.path)
    except Exception as error:
        if type(error).__name__ != "CheckpointingException":
            raise
        raise CheckpointError(f"checkpoint {checkpoint.name} is of another model: {error}") from error
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[f"model{index}" if len(chunks) > 1 else "model"])
    step = int(state["step"])
    if step != checkpoint.step:
        raise CheckpointError(f"{checkpoint.path} is marked as step {checkpoint.step} but holds step {step}")
    compat.restore_optimizer(optimizer, state["optimizer"], step)
    return step


def _writer(file_name: str) -> int:
    """Return the rank that wrote a file: `__3_0.distcp` is rank 3's, the common ones are rank 0's."""
    if file_name.startswith("__") and file_name.endswith(".distcp"):
        return int(file_name[2:].split("_")[0])
    return 0
