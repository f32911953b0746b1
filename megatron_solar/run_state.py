"""The state of a run on disk, as its ranks see it: what they begin from, and what they save."""

import time
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter, disk_full, load_newest
from megatron_solar.data import Samples
from megatron_solar.replica import Replica, build_replica, weight_source
from megatron_solar.telling import EventWriter
from orchestrator.checkpoints import (
    MARKER,
    VISIBLE_SECONDS,
    Checkpoint,
    checkpoint_name,
    complete_checkpoints,
    files_written,
    foreign,
    lost_checkpoints,
    parse_name,
    read_checkpoint,
    unusable_markers,
)
from orchestrator.errors import CheckpointError
from orchestrator.events import DamageEvent, SaveEvent
from orchestrator.files import free_room
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory, RunDirectory


def build_or_load(
    run: RunDirectory, plan: TrainingPlan, samples: Samples, tell: EventWriter
) -> tuple[Replica, Checkpoint | None]:
    """Build this rank's part of the model and fill it from the newest whole checkpoint, or from the base.

    Returns:
        the replica, and the checkpoint that its weights came from, None for the base.

    Raises:
        CheckpointError: there are checkpoints, or were, and none is whole; or the newest is of another model
            or other data.
    """
    existing = agreed_checkpoints(run, tell)
    if not existing:
        # One replica reads the base, the others get their weights from it.
        return build_replica(plan, weight_source(plan) if compat.data_rank() == 0 else None), None
    newest = existing[-1]
    found = foreign(newest.facts, plan.settings.model, samples.tokenizer_sha256, samples.fingerprint)
    if found:
        raise CheckpointError(f"checkpoint {newest.name} is not of this run's model and data:", found)
    replica = build_replica(plan, None, is_filled_later=True)

    def on_damage(checkpoint: Checkpoint, problems: list[str]) -> None:
        tell(DamageEvent(time=time.time(), step=checkpoint.step, name=checkpoint.name, problems=tuple(problems)))

    loaded = load_newest(existing, replica.pieces, on_damage)
    compat.publish_weights(replica.chunks, replica.optimizer, loaded.step)
    return replica, loaded


def save_state(
    run: RunDirectory,
    attempt: AttemptDirectory,
    plan: TrainingPlan,
    replica: Replica,
    samples: Samples,
    writer: CheckpointWriter,
    tell: EventWriter,
    step: int,
) -> None:
    """Have a checkpoint of a step written; the supervisor marks it as complete when all ranks have."""
    started = time.monotonic()
    writer.wait()  # its files are on disk, so that what is free now is what the next one has
    name = checkpoint_name(step, attempt.number)
    if torch.distributed.get_rank() == 0:
        check_room(run.checkpoint_path(name), plan)
    writer.save(run.checkpoint_path(name), replica.pieces)
    if not plan.settings.checkpoint.asynchronous:
        writer.wait()
    tell(
        SaveEvent(
            time=time.time(),
            step=step,
            name=name,
            consumed_samples=plan.consumed_samples(step),
            data_fingerprint=samples.fingerprint,
            tokenizer_sha256=samples.tokenizer_sha256,
            stall_seconds=time.monotonic() - started,
        )
    )


def check_room(folder: Path, plan: TrainingPlan) -> None:
    """Refuse a save for which the disk has no room, before a byte is written; a quota shows only when writing.

    Raises:
        DiskFullError: too few bytes or inodes are free.
    """
    free_bytes, inodes = free_room(folder.parent)
    if free_bytes < plan.checkpoint_bytes or inodes < files_written(plan.layout.world_size):
        raise disk_full(folder, plan.checkpoint_bytes)


def agreed_checkpoints(run: RunDirectory, tell: EventWriter) -> list[Checkpoint]:
    """Return the checkpoints that rank 0 sees, the same on every rank; collective.

    On a shared file system each node may see another state of the folder for a while.

    Raises:
        CheckpointError: the run had checkpoints and none is whole.
    """
    said: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        for name, problem in unusable_markers(run).items():
            step, _ = parse_name(name) or (0, 0)
            tell(DamageEvent(time=time.time(), step=step, name=name, problems=(problem,)))
        said = [([checkpoint.name for checkpoint in complete_checkpoints(run)], lost_checkpoints(run))]
    torch.distributed.broadcast_object_list(said)
    names, lost = said[0]
    if lost:
        raise CheckpointError(lost)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not all((run.checkpoint_path(name) / MARKER).exists() for name in names) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [read_checkpoint(run.checkpoint_path(name)) for name in names]
