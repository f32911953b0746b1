"""Show a run's progress in the terminal until it ends; it goes on by itself if this is left."""

import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.errors import RunError
from orchestrator.plan import read_plan
from orchestrator.reconcile import ENDED, State
from orchestrator.run_directory import RunDirectory
from orchestrator.screen import console, notice
from orchestrator.status import RunStatus, read_status
from orchestrator.units import format_count

POLL_SECONDS = {"local": 0.5, "slurm": 5.0}
"""By scheduler: a shared controller is not to be asked twice a second."""


def follow(
    run: RunDirectory,
    at_poll: Callable[[RunStatus], None] = lambda status: None,
    *,
    interval_seconds: float | None = None,
    goes_on: bool = True,
) -> RunStatus:
    """Follow a run to its end.

    Args:
        at_poll: called with each status read.
        interval_seconds: between two looks; by default as often as its scheduler may be asked.
        goes_on: whether the run outlives a Ctrl-C.

    Raises:
        RunError: it failed; the message is the reason.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=console(notices=True),
    ) as progress:
        task = progress.add_task(run.name, total=None, detail="starting")
        interval_seconds = interval_seconds or POLL_SECONDS[read_plan(run.plan).settings.cluster.scheduler]
        try:
            while True:
                status = read_status(run)
                at_poll(status)
                progress.update(task, completed=status.step, total=status.total_steps, detail=_detail(status))
                if status.state in ENDED:
                    break
                time.sleep(interval_seconds)
        except KeyboardInterrupt:
            progress.stop()
            if goes_on:
                notice(f"run {run.name} goes on by itself; end it with `orchestrate cancel {run.name}`")
            raise
    if status.state == State.FAILED:
        raise RunError(f"run {run.name} failed: {status.reason}; see `orchestrate logs {run.name}`")
    return status


def _detail(status: RunStatus) -> str:
    if status.state != State.RUNNING or status.loss is None or status.tokens_per_second is None:
        return str(status.state).lower()
    return f"loss {status.loss:.3f}  {format_count(status.tokens_per_second)} tokens/s  attempt {status.attempts}"
