"""Have units worked on by processes of this machine: by this one alone, or by workers that are given units in turn.

A worker is told a unit by a line on its stdin and answers by a line on its stdout (worker.py). The first failure ends
the others, which is safe at any time, and is told with the unit it belongs to.
"""

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator import errors
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.tokenize.blocks import BLOCK_BYTES
from orchestrator.tokenize.engine import Engine
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.unit_work import COMMIT_SECONDS, work_unit
from orchestrator.tokenize.work_folder import PlannedUnit, WorkFolder, WorkPlan

LOOK_SECONDS = 0.5
END_SECONDS = 10.0  # for a process that has closed its stdout
LEAVE_SECONDS = 2.0

Look = Callable[[], None]


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def work_on(
    path: Path,
    units: Sequence[int],
    workers: int,
    commit_seconds: float = COMMIT_SECONDS,
    *,
    block_bytes: int = BLOCK_BYTES,
    engine: Engine | None = None,
    look: Look = lambda: None,
) -> None:
    """Bring units to their ends; those that are done already are left.

    Args:
        path: the folder of the work under way, which has a plan.
        units: their numbers.
        workers: processes; where one is enough, this one does it all.
        engine: the plan's, where this process has loaded it already.
        look: called about twice a second; what it raises ends the work.

    Raises:
        OrchestrateError: a unit failed, or its worker was killed; what is committed stays.
    """
    folder = WorkFolder(path)
    wanted = set(units)
    planned = {its.unit.number: its for its in folder.read_units() if its.unit.number in wanted}
    left = [number for number in units if folder.read_record(number).state != "done"]
    if min(workers, len(left)) > 1:
        _work_by_processes(path, [planned[n] for n in left], workers, commit_seconds, block_bytes, look)
    elif left:
        plan = folder.read_plan()
        engine = engine or open_engine(folder, plan)
        for number in left:
            steps = work_unit(
                folder, plan, planned[number], engine, commit_seconds=commit_seconds, block_bytes=block_bytes
            )
            with contextlib.closing(steps):
                for _ in steps:
                    look()


def open_engine(folder: WorkFolder, plan: WorkPlan) -> Engine:
    """Return the engine of a plan.

    Raises:
        DataError: this machine has another one.
    """
    engine, _ = load_engine(folder.path / plan.tokenizer_file, plan.engine_choice, lambda _: None)
    if engine.name != plan.engine:
        raise DataError(
            f"the engine should be {plan.engine}, as when {folder.path} was begun, but here it is {engine.name}; "
            "install the same version on every machine"
        )
    return engine


class _Worker:
    """A process that is told one unit after another."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin, self._process.stdout
        self.planned: PlannedUnit

    def give(self, planned: PlannedUnit) -> None:
        """Tell the next unit; a process that has ended is found by its answer."""
        self.planned = planned
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(f"{planned.unit.number}\n".encode())
            self._stdin.flush()

    def read_answer(self, folder: Path) -> None:
        """Read that the unit is done, or raise what the process says or how it ended."""
        line = self.stdout.readline()
        if line.endswith(b"\n"):
            answer = json.loads(line)
            if answer["error"]:
                raise getattr(errors, answer["kind"])(answer["error"])
            return
        code = self._process.wait(END_SECONDS)
        unit, kept = self.planned.describe(), f"what is done is kept in {folder}, and the same command goes on"
        if code == -signal.SIGKILL:
            raise DataError(
                f"{unit}: its worker was killed (SIGKILL), perhaps since memory ran out; use fewer --workers if it "
                f"was; {kept}"
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise OrchestrateError(f"{unit}: its worker ended {how}, see what it wrote above; {kept}")

    def end(self) -> None:
        """Let the process leave between two blocks, releasing its lock; kill it where it takes long, which is safe."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_SECONDS)
        self._process.kill()
        self._process.wait()
        self.stdout.close()


def _work_by_processes(
    folder: Path, units: Sequence[PlannedUnit], workers: int, commit_seconds: float, block_bytes: int, look: Look
) -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.tokenize.worker", str(folder)]
    command += ["--commit-seconds", str(commit_seconds), "--block-bytes", str(block_bytes)]
    waiting = iter(units)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as started:
        for planned in itertools.islice(waiting, workers):
            worker = _Worker(command)
            started.callback(worker.end)
            worker.give(planned)
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        while selector.get_map():
            for key, _ in selector.select(LOOK_SECONDS):
                worker = key.data
                worker.read_answer(folder)
                following = next(waiting, None)
                if following is None:
                    selector.unregister(worker.stdout)
                else:
                    worker.give(following)
            look()
