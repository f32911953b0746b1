"""The training loop: from a plan to trained weights, readable top to bottom.

A step: read micro-batches by sample number, run megatron's schedule, let all ranks agree on loss and
stop request in one small all-reduce, step the optimizer, tell. A save begins at a step boundary on
which all ranks agree, never in a signal handler, and is written while training goes on. A loss that is
not finite ends the run before the optimizer has seen it.
"""

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter, OwnedPiece, disk_full, load_newest, owned_pieces
from megatron_solar.data import Samples, open_samples
from megatron_solar.model_folder import open_base
from megatron_solar.weights import RandomWeights, WeightSource, canonical_key, rank_part, read_canonical
from orchestrator.checkpoints import Checkpoint, checkpoint_name, complete_checkpoints, completed_once, foreign
from orchestrator.errors import CheckpointError, ModelFolderError
from orchestrator.events import (
    FLOPS_CONVENTION,
    DamageEvent,
    EndEvent,
    Event,
    RepeatEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
)
from orchestrator.files import JsonLines, read_json
from orchestrator.model_shape import TransformerShape
from orchestrator.plan import TrainingPlan
from orchestrator.repeats import recorded_losses
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.schedule import learning_rate
from orchestrator.settings import RANDOM_BASE

STOP_REASONS = ("time_limit", "preempted", "cancelled", "stopped")
"""What the supervisor may ask for; all ranks learn the same one."""

PEAK_SECONDS = 0.5


class NotFiniteError(ArithmeticError):
    """The loss or the gradient norm is NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """What a rank holds: its chunks of the model and its part of the optimizer."""

    chunks: Sequence[Any]
    optimizer: Any
    pieces: Sequence[OwnedPiece]
    """What this rank saves and loads of both."""
    peak_tflops: float
    peak_source: str


def train(run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan, *, worker_started: float) -> str:
    """Train from the newest checkpoint, or from the base, until the plan is done or a stop is asked for.

    Collective over all ranks of the layout; torch.distributed is initialized already.

    Returns:
        `finished`, or the reason of the stop request; the state is saved in either case.
    """
    settings, layout = plan.settings, plan.layout
    device = settings.cluster.device
    compat.initialize_parallel(layout, settings.training.seed)
    tell = EventWriter(attempt)
    samples = open_samples(
        settings.data,
        settings.model,
        seed=settings.training.seed,
        training_samples=plan.total_steps * layout.global_batch_size,
        validation_samples=_validation_passes(plan) * layout.micro_batch_size * layout.data_parallel,
        cache=run.data_index,
    )
    replica, loaded_from, step = build_or_load(run, plan, samples, tell)
    tell(
        StartEvent(
            time=time.time(),
            step=step,
            world_size=layout.world_size,
            layout=layout.describe(),
            device=device,
            loaded_from=loaded_from,
            parameters=plan.parameters,
            flops_per_token=plan.flops_per_token,
            flops_convention=FLOPS_CONVENTION,
            peak_tflops=replica.peak_tflops,
            peak_source=replica.peak_source,
            start_seconds=time.time() - worker_started,
        )
    )
    writer = CheckpointWriter(torch.distributed.get_rank())
    save = functools.partial(_save, run, attempt, plan, replica, samples, writer, tell)
    validate = functools.partial(_validate, plan, replica, samples, tell)
    repeats = RepeatedSteps(run, attempt, plan, step, tell)
    if loaded_from == settings.base:
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
            validate(step)
        if step == plan.total_steps or stop_reason or step % settings.checkpoint.interval_steps == 0:
            save(step)
    writer.wait()
    repeats.finish()
    reason = "finished" if step == plan.total_steps else stop_reason
    tell(EndEvent(time=time.time(), step=step, reason=reason))
    return reason


class EventWriter:
    """Append events to the attempt's file; only rank 0 writes."""

    def __init__(self, attempt: AttemptDirectory) -> None:
        self._lines = JsonLines(attempt.events) if torch.distributed.get_rank() == 0 else None

    def __call__(self, event: Event) -> None:
        """Write one event as one line."""
        if self._lines is not None:
            self._lines.append(event_record(event))


