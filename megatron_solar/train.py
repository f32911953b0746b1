"""The training loop: from a plan to trained weights, readable top to bottom.

A step: read micro-batches by sample number, run megatron's schedule, let all ranks agree on loss and
stop request in one small all-reduce, step the optimizer, tell. A save begins at a step boundary on
which all ranks agree, never in a signal handler, and is written while training goes on. A loss that is
not finite ends the run before the optimizer has seen it.
"""

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter, disk_full, load_newest
from megatron_solar.data import Samples, open_samples
from megatron_solar.first_loss import check_first_loss
from megatron_solar.hang_watch import HangWatch, Phase, connection_seconds
from megatron_solar.replica import Replica, build_replica, weight_source
from megatron_solar.sample_request import validation_passes
from megatron_solar.stacks import waits_for_others
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
from orchestrator.errors import CheckpointError, OrchestrateError
from orchestrator.events import (
    FLOPS_CONVENTION,
    DamageEvent,
    EndEvent,
    Event,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
    read_events,
)
from orchestrator.files import JsonLines, free_room, read_json
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.repeats import EarlierAttempt, RepeatedSteps, recorded_losses
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.schedule import learning_rate

STOP_REASONS = ("time_limit", "preempted", "cancelled", "stopped")
"""What the supervisor may ask for; all ranks learn the same one."""


class NotFiniteError(ArithmeticError):
    """The loss or the gradient norm is NaN or infinite."""


def train(
    run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan, *, worker_started: float, watch: HangWatch
) -> str:
    """Train from the newest checkpoint, or from the base, until the plan is done or a stop is asked for.

    Collective over all ranks of the layout; torch.distributed is initialized already.

    Returns:
        `finished`, or the reason of the stop request; the state is saved in either case.
    """
    settings, layout = plan.settings, plan.layout
    device = settings.cluster.device
    compat.initialize_parallel(layout, settings.training.seed, timeout_seconds=connection_seconds(settings.patience))
    tell = EventWriter(attempt)
    samples = open_samples(
        settings.data,
        settings.model,
        seed=settings.training.seed,
        training_samples=plan.total_steps * layout.global_batch_size,
        validation_samples=validation_passes(plan) * layout.micro_batch_size * layout.data_parallel,
        cache=run.data_index,
    )
    replica, loaded = build_or_load(run, plan, samples, tell)
    if loaded is None and settings.training.check_first_loss:
        check_first_loss(plan, replica, tell)
    step = loaded.step if loaded is not None else 0
    tell(
        StartEvent(
            time=time.time(),
            step=step,
            world_size=layout.world_size,
            layout=layout.describe(),
            device=device,
            loaded_from=loaded.name if loaded is not None else settings.base,
            ancestry=(loaded.name, *loaded.facts.ancestry) if loaded is not None else (),
            parameters=plan.parameters,
            flops_per_token=plan.flops_per_token,
            flops_convention=FLOPS_CONVENTION,
            peak_tflops=replica.peak_tflops,
            peak_source=replica.peak_source,
            start_seconds=time.time() - worker_started,
        )
    )
    writer = CheckpointWriter(torch.distributed.get_rank(), watch.saving)
    save = functools.partial(_save, run, attempt, plan, replica, samples, writer, tell)
    validate = functools.partial(_validate, plan, replica, samples, tell)
    repeats = RepeatedSteps(recorded_losses(earlier_attempts(run, attempt), plan, step), step, tell)
    if loaded is None:
        save(step)  # before anything else, so that no later attempt reads the base again
        validate(step)

    stop_reason = ""
    while step < plan.total_steps and not stop_reason:
        writer.check()
        step_started = time.monotonic()
        batches = samples.micro_batches(
            samples.train, step * layout.global_batch_size, layout, layout.num_microbatches, device
        )
        data_seconds = time.monotonic() - step_started
        for chunk in replica.chunks:
            chunk.zero_grad_buffer()
        replica.optimizer.zero_grad()
        losses = compat.run_schedule(_forward_step, replica.chunks, batches, layout, settings.data.sequence_length)
        loss, stop_reason = _agree(losses, plan, attempt)
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss of step {step + 1} is {loss}; the weights are those of step {step}")

        rate = learning_rate(settings.training, step + 1, plan.total_steps)
        compat.set_learning_rate(replica.optimizer, rate, settings.training.weight_decay)
        _, gradient_norm, _ = replica.optimizer.step()
        step += 1
        tell(_step_event(plan, replica, step, loss, float(gradient_norm), rate, step_started, data_seconds))
        repeats.compare(step, loss)

        if step == plan.total_steps or step % settings.training.validation_interval_steps == 0:
            watch.enter(Phase.VALIDATION, step)
            validate(step)
        if step == plan.total_steps or stop_reason or step % settings.checkpoint.interval_steps == 0:
            watch.enter(Phase.SAVE, step)
            save(step)
        watch.enter(Phase.STEP, step)
    watch.enter(Phase.SAVE, step)
    writer.wait()
    repeats.finish()
    reason = "finished" if step == plan.total_steps else stop_reason
    tell(EndEvent(time=time.time(), step=step, reason=reason))
    return reason


