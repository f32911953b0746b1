"""Steps that waited for their samples, told of now and then."""

import dataclasses
import time
from collections.abc import Callable

from megatron_solar.one_step import StepResult
from orchestrator.events import DataWaitEvent

TELL_STEPS = 100
"""There are at least so many steps between two tellings."""


class DataWaits:
    """Counts the steps in which a rank waited for longer than `data.wait_alarm_share` of the step.

    Ranks say so in the all-reduce of the loss. The first step of an attempt opens files and is not counted.
    """

    def __init__(self, tell: Callable[[DataWaitEvent], None]) -> None:
        self._tell = tell
        self._is_first = True
        self._waits: DataWaitEvent | None = None
        self._told_step: int | None = None

    def after(self, step: int, result: StepResult, step_seconds: float) -> None:
        """Count a step that is done, and tell of those that waited where the last telling is long ago."""
        if result.ranks_waiting and not self._is_first:
            waits = self._waits or DataWaitEvent(
                time=time.time(), step=step, first_step=step, steps=0, waiting_seconds=0, step_seconds=0, most_ranks=0
            )
            self._waits = dataclasses.replace(
                waits,
                time=time.time(),
                step=step,
                steps=waits.steps + 1,
                waiting_seconds=waits.waiting_seconds + result.waiting_seconds,
                step_seconds=waits.step_seconds + step_seconds,
                most_ranks=max(waits.most_ranks, result.ranks_waiting),
            )
        self._is_first = False
        if self._told_step is None or step >= self._told_step + TELL_STEPS:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Tell of the steps that waited since the last telling, if there are any."""
        if self._waits is not None:
            self._tell(self._waits)
            self._waits = None
            self._told_step = step