class RepeatedSteps:
    """Compares the steps that an earlier attempt had done already with what it recorded; on rank 0 only."""

    def __init__(
        self, run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan, step: int, tell: EventWriter
    ) -> None:
        self._tell = tell
        self._recorded: dict[int, tuple[float, float]] = {}
        if torch.distributed.get_rank() == 0:
            earlier = [other for other in run.attempts() if other.number < attempt.number]
            self._recorded = recorded_losses(earlier, plan, step)
        self._first = step + 1
        self._worst: RepeatEvent | None = None

    def compare(self, step: int, loss: float) -> None:
        """Compare one step; a difference beyond the noise is told at once."""
        if step not in self._recorded:
            self.finish()
            return
        recorded, noise = self._recorded.pop(step)
        difference = abs(loss - recorded) / abs(recorded) if loss != recorded else 0.0
        is_beyond = difference > noise
        if self._worst is None or difference >= self._worst.relative_difference:
            self._worst = RepeatEvent(
                time=time.time(),
                step=step,
                first_step=self._first,
                last_step=step,
                recorded_loss=recorded,
                loss=loss,
                relative_difference=difference,
                noise=noise,
                is_beyond_noise=is_beyond,
            )
        self._worst = dataclasses.replace(self._worst, last_step=step)
        if is_beyond or not self._recorded:
            self.finish()

    def finish(self) -> None:
        """Tell of the steps compared so far, if there are any, and begin anew."""
        if self._worst is not None:
            self._tell(self._worst)
            self._first = self._worst.last_step + 1
            self._worst = None


def build_or_load(
    run: RunDirectory, plan: TrainingPlan, samples: Samples, tell: EventWriter
) -> tuple[Replica, str, int]:
    """Build this rank's part of the model and fill it from the newest whole checkpoint, or from the base.

    Returns:
        the replica, where its weights came from, the steps done.

    Raises:
        CheckpointError: there are checkpoints, or were, and none is whole; or the newest is of another model
            or other data.
    """
    existing = complete_checkpoints(run)
    if not existing:
        lost = completed_once(run)
        if lost:
            raise CheckpointError(
                f"run {run.name} had {len(lost)} checkpoints, the last of them {lost[-1]}, and none is whole and there "
                f"now in {run.checkpoints_folder}; put one back, or launch another run from the base"
            )
        # One replica reads the base, the others get their weights from it.
        return build_replica(plan, weight_source(plan) if compat.data_rank() == 0 else None), plan.settings.base, 0
    newest = existing[-1]
    found = foreign(newest.facts, plan.settings.model, samples.tokenizer_sha256, samples.fingerprint)
    if found:
        raise CheckpointError(f"checkpoint {newest.name} is not of this run's model and data:", found)
    replica = build_replica(plan, None, is_filled_later=True)

    def on_damage(checkpoint: Checkpoint, problems: list[str]) -> None:
        tell(DamageEvent(time=time.time(), step=checkpoint.step, name=checkpoint.name, problems=tuple(problems)))

    loaded = load_newest(existing, replica.pieces, on_damage)
    compat.publish_weights(replica.chunks, replica.optimizer, loaded.step)
    return replica, loaded.name, loaded.step


def weight_source(plan: TrainingPlan) -> WeightSource:
    """Return the base named in the settings: new weights only where `random` was asked for.

    Raises:
        ModelFolderError: the folder is no model, or of another shape than the settings.
    """
    settings = plan.settings
    if settings.base == RANDOM_BASE:
        return RandomWeights(settings.model, settings.training.seed)
    return open_base(Path(settings.base), settings.model)


