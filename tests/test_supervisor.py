"""A launched run under its supervisor: Submitit's local executor, real ranks, faults caused for real."""

import os
import signal
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.errors import RunError
from orchestrator.files import read_json
from orchestrator.launch import cancel
from orchestrator.reconcile import State
from orchestrator.resume import prepare_resume, resume
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.ranks import socket_folder
from orchestrator.slurm.scheduler import local_process, warn_of_time_limit
from orchestrator.status import read_status
from tests.launched import processes_of, step_of, wait_for, wait_to_end


def ranks_of(run: RunDirectory) -> list[psutil.Process]:
    """Return the forked ranks: the children of the preloaded process."""
    process = local_process(run)
    assert process is not None
    preload = next(child for child in process.children(recursive=True) if "megatron_solar.preload" in child.cmdline())
    return preload.children()


def steps_in_mlflow(run: RunDirectory) -> list[int]:
    """Read the loss's steps straight from the store's tables."""
    store = Path(run.path.parent.parent) / "mlflow.db"
    with sqlite3.connect(store) as connection:
        rows = connection.execute("SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step").fetchall()
        runs = connection.execute("SELECT COUNT(*) FROM runs").fetchone()
    assert runs == (1,)
    return [row[0] for row in rows]


def test_a_time_limits_warning_saves_leaves_and_goes_on_as_a_second_attempt_of_one_mlflow_run(
    start: Callable[..., RunDirectory],
) -> None:
    run = start("layout.tensor_parallel=2", "cluster.ranks_per_node=2", steps=80)
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    warn_of_time_limit(run)
    status = wait_to_end(run)

    first, second = (attempt.read_outcome() for attempt in run.attempts())
    assert first is not None and second is not None
    assert (status.state, status.step, status.attempts) == (State.FINISHED, 80, 2)
    assert (first["cause"], first["action"], set(first["exit_codes"].values())) == ("time_limit", "requeue", {75})
    assert (second["cause"], second["action"], set(second["exit_codes"].values())) == ("finished", "finish", {0})
    assert second["first_step"] == first["last_step"] + 1  # nothing repeated, nothing left out
    assert complete_checkpoints(run)[-1].step == 80
    wait_for("the job's end", lambda: local_process(run) is None, run)  # the rest is shipped by then
    assert steps_in_mlflow(run) == list(range(1, 81))
    assert read_json(run.provenance)["packages"]["megatron-core"] == "0.16.1"
    with pytest.raises(RunError, match="has done all its 80 steps"):
        prepare_resume(run)


def test_a_killed_rank_restarts_from_the_last_checkpoint_in_the_same_job(start: Callable[..., RunDirectory]) -> None:
    run = start("cluster.ranks_per_node=2", "checkpoint.interval_steps=4", steps=300)
    wait_for("a checkpoint", lambda: any(c.step >= 4 for c in complete_checkpoints(run)), run)
    victim = ranks_of(run)[1]
    victim.kill()
    wait_for("the second attempt", lambda: len(run.attempts()) == 2, run)
    outcome = run.attempts()[0].read_outcome()
    assert outcome is not None
    assert (outcome["cause"], outcome["action"]) == ("rank_killed", "restart")
    assert "was killed by SIGKILL" in outcome["message"]
    assert outcome["saved_step"] >= 4
    wait_for("more steps", lambda: step_of(run) > outcome["last_step"], run)
    jobs = {str(attempt.read_job()["job_id"]) for attempt in run.attempts()}  # type: ignore[index]
    assert len(jobs) == 1

    cancel(run)
    status = wait_to_end(run)
    assert status.state == State.CANCELLED
    assert complete_checkpoints(run)[-1].step == status.step  # it saved before it left
    wait_for("an empty machine", lambda: not processes_of(run), run)


def test_a_cancelled_run_goes_on_from_where_it_saved_when_it_is_resumed(start: Callable[..., RunDirectory]) -> None:
    run = start(steps=60)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    cancel(run)
    cancelled = wait_to_end(run)
    assert cancelled.state == State.CANCELLED and 3 <= cancelled.step < 60
    wait_for("the job's end", lambda: local_process(run) is None, run)
    resume(run, prepare_resume(run), "a test")
    status = wait_to_end(run)
    assert (status.state, status.step, status.attempts) == (State.FINISHED, 60, 2)
    assert status.attempt_list[1].first_step == cancelled.step + 1


def test_a_cancel_between_the_warning_and_the_end_is_not_undone_by_a_requeue(
    start: Callable[..., RunDirectory],
) -> None:
    run = start(steps=2000)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    run.write_cancel_mark()  # as `orchestrate cancel` does before it tells the scheduler
    warn_of_time_limit(run)
    status = wait_to_end(run)
    wait_for("an empty machine", lambda: not processes_of(run), run)
    assert (status.state, status.attempts) == (State.CANCELLED, 1)
    assert read_status(run).attempt_list[0].cause in ("time_limit", "cancelled")  # whichever was seen first


def test_a_cancel_whose_signal_is_lost_is_seen_all_the_same(start: Callable[..., RunDirectory]) -> None:
    run = start(steps=100_000)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    run.write_cancel_mark()
    status = wait_to_end(run)
    assert (status.state, status.cause, status.attempts) == (State.CANCELLED, "cancelled", 1)
    assert complete_checkpoints(run)[-1].step == status.step


def test_an_exception_in_a_rank_is_what_the_user_sees_and_nothing_is_started_again(
    start: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    run = start("cluster.ranks_per_node=2", steps=2000)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    # The stop request is read by rank 0: one that cannot be read is an exception in a real place.
    run.attempts()[0].stop_request.write_text('{"reason": "no such reason"}')
    status = wait_to_end(run)
    assert status.state == State.FAILED
    assert status.attempts == 1
    assert "ValueError" in status.reason and "rank 0" in status.reason
    failure = read_json(run.attempts()[0].rank_failure(0))
    assert "STOP_REASONS.index" in failure["traceback"]
    assert failure["step"] >= 3


def test_a_supervisor_that_is_killed_takes_its_ranks_along_and_the_run_can_be_resumed(
    start: Callable[..., RunDirectory],
) -> None:
    run = start("checkpoint.interval_steps=4", steps=60)
    wait_for("a checkpoint", lambda: any(c.step >= 4 for c in complete_checkpoints(run)), run)
    ranks = ranks_of(run)
    process = local_process(run)
    assert process is not None and ranks
    os.kill(process.pid, signal.SIGKILL)
    left = Path(tempfile.gettempdir()) / socket_folder(process.pid)
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    wait_for("the job's end", lambda: local_process(run) is None, run)
    status = read_status(run)
    assert status.state == State.FAILED
    assert "supervisor_lost" in status.reason
    assert list(left.parent.glob(f"{left.name}*"))  # killed, it could not remove its socket's folder
    resume(run, prepare_resume(run), "a test")
    assert wait_to_end(run).state == State.FINISHED
    assert not list(left.parent.glob(f"{left.name}*"))  # the next supervisor did


def test_a_local_time_limit_is_real(start: Callable[..., RunDirectory]) -> None:
    run = start("cluster.time_limit=0:01:00", "cluster.warning_seconds=40", steps=100000)
    wait_for("the second attempt's steps", lambda: len(run.attempts()) >= 2, run)
    outcome = run.attempts()[0].read_outcome()
    assert outcome is not None
    assert (outcome["cause"], outcome["action"]) == ("time_limit", "requeue")
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED
