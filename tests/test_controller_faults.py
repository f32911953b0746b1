"""What a run does without its scheduler: slurmctld dead or frozen, the accounting dead or never there."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import SchedulerError
from orchestrator.events import StepEvent, read_events
from orchestrator.files import read_json
from orchestrator.launch import cancel
from orchestrator.reconcile import State
from orchestrator.slurm import sandbox, scheduler
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.status import read_status
from tests.launched import step_of, wait_for, wait_to_end
from tests.slurm_faults import supervisor_on
from tests.slurm_runs import (
    begun,
    job_of,
    launch_on,
    needs_accounting,
    needs_root,
    needs_slurm,
    outcomes,
    read_json_of,
    state_of,
)

pytestmark = [needs_slurm, needs_root, pytest.mark.fault]


def test_training_does_not_notice_that_slurmctld_is_away_and_status_says_unknown_not_gone(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus, "training.tokens=25600")  # 200 steps
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    with pytest.raises(SchedulerError, match="accounting storage is disabled"):
        slurm.ask("sacct")
    assert read_status(run).state == State.RUNNING

    sandbox.stop_controller(slurm)
    step = step_of(run)
    with monkeypatch.context() as sooner:
        sooner.setattr(scheduler, "ANSWER_SECONDS", 3)  # squeue tries for 9
        away = read_status(run)
    assert away.state == State.UNKNOWN
    assert away.reason.startswith("the scheduler does not answer; last seen running "), away.reason
    wait_for("steps while nobody answers", lambda: step_of(run) > step, run)
    slurm = sandbox.start_controller(slurm)
    assert read_status(run).state in (State.RUNNING, State.FINISHED)

    status = wait_to_end(run)
    assert (status.state, status.step, status.attempts) == (State.FINISHED, 200, 1)
    assert outcomes(run) == [("finished", "finish")]
    wait_for("Slurm's word", lambda: state_of(slurm, job_of(run)) == "COMPLETED", run)


def test_a_warning_that_comes_while_slurmctld_is_away_is_followed_by_a_requeue_once_it_is_back(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus, "cluster.checks.enabled=false")
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    controller = psutil.Process(next(daemon.process for daemon in slurm.daemons if daemon.name == "slurmctld"))
    controller.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as sooner:
        sooner.setattr(scheduler, "ANSWER_SECONDS", 3)
        asked = time.monotonic()
        assert read_status(run).state == State.UNKNOWN, "it takes connections, and answers none"
        assert time.monotonic() - asked < 9, "squeue alone would wait longer"
    controller.send_signal(signal.SIGCONT)
    wait_for("Slurm's answer", lambda: read_status(run).state == State.RUNNING, run)

    sandbox.stop_controller(slurm)
    supervisor_on(slurm, "n001").send_signal(signal.SIGUSR2)  # as the time limit's warning does
    wait_for("the first attempt's end", lambda: outcomes(run) == [("time_limit", "requeue")], run)
    log = next(run.jobs.glob("*.out"))
    wait_for("a request that nobody heard", lambda: "asks again" in log.read_text(), run)
    slurm = sandbox.start_controller(slurm)
    wait_for("the second attempt's steps", begun(run, 2), run)
    first = read_json(run.attempt(1).outcome)
    steps = [event.step for _, event in read_events(run.attempt(2).events) if isinstance(event, StepEvent)]
    assert (first["saved_step"], steps[0]) == (first["last_step"], first["last_step"] + 1)
    assert [(record["job_id"], record["restart_count"]) for record in map(read_json_of, run.attempts())] == [
        (job_of(run), 0), (job_of(run), 1),
    ]  # fmt: skip
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED


@needs_accounting
def test_states_are_right_while_the_accounting_is_down(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=2, accounting=True)
    run = launch_on(tmp_path / "runs", corpus, "cluster.checks.enabled=false", "training.tokens=12800")  # 100 steps
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    kept = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_of(run)}", "--format=State")
    wait_for("Slurm's record", lambda: slurm.ask(*kept).strip() == "RUNNING", run)
    sandbox.stop_accounting(slurm)
    with pytest.raises(SchedulerError, match="sacct"):
        slurm.ask(*kept)
    assert read_status(run).state in (State.RUNNING, State.FINISHED)
    status = wait_to_end(run)
    assert (status.state, status.step, status.attempts) == (State.FINISHED, 100, 1)
    wait_for("Slurm's word", lambda: state_of(slurm, job_of(run)) == "COMPLETED", run)
