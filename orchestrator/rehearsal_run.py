"""Rehearse a launch: a Slurm of our own, the very launch with a toy on CPU ranks, a node killed, a report.

Nothing here decides how a run is launched, laid out or kept alive: that is what is rehearsed.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.config import load_cluster
from orchestrator.errors import SchedulerError
from orchestrator.files import read_json, write_json
from orchestrator.follow import follow
from orchestrator.launch import launch
from orchestrator.pictures import draw_timeline
from orchestrator.plan import make_plan
from orchestrator.rehearsal import rehearsal_settings, unused_name
from orchestrator.rehearsal_inputs import make_inputs
from orchestrator.rehearsal_report import KilledNode, Rehearsal, is_tracked, memory_bytes, rehearsal_of
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import RunSettings
from orchestrator.slurm import sandbox
from orchestrator.status import RunStatus
from orchestrator.values import to_plain

INPUTS = "rehearsal"
"""Beside the runs' folder: what rehearsals read, made once."""
POLL_SECONDS = 0.5
MEMORY_SECONDS = 5.0
TRACKING_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RehearsalRequest:
    """What a person may choose."""

    ranks_per_node: int = 1
    steps: int = 10
    is_faithful: bool = False
    """Whether slurmd starts the ranks itself, each with imports of its own."""
    on_cluster: bool = False
    """Whether it runs on the CPU nodes of the site's own Slurm, where no node can be killed."""


def prepare(real: RunSettings, request: RehearsalRequest, given: frozenset[str]) -> tuple[RunSettings, float]:
    """Return the rehearsal's settings, its inputs made where they were missing, and the seconds that took.

    Raises:
        ConfigError: the real run's layout cannot be rehearsed on so many ranks.
        DataError: there is nothing to make data with.
    """
    cluster = real.cluster if request.on_cluster else load_cluster("sandbox")
    if request.is_faithful:
        cluster = dataclasses.replace(cluster, fork_ranks=False)
    settings = rehearsal_settings(
        real,
        cluster=cluster,
        ranks_per_node=request.ranks_per_node,
        steps=request.steps,
        spare_nodes=real.cluster.spare_nodes if request.on_cluster else max(1, real.cluster.spare_nodes),
        given=given,
    )
    runs = Path(settings.paths.runs)
    settings = dataclasses.replace(settings, name=unused_name(settings.name, lambda name: (runs / name).exists()))
    began = time.monotonic()
    settings = make_inputs(runs.parent / INPUTS, settings, given=given)
    return settings, time.monotonic() - began


def rehearse(
    settings: RunSettings, command: str, inputs_seconds: float, say: Callable[[str], None]
) -> tuple[Rehearsal, RunDirectory]:
    """Launch a rehearsal and follow it to its end, on a sandbox of its own unless it is for a real cluster.

    Args:
        say: told what happens.

    Raises:
        RunError: it failed.
        SchedulerError: no sandbox could be started, or the launch was refused.
    """
    if not settings.cluster.one_machine:
        run = launch(make_plan(settings), command)
        say(f"submitted as job {run.submissions()[-1]['job_id']}")
        follow(run)
        return _report(run, inputs_seconds, peak_memory_bytes=0, killed=None), run
    with _own_sandbox(settings.cluster.nodes + settings.cluster.spare_nodes) as slurm:
        say(f"a Slurm of {slurm.nodes} nodes runs on this machine")
        run = launch(make_plan(settings), command)
        say(f"submitted as job {run.submissions()[-1]['job_id']}")
        watcher = _Watcher(run, slurm, max(1, settings.checkpoint.interval_steps), say)
        follow(run, watcher.look, interval_seconds=POLL_SECONDS, goes_on=False)
        return _report(run, inputs_seconds, watcher.peak_memory_bytes, watcher.killed), run


def _report(run: RunDirectory, inputs_seconds: float, peak_memory_bytes: int, killed: KilledNode | None) -> Rehearsal:
    deadline = time.monotonic() + TRACKING_SECONDS
    while not is_tracked(run) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    done = rehearsal_of(run, inputs_seconds=inputs_seconds, peak_memory_bytes=peak_memory_bytes, killed=killed)
    write_json(run.path / "rehearsal.json", to_plain(done))
    marks = {f"{killed.node} killed": killed.time} if killed is not None else {}
    draw_timeline(run.path / "rehearsal.png", f"{run.name}: {done.layout}, {done.ranks} ranks", done.phases, marks)
    return done


class _Watcher:
    """Kills a node once there is a checkpoint to go on from, and measures memory now and then."""

    def __init__(self, run: RunDirectory, slurm: sandbox.Sandbox, save_step: int, say: Callable[[str], None]) -> None:
        self._run = run
        self._slurm = slurm
        self._save_step = save_step
        self._say = say
        self._measured = time.monotonic()
        self.peak_memory_bytes = 0
        self.killed: KilledNode | None = None

    def look(self, status: RunStatus) -> None:
        """Act on a status that was just read."""
        if time.monotonic() - self._measured > MEMORY_SECONDS:
            self._measured = time.monotonic()
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes(self._processes()))
        if self.killed is not None or not self._slurm.own_namespaces or status.step >= status.total_steps:
            return
        choices = [attempt.checks / "choice.json" for attempt in self._run.attempts()[-1:]]
        if any(path.exists() for path in choices) and any(
            c.step >= self._save_step for c in complete_checkpoints(self._run)
        ):
            node = str(read_json(choices[0])["nodes"][-1])
            killed = KilledNode(node=node, time=time.time())
            with contextlib.suppress(SchedulerError):
                sandbox.kill_node(self._slurm, node)
                self.killed = killed
                self._say(f"killed node {node} with all that runs on it")

    def _processes(self) -> list[psutil.Process]:
        found = []
        for daemon in self._slurm.daemons:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(daemon.process)
                found += [process, *process.children(recursive=True)]
        return found


@contextlib.contextmanager
def _own_sandbox(nodes: int) -> Iterator[sandbox.Sandbox]:
    """Run a sandbox, with Slurm's commands of this process pointed at it; it is gone afterwards."""
    name = f"rehearsal-{os.getpid()}"
    slurm = sandbox.start(name, nodes=nodes)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(slurm.environment())
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    patience_seconds = 0.0  # what it does is of no more use
    try:
        yield slurm
        patience_seconds = sandbox.STOP_SECONDS
    finally:
        os.environ.clear()
        os.environ.update(before)
        with contextlib.suppress(SchedulerError):
            sandbox.stop(name, patience_seconds=patience_seconds)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def problems_of(done: Rehearsal, *, could_kill: bool) -> list[str]:
    """Return what a rehearsal did not show, each a reason not to launch yet."""
    found = [] if done.is_finished else ["the run did not finish"]
    if not done.saves:
        found.append("no checkpoint was saved")
    if not done.is_tracked:
        found.append("MLflow does not have all of its events")
    if could_kill and (done.node_loss is None or done.node_loss.restart_seconds is None):
        found.append("no node was lost, or the run did not go on after it; give it more --steps")
    return found
