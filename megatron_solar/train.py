"""The training loop: from a plan to trained weights, readable top to bottom.

A step: read micro-batches by sample number, run megatron's schedule, let all ranks agree on loss and
stop request in one small all-reduce, step the optimizer, tell. A save begins at a step boundary on
which all ranks agree, never in a signal handler, and is written while training goes on. What is not finite
or out of the ordinary is computed again, and decided on, before the optimizer has seen it (`step_guard.py`).
"""

import functools
import time

import torch.distributed

from megatron_solar import compat
from megatron_solar.checkpoint import CheckpointWriter
from megatron_solar.data import samples_of_run
from megatron_solar.data_waits import DataWaits
from megatron_solar.ffn_inputs import FfnInputs
from megatron_solar.first_loss import check_first_loss
from megatron_solar.fp8_gap import Fp8Gap
from megatron_solar.fp8_proof import prove_fp8
from megatron_solar.fp8_state import kept_scales, without_fp8
from megatron_solar.hang_watch import HangWatch, Phase, connection_seconds
from megatron_solar.profiling import StepTraces
from megatron_solar.rank_times import RankTimes, hosts_of_ranks
from megatron_solar.replica_check import ReplicaCheck
from megatron_solar.run_state import build_or_load, save_state
from megatron_solar.step_guard import StepGuard
from megatron_solar.telling import EventWriter, earlier_attempts, step_event
from megatron_solar.validation import validate
from orchestrator.events import FLOPS_CONVENTION, EndEvent, StartEvent
from orchestrator.plan import TrainingPlan
from orchestrator.repeats import RepeatedSteps, recorded_losses
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.schedule import learning_rate


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
    samples = samples_of_run(run, plan, functools.partial(watch.enter, Phase.START, None), tell)
    replica, loaded = build_or_load(run, plan, samples, tell)
    if loaded is None and settings.training.check_first_loss:
        with without_fp8(replica.chunks):  # its tolerance is that of bf16; and delayed scaling has no scales yet
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
    hosts = hosts_of_ranks()
    guard = StepGuard(run, attempt, plan, replica, samples, writer, hosts, tell, watch, loaded)
    check_replicas = ReplicaCheck(plan, replica, hosts, tell)
    rank_times = RankTimes(plan, hosts, tell)
    ffn_inputs = FfnInputs(plan, replica, tell)
    gap = Fp8Gap(plan, replica, samples, tell)
    data_waits = DataWaits(tell)
    traces = StepTraces(plan, attempt, tell)
    repeats = RepeatedSteps(recorded_losses(earlier_attempts(run, attempt), plan, step), step, tell)
    if loaded is None:
        save(step, guard.at_save(step))  # before anything else, so that no later attempt reads the base again
        with without_fp8(replica.chunks):
            held_out(step)

    if step < plan.total_steps:
        guard.fill_histories(step)
    is_fp8_seen = False
    stop_reason = ""
    while step < plan.total_steps and not stop_reason:
        writer.check()
        traces.before(step + 1)
        step_started = time.monotonic()
        with rank_times.measuring(step + 1), ffn_inputs.measuring(step + 1):
            result = guard.compute(step)
        stop_reason = result.stop_reason
        rate = learning_rate(settings.training, step + 1, plan.total_steps)
        compat.set_learning_rate(replica.optimizer, rate, settings.training.weight_decay)
        if result.is_applied:
            compat.apply_gradients(replica.optimizer, result.gradient_norm)
        step += 1
        tell(step_event(plan, replica, step, result, rate, time.monotonic() - step_started))
        repeats.compare(step, result.loss, is_skipped=not result.is_applied)
        data_waits.after(step, result, time.monotonic() - step_started)
        is_first_in_fp8 = result.is_applied and not is_fp8_seen
        if is_first_in_fp8:
            prove_fp8(plan, replica, hosts, tell, step)
            is_fp8_seen = True
        if gap.is_due(step, is_first=is_first_in_fp8):
            watch.enter(Phase.VALIDATION, step)
            gap.measure(step)
        is_saving = step == plan.total_steps or bool(stop_reason) or step % settings.checkpoint.interval_steps == 0
        check_replicas(step, is_saving=is_saving)

        if step == plan.total_steps or step % settings.training.validation_interval_steps == 0:
            watch.enter(Phase.VALIDATION, step)
            with kept_scales(replica.chunks):
                held_out(step)
        if is_saving:
            watch.enter(Phase.SAVE, step)
            save(step, guard.at_save(step))
        traces.after(step)
        watch.enter(Phase.STEP, step)
    traces.finish(step)
    watch.enter(Phase.SAVE, step)
    writer.wait()
    repeats.finish()
    data_waits.finish(step)
    reason = "finished" if step == plan.total_steps else stop_reason
    tell(EndEvent(time=time.time(), step=step, reason=reason))
    return reason