def build_replica(plan: TrainingPlan, source: WeightSource | None, *, is_filled_later: bool = False) -> Replica:
    """Build this rank's chunks and optimizer; collective.

    Args:
        source: of the first data-parallel replica; the others have none.
        is_filled_later: whether the weights wait for a checkpoint.
    """
    settings, layout = plan.settings, plan.layout
    device = settings.cluster.device
    config = compat.transformer_config(settings.model, layout, settings.training, device)
    stages = range(layout.virtual_pipeline_parallel) if layout.virtual_pipeline_parallel > 1 else [None]
    offsets = [compat.layer_offset(config, stage) for stage in stages]
    chunks = []
    for index, stage in enumerate(stages):
        chunk = compat.build_chunk(settings.model, config, settings.data.sequence_length, device, stage)
        if device == "cuda":
            chunk.cuda(torch.cuda.current_device())
        if not is_filled_later:
            fill(chunk, source, settings.model, offsets[index], layout.tensor_parallel)
        if settings.training.precision == "bf16":
            chunk.bfloat16()
        chunks.append(compat.wrap_data_parallel(config, chunk, index == 0))
    optimizer = compat.build_optimizer(settings.training, chunks)
    config.grad_scale_func = optimizer.scale_loss
    peak = settings.cluster.peak_tflops
    return Replica(
        chunks=chunks,
        optimizer=optimizer,
        pieces=owned_pieces(settings.model, chunks, optimizer, offsets, layout.tensor_parallel),
        peak_tflops=peak if peak is not None else measured_peak_tflops(device),
        peak_source=f"{settings.cluster.gpu} dense bf16" if peak is not None else "a measured fp32 matrix product",
    )


def fill(
    chunk: torch.nn.Module,
    source: WeightSource | None,
    shape: TransformerShape,
    layer_offset: int,
    tensor_parallel: int,
) -> None:
    """Set every parameter of a chunk, this tensor-parallel rank's part of each; collective.

    The first data-parallel replica reads the source, tensor after tensor, and gives it to the others.

    Raises:
        ModelFolderError: a tensor of another shape than the parameter.
    """
    for name, parameter in chunk.named_parameters():
        key = canonical_key(name, layer_offset, is_tied=shape.tie_embeddings)
        with torch.no_grad():
            if source is not None:
                part = rank_part(key, read_canonical(key, source), compat.tensor_rank(), tensor_parallel)
                if part.shape != parameter.shape:
                    raise ModelFolderError(
                        f"{key} should be {tuple(parameter.shape)} on this rank, found {tuple(part.shape)}"
                    )
                parameter.copy_(part)
            compat.broadcast_from_first_replica(parameter.data)


def measured_peak_tflops(device: str) -> float:
    """Return the best fp32 product of 512 x 512 matrices within half a second on this device, in TFLOP/s.

    Half a second, since other work on the machine slows most of them down.
    """
    size = 512
    matrix = torch.ones(size, size, device=device)
    best = math.inf
    deadline = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


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


def _sum_over_ranks(first: float, second: float, plan: TrainingPlan) -> tuple[float, float]:
    """Add two numbers over all ranks in one small all-reduce."""
    numbers = torch.tensor([first, second], dtype=torch.float64).to(plan.settings.cluster.device)
    torch.distributed.all_reduce(numbers)
    return float(numbers[0]), float(numbers[1])


def _validation_passes(plan: TrainingPlan) -> int:
    """Return the micro-batches a data-parallel rank reads in one validation; pipelines need whole rounds."""
    layout = plan.layout
    passes = -(-plan.settings.training.validation_samples // (layout.micro_batch_size * layout.data_parallel))
    rounds = layout.pipeline_parallel if layout.virtual_pipeline_parallel > 1 else 1
    return -(-passes // rounds) * rounds


def _validate(plan: TrainingPlan, replica: Replica, samples: Samples, tell: EventWriter, step: int) -> None:
    """Tell the loss on the first held-out samples, always the same ones."""
    if samples.validation is None:
        return
    started = time.monotonic()
    layout, passes = plan.layout, _validation_passes(plan)
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
    free = os.statvfs(folder.parent)
    files = 2 * plan.layout.world_size + 4
    has_inodes = free.f_files == 0 or free.f_favail >= files  # some file systems have no fixed number
    if shutil.disk_usage(folder.parent).free < plan.checkpoint_bytes or not has_inodes:
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
