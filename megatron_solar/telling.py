"""What rank 0 tells of a step, and what attempts before told."""

import time

import torch.distributed

from megatron_solar.one_step import StepResult
from megatron_solar.replica import Replica
from orchestrator.errors import OrchestrateError
from orchestrator.events import Event, StepEvent, event_record, read_events
from orchestrator.files import JsonLines
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.repeats import EarlierAttempt
from orchestrator.run_directory import AttemptDirectory, RunDirectory


class EventWriter:
    """Append events to the attempt's file; only rank 0 writes."""

    def __init__(self, attempt: AttemptDirectory) -> None:
        self._lines = JsonLines(attempt.events) if torch.distributed.get_rank() == 0 else None

    def __call__(self, event: Event) -> None:
        """Write one event as one line."""
        if self._lines is not None:
            self._lines.append(event_record(event))


def earlier_attempts(run: RunDirectory, attempt: AttemptDirectory) -> list[EarlierAttempt]:
    """Return what the attempts before recorded; on rank 0, which alone compares."""
    found = []
    for other in run.attempts() if torch.distributed.get_rank() == 0 else []:
        if other.number < attempt.number:
            try:
                before = read_plan(other.plan) if other.plan.exists() else None
            except OrchestrateError:  # another version's plan; its attempt cannot be compared
                before = None
            steps = [event for _, event in read_events(other.events) if isinstance(event, StepEvent)]
            found.append(
                EarlierAttempt(
                    plan=before,
                    losses={event.step: event.loss for event in steps},
                    skipped=frozenset(event.step for event in steps if event.is_skipped),
                )
            )
    return found


def step_event(
    plan: TrainingPlan, replica: Replica, step: int, result: StepResult, rate: float, seconds: float
) -> StepEvent:
    """Return the event of a step that took so many seconds."""
    tokens = plan.consumed_tokens(step) - plan.consumed_tokens(step - 1)
    per_second = tokens / seconds
    per_gpu = per_second / plan.layout.world_size
    tflops = per_gpu * plan.flops_per_token / 1e12
    return StepEvent(
        time=time.time(),
        step=step,
        loss=result.loss,
        gradient_norm=result.gradient_norm,
        learning_rate=rate,
        consumed_samples=plan.consumed_samples(step),
        consumed_tokens=plan.consumed_tokens(step),
        step_seconds=seconds,
        data_seconds=result.data_seconds,
        tokens_per_second=per_second,
        tokens_per_second_per_gpu=per_gpu,
        tflops_per_gpu=tflops,
        mfu=tflops / replica.peak_tflops,
        is_skipped=not result.is_applied,
    )
