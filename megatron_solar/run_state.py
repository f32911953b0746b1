"""The state of a run on disk, as its ranks see it: what they begin from, and what they save."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter, disk_full, load_newest
from megatron_solar.data import Samples
from megatron_solar.replica import Replica, build_replica, weight_source
from megatron_solar.stacks import waits_for_others
from megatron_solar.telling import EventWriter
from orchestrator.checkpoints import (
    DAMAGED,
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
from orchestrator.spikes import skipped_steps

MARK_SECONDS = 120.0
"""How long the supervisor may take to mark a checkpoint that all ranks have written, before an older one is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a checkpoint keeps of the steps before it, besides weights and optimizer; see `CheckpointFacts`."""

    skipped: tuple[tuple[int, int], ...]
    recent_losses: tuple[float, ...]
    recent_norms: tuple[float, ...]


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
        return build_replica(plan, weight_source(plan) if compat.replica_rank() == 0 else None), None
    newest = existing[-1]
    fingerprint = samples.request.fingerprint_at(newest.facts.consumed_samples)
    found = foreign(newest.facts, plan.settings.model, samples.request.tokenizer_sha256, fingerprint)
    if found:
        raise CheckpointError(f"checkpoint {newest.name} is not of this run's model and data:", found)
    replica = build_replica(plan, None, is_filled_later=True)
    return replica, load_state(existing, replica, tell)


def load_state(candidates: Sequence[Checkpoint], replica: Replica, tell: EventWriter) -> Checkpoint:
    """Fill weights and optimizer from the newest whole checkpoint of some, the newest last; collective.

    Raises:
        CheckpointError: none of them is whole.
    """

    def on_damage(checkpoint: Checkpoint, problems: list[str]) -> None:
        tell(DamageEvent(time=time.time(), step=checkpoint.step, name=checkpoint.name, problems=tuple(problems)))

    loaded = load_newest(candidates, replica.pieces, on_damage)

    def applied_after(step: int) -> int:
        return max(0, loaded.step - step) - skipped_steps(loaded.facts.skipped, step)

    compat.publish_weights(replica.chunks, replica.optimizer, applied_after)
    return loaded


def save_state(
    run: RunDirectory,
    attempt: AttemptDirectory,
    plan: TrainingPlan,
    replica: Replica,
    samples: Samples,
    writer: CheckpointWriter,
    tell: EventWriter,
    step: int,
    trajectory: Trajectory,
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
            data_fingerprint=samples.request.fingerprint_at(plan.consumed_samples(step)),
            tokenizer_sha256=samples.request.tokenizer_sha256,
            stall_seconds=time.monotonic() - started,
            skipped=trajectory.skipped,
            recent_losses=trajectory.recent_losses,
            recent_norms=trajectory.recent_norms,
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

    On a shared file system each node may see another state of the folder for a while: all wait until they see the
    newest. Those before it have been there for long, and the supervisor may delete some of them meanwhile.

    Raises:
        CheckpointError: the run had checkpoints and none is whole, or this rank does not see the newest.
    """
    said: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        for name, problem in unusable_markers(run).items():
            step, _ = parse_name(name) or (0, 0)
            tell(DamageEvent(time=time.time(), step=step, name=name, problems=(problem,)))
        said = [(complete_checkpoints(run), lost_checkpoints(run))]
    torch.distributed.broadcast_object_list(said)
    existing: list[Checkpoint] = said[0][0]
    if said[0][1]:
        raise CheckpointError(said[0][1])
    deadline = time.monotonic() + VISIBLE_SECONDS
    while existing and not (existing[-1].path / MARKER).exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return [*existing[:-1], read_checkpoint(existing[-1].path)] if existing else []


@waits_for_others
def wait_for_marker(path: Path) -> None:
    """Wait until the supervisor has judged the newest checkpoint; rank 0 does, whose word the others wait for."""
    deadline = time.monotonic() + MARK_SECONDS
    while torch.distributed.get_rank() == 0 and time.monotonic() < deadline:
        if not path.exists() or (path / MARKER).exists() or (path / DAMAGED).exists():
            return
        time.sleep(0.05)
