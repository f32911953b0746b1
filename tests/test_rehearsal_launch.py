"""`orchestrate launch --rehearse` as a person types it: a Slurm of its own, a killed node, a report, nothing left."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.run_directory import RunDirectory
from tests.conftest import REPOSITORY
from tests.test_slurm_launch import pytestmark

__all__ = ["pytestmark"]
COMMAND = (sys.executable, "-m", "orchestrator.commands.main", "launch")


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}


def rehearse(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, "--rehearse", *arguments], env=environment(home), cwd=home, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip


def sandboxes() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("orchestrate-slurm-*-rehearsal-*")}


def test_a_rehearsal_is_complete_in_itself_and_survives_the_node_that_it_kills(home: Path) -> None:
    before = sandboxes()
    done = rehearse(home, "--nodes", "4", "--steps", "8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["ranks"], told["layout"]) == (4, "TP 2 × PP 1 × DP 2, sequence parallel")
    assert (told["is_finished"], told["is_tracked"], told["last_step"]) == (True, True, 8)
    if os.geteuid() == 0:  # otherwise a node cannot really die
        assert told["attempts"] == 2
        loss = told["node_loss"]
        assert loss["after_step"] >= 4
        assert loss["restart_seconds"] > 0
        assert f"killed node {loss['node']}" in done.stderr
    run = RunDirectory(home / "orchestrate" / "runs" / told["run"])
    assert run.name == "solar-10.7b-rehearsal"
    assert complete_checkpoints(run)[-1].step == 8
    assert (run.path / "rehearsal.png").read_bytes().startswith(b"\x89PNG")
    with sqlite3.connect(home / "orchestrate" / "mlflow.db") as store:
        steps = [step for (step,) in store.execute("select step from metrics where key = 'train/loss' order by step")]
    assert set(steps) == set(range(1, 9))
    assert told["peak_memory_bytes"] > 0
    assert sandboxes() == before, "its Slurm is gone"


def test_a_rehearsal_that_is_told_to_end_leaves_no_slurm_behind(home: Path) -> None:
    before = sandboxes()
    process = subprocess.Popen(
        [*COMMAND, "--rehearse", "--nodes", "2"],
        env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "submitted as job" not in (line := process.stderr.readline()):
        assert line, process.communicate()
    (name,) = sandboxes() - before
    daemons = json.loads((Path(tempfile.gettempdir()) / name / "sandbox.json").read_text())["daemons"]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert sandboxes() == before
    assert not any(psutil.pid_exists(daemon["process"]) for daemon in daemons)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--rehearse", "--nodes", "2", "layout.pipeline_parallel=4"], "--ranks-per-node 4 gives 8 ranks"),
        (["--nodes", "2", "--steps", "5"], "--steps is for --rehearse"),
        (["--rehearse", "--from", "a-run"], "leave --from away"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_at_once(home: Path, arguments: list[str], problem: str) -> None:
    said = subprocess.run([*COMMAND, *arguments], env=environment(home), cwd=home, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert said.returncode == 2
    assert problem in said.stderr
    assert not (home / "orchestrate").exists()


def test_what_is_rehearsed_and_what_is_not_is_shown_before_anything_starts(home: Path) -> None:
    shown = rehearse(home, "--nodes", "32", "layout.pipeline_parallel=4", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "TP 2 × PP 4, sequence parallel" in shown.stdout
    assert "gloo: nothing is learnt" in shown.stdout
    assert shown.stdout.rstrip().endswith("--rehearse")
    assert not (home / "orchestrate" / "runs").exists()
