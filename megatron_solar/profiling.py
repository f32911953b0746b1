"""Traces of some steps of chosen ranks, with torch's profiler; where none are asked for, nothing is loaded or done.

A trace has all that a step does: waiting for samples, the schedule, the optimizer, telling, and a validation or a save
that falls on it. It is Chrome's JSON, which ui.perfetto.dev opens. On CUDA it has the kernels as well, which was never
run on a GPU.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from megatron_solar.stacks import waits_for_others
from orchestrator.events import ProfileEvent
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory
from orchestrator.traced_steps import traced_steps


class StepTraces:
    """Traces the steps that `profile.steps` names, on the ranks that `profile.ranks` names."""

    def __init__(self, plan: TrainingPlan, attempt: AttemptDirectory, tell: Callable[[ProfileEvent], None]) -> None:
        self._steps = traced_steps(plan.settings.profile)
        self._ranks = plan.settings.profile.ranks
        self._device = plan.settings.cluster.device
        self._attempt = attempt
        self._tell = tell
        self._first: int | None = None  # of the steps that were traced in this attempt
        self._profiler: Any = None
        self._mark: Any = None  # names the step in the trace

    def before(self, step: int) -> None:
        """Begin to trace a step, if it is to be traced."""
        if step not in self._steps:
            return
        if self._first is None:
            self._first = step
            if torch.distributed.get_rank() in self._ranks:
                self._profiler = _started_profiler(self._device)
        if self._profiler is not None:
            from torch.profiler import record_function

            self._mark = record_function(f"step {step}")
            self._mark.__enter__()

    def after(self, step: int) -> None:
        """End the trace of a step; collective where it is the last one."""
        if step not in self._steps:
            return
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        if step == self._steps[-1]:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Write what was traced so far and is not written yet, if anything is; collective."""
        if self._first is None:
            return
        began = time.monotonic()
        if self._profiler is not None:
            self._profiler.stop()
            self._attempt.traces.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(self._attempt.rank_trace(torch.distributed.get_rank())))
            self._profiler = None
        _wait_for_all()  # so that what is told of is there
        self._tell(
            ProfileEvent(
                time=time.time(),
                step=step,
                first_step=self._first,
                last_step=step,
                ranks=self._ranks,
                write_seconds=time.monotonic() - began,
            )
        )
        self._first = None


def _started_profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


@waits_for_others
def _wait_for_all() -> None:
    torch.distributed.barrier()
