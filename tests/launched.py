"""Launched runs: started through Submitit's local executor, with real ranks, and followed from outside."""

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator.events import StepEvent, read_events
from orchestrator.reconcile import ENDED
from orchestrator.run_directory import RunDirectory
from orchestrator.status import RunStatus, read_status

DEADLINE_SECONDS = 180


def put_store(runs: Path) -> None:
    """Put an empty tracking store where runs in a folder have theirs, since making one takes seconds each time."""
    store = runs.parent / "mlflow.db"
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_bytes(_empty_store())


@functools.cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        code = "import sys; from orchestrator.tracking_store import make_store; make_store(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], check=True)
        return path.read_bytes()


def wait_for(what: str, condition: Callable[[], bool], run: RunDirectory) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in run.jobs.glob("*.out"))
            raise AssertionError(f"waited {DEADLINE_SECONDS} s for {what}: {read_status(run)}\n{logs}")
        time.sleep(0.05)


def step_of(run: RunDirectory) -> int:
    attempts = run.attempts()
    events = [e for a in attempts for _, e in read_events(a.events) if isinstance(e, StepEvent)]
    return events[-1].step if events else 0


def wait_to_end(run: RunDirectory) -> RunStatus:
    wait_for("the end", lambda: read_status(run).state in ENDED, run)
    return read_status(run)


def processes_of(run: RunDirectory) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or [])]