def earlier_attempts(run: RunDirectory, attempt: AttemptDirectory) -> list[EarlierAttempt]:
    """Return what the attempts before recorded; on rank 0, which alone compares."""
    found = []
    for other in run.attempts() if torch.distributed.get_rank() == 0 else []:
        if other.number < attempt.number:
            try:
                before = read_plan(other.plan) if other.plan.exists() else None
            except OrchestrateError:  # another version's plan; its attempt cannot be compared
                before = None
            steps = {event.step: event.loss for _, event in read_events(other.events) if isinstance(event, StepEvent)}
            found.append(EarlierAttempt(plan=before, losses=steps))
    return found


class EventWriter:
    """Append events to the attempt's file; only rank 0 writes."""

    def __init__(self, attempt: AttemptDirectory) -> None:
        self._lines = JsonLines(attempt.events) if torch.distributed.get_rank() == 0 else None

    def __call__(self, event: Event) -> None:
        """Write one event as one line."""
        if self._lines is not None:
            self._lines.append(event_record(event))


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


def _forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through a chunk, as megatron's schedules call it."""
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_function(output_BS: Tensor) -> tuple[Tensor, Tensor]:
        # With pipelines megatron divides the first in place; the second is for the record.
        loss = output_BS.float().mean()
        return loss, loss.detach().clone()

    return losses_BS, loss_function


def _agree(losses: Sequence[Tensor], plan: TrainingPlan, attempt: AttemptDirectory) -> tuple[float, str]:
    """Return the mean loss over the global batch and the reason of a stop request, the same on every rank."""
    asked = 0
    if torch.distributed.get_rank() == 0 and attempt.stop_request.exists():
        asked = STOP_REASONS.index(str(read_json(attempt.stop_request)["reason"])) + 1
    loss, number = _sum_over_ranks(_share_of_mean(losses, plan), asked, plan)
    return loss, STOP_REASONS[int(number) - 1] if number else ""


def _share_of_mean(losses: Sequence[Tensor], plan: TrainingPlan) -> float:
    """Return what this rank adds to the mean loss of a global batch: nothing, unless it holds the output."""
    if not (compat.is_last_stage() and compat.tensor_rank() == 0):
        return 0.0
    return float(torch.stack(list(losses)).double().mean()) / plan.layout.data_parallel


@waits_for_others
def _sum_over_ranks(first: float, second: float, plan: TrainingPlan) -> tuple[float, float]:
    """Add two numbers over all ranks in one small all-reduce."""
    numbers = torch.tensor([first, second], dtype=torch.float64).to(plan.settings.cluster.device)
    torch.distributed.all_reduce(numbers)
    return float(numbers[0]), float(numbers[1])


def _validate(plan: TrainingPlan, replica: Replica, samples: Samples, tell: EventWriter, step: int) -> None:
    """Tell the loss on the first held-out samples, always the same ones."""
    if samples.validation is None:
        return
    started = time.monotonic()
    layout, passes = plan.layout, validation_passes(plan)
    for chunk in replica.chunks:
        chunk.eval()
    batches = samples.micro_batches(samples.validation, 0, layout, passes, plan.settings.cluster.device)
    with torch.no_grad():
        losses = compat.run_schedule(
            _forward_step, replica.chunks, batches, layout, plan.settings.data.sequence_length, forward_only=True
        )
    for chunk in replica.chunks:
        chunk.train()
    loss, _ = _sum_over_ranks(_share_of_mean(losses, plan), 0, plan)
    tell(
        ValidationEvent(
            time=time.time(),
            step=step,
            loss=loss,
            samples=passes * layout.micro_batch_size * layout.data_parallel,
            consumed_tokens=step * plan.tokens_per_step,
            seconds=time.monotonic() - started,
        )
    )


def _save(
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
            consumed_samples=step * plan.layout.global_batch_size,
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


def _step_event(
    plan: TrainingPlan,
    replica: Replica,
    step: int,
    loss: float,
    gradient_norm: float,
    rate: float,
    started: float,
    data_seconds: float,
) -> StepEvent:
    seconds = time.monotonic() - started
    per_second = plan.tokens_per_step / seconds
    per_gpu = per_second / plan.layout.world_size
    tflops = per_gpu * plan.flops_per_token / 1e12
    return StepEvent(
        time=time.time(),
        step=step,
        loss=loss,
        gradient_norm=gradient_norm,
        learning_rate=rate,
        consumed_samples=step * plan.layout.global_batch_size,
        consumed_tokens=step * plan.tokens_per_step,
        step_seconds=seconds,
        data_seconds=data_seconds,
        tokens_per_second=per_second,
        tokens_per_second_per_gpu=per_gpu,
        tflops_per_gpu=tflops,
        mfu=tflops / replica.peak_tflops,
    )
