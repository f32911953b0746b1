"""Runs on a Slurm of our own, with real ranks: what the tests that cause their faults share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.config import compose
from orchestrator.events import StepEvent, read_events
from orchestrator.launch import launch
from orchestrator.plan import make_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.sandbox import Sandbox
from tests.conftest import SMALL
from tests.launched import put_store

# On a machine of one's own; .ci/run installs both, and counts a skipped test as a failure.
needs_slurm = pytest.mark.skipif(
    any(shutil.which(name, path="/usr/sbin:/usr/bin") is None for name in ("slurmctld", "munged")),
    reason="a Slurm of our own needs Debian's slurm-wlm and munge",
)

needs_accounting = pytest.mark.skipif(
    any(shutil.which(name, path="/usr/sbin:/usr/bin") is None for name in ("slurmdbd", "mariadbd")),
    reason="accounting needs Debian's slurmdbd, slurm-wlm-mysql-plugin and mariadb-server",
)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="a node that can really die, and a disk of one's own, need root"
)


def launch_on(runs: Path, corpus: Path, *overrides: str) -> RunDirectory:
    settings = compose(
        "demo-base",
        [
            *SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}", f"paths.runs={runs}",
            "name=on-slurm", "cluster=sandbox", "cluster.nodes=2", "tokens=100000000", *overrides,
        ],
    )  # fmt: skip
    put_store(runs)
    return launch(make_plan(settings), "a test")


def begun(run: RunDirectory, number: int) -> Callable[[], bool]:
    """Return whether the ranks of an attempt have done a step."""
    return lambda: any(isinstance(event, StepEvent) for _, event in read_events(run.attempt(number).events))


def surviving_losses(run: RunDirectory) -> dict[int, float]:
    """Return the loss of each step as the newest attempt that did it told."""
    return {
        event.step: event.loss
        for attempt in run.attempts()
        for _, event in read_events(attempt.events)
        if isinstance(event, StepEvent)
    }


def job_of(run: RunDirectory) -> str:
    return str(run.submissions()[-1]["job_id"])


def state_of(slurm: Sandbox, job: str) -> str:
    return slurm.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def excluded_by_slurm(slurm: Sandbox, run: RunDirectory) -> set[str]:
    """Return the nodes that a run's job must not get, by Slurm's record."""
    shown = slurm.ask("scontrol", "show", "job", "--oneliner", job_of(run)).split()
    listed = next(word.removeprefix("ExcNodeList=") for word in shown if word.startswith("ExcNodeList="))
    return set(slurm.ask("scontrol", "show", "hostnames", listed).split())


def outcomes(run: RunDirectory) -> list[tuple[str, str]]:
    found = [attempt.read_outcome() for attempt in run.attempts()]
    return [(outcome["cause"], outcome["action"]) for outcome in found if outcome is not None]


def forked_ranks(slurm: Sandbox) -> list[psutil.Process]:
    """Return the ranks: the children of the preloaded process that runs inside the sandbox."""
    for daemon in slurm.daemons:
        for child in psutil.Process(daemon.process).children(recursive=True):
            if "megatron_solar.preload" in child.cmdline() and "megatron_solar.preload" not in child.parent().cmdline():
                return child.children()
    return []


def read_json_of(attempt: object) -> dict[str, object]:
    return attempt.read_job() or {}  # type: ignore[attr-defined, no-any-return]
