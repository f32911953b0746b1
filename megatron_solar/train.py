"""The training loop: from a plan to trained weights, readable top to bottom.

A step: read micro-batches by sample number, run megatron's schedule, let all ranks agree on loss and
stop request in one small all-reduce, step the optimizer, tell. A save begins at a step boundary on
which all ranks agree, never in a signal handler, and is written while training goes on. A loss that is
not finite ends the run before the optimizer has seen it.
"""

import functools
import math
import time

import torch.distributed

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter
from megatron_solar.data import open_samples
from megatron_solar.first_loss import check_first_loss
from megatron_solar.hang_watch import HangWatch, Phase, connection_seconds
from megatron_solar.one_step import compute_step
from megatron_solar.run_state import build_or_load, save_state
from megatron_solar.sample_request import validation_passes
from megatron_solar.telling import EventWriter, earlier_attempts, step_event
from megatron_solar.validation import validate
from orchestrator.events import FLOPS_CONVENTION, EndEvent, StartEvent
from orchestrator.plan import TrainingPlan
from orchestrator.repeats import RepeatedSteps, recorded_losses
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.schedule import learning_rate


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
        training_samples=plan.consumed_samples(plan.total_steps),
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
    save = functools.partial(save_state, run, attempt, plan, replica, samples, writer, tell)
    held_out = functools.partial(validate, plan, replica, samples, tell)
    repeats = RepeatedSteps(recorded_losses(earlier_attempts(run, attempt), plan, step), step, tell)
    if loaded is None:
        save(step)  # before anything else, so that no later attempt reads the base again
        held_out(step)

    stop_reason = ""
    while step < plan.total_steps and not stop_reason:
        writer.check()
        step_started = time.monotonic()
        result = compute_step(plan, attempt, replica, samples, step)
        stop_reason = result.stop_reason
        if not math.isfinite(result.loss):
            raise NotFiniteError(f"the loss of step {step + 1} is {result.loss}; the weights are those of step {step}")

        rate = learning_rate(settings.training, step + 1, plan.total_steps)
        compat.set_learning_rate(replica.optimizer, rate, settings.training.weight_decay)
        compat.apply_gradients(replica.optimizer, result.gradient_norm)
        step += 1
        tell(step_event(plan, replica, step, result, rate, time.monotonic() - step_started))
        repeats.compare(step, result.loss)

        if step == plan.total_steps or step % settings.training.validation_interval_steps == 0:
            watch.enter(Phase.VALIDATION, step)
            held_out(step)
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
