"""A process that works on units: `python -m orchestrator.tokenize.worker FOLDER ...`.

Without more it is told units on stdin, a number a line, and answers each on stdout with a line of JSON; when its
coordinator is gone its stdin ends, and it leaves between two blocks. With --task K --tasks T it is one task of a
Slurm array: it sees to the units u with u % T == K, by --workers processes, and ends with 0 when they are done.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from pathlib import Path

from orchestrator.errors import OrchestrateError
from orchestrator.tokenize.blocks import BLOCK_BYTES
from orchestrator.tokenize.unit_work import work_unit
from orchestrator.tokenize.work_folder import WorkFolder
from orchestrator.tokenize.workers import open_engine, work_on

TASK_COMMIT_SECONDS = 15.0  # many nodes share a file system


def main() -> int:
    """Work, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.tokenize.worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", type=int)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commit-seconds", type=float, default=TASK_COMMIT_SECONDS)
    parser.add_argument("--block-bytes", type=int, default=BLOCK_BYTES)
    chosen = parser.parse_args()
    if chosen.task is None:
        return _serve(WorkFolder(chosen.folder), chosen.commit_seconds, chosen.block_bytes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Slurm's: leave the units' locks released
    try:
        units = WorkFolder(chosen.folder).read_plan().units
        mine = range(chosen.task, units, chosen.tasks)
        work_on(chosen.folder, mine, chosen.workers, chosen.commit_seconds, block_bytes=chosen.block_bytes)
    except OrchestrateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _serve(folder: WorkFolder, commit_seconds: float, block_bytes: int) -> int:
    """Work on the units that stdin names, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the coordinator as well, which ends this process
    stdin = select.poll()
    stdin.register(0, select.POLLIN)
    with contextlib.suppress(BrokenPipeError):
        try:
            plan = folder.read_plan()
            units = folder.read_units()
            engine = open_engine(folder, plan)
            for line in sys.stdin:
                steps = work_unit(
                    folder, plan, units[int(line)], engine, commit_seconds=commit_seconds, block_bytes=block_bytes
                )
                with contextlib.closing(steps):
                    for _ in steps:
                        if stdin.poll(0):  # nothing is written there while a unit is worked on, so this is its end
                            return 1
                _answer("", "")
        except OrchestrateError as error:
            _answer(type(error).__name__, str(error))
    return 0


def _answer(kind: str, error: str) -> None:
    os.write(1, json.dumps({"kind": kind, "error": error}).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
