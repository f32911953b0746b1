"""Runs launched on a real Slurm of our own, with real ranks; what happens to them there is caused for real."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.errors import RunError
from orchestrator.events import StepEvent, read_events
from orchestrator.files import read_json
from orchestrator.reconcile import State
from orchestrator.resume import prepare_resume
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm import sandbox, submission
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.submission import UnknownSubmissionError
from orchestrator.slurm.take_over import settle_submission
from orchestrator.status import read_status
from tests.conftest import REPOSITORY, SMALL
from tests.launched import step_of, wait_for, wait_to_end
from tests.slurm_runs import (
    begun,
    excluded_by_slurm,
    forked_ranks,
    job_of,
    launch_on,
    needs_slurm,
    outcomes,
    read_json_of,
    state_of,
    surviving_losses,
)

pytestmark = needs_slurm


def test_a_preempted_run_saves_goes_on_at_the_next_step_and_a_plain_scancel_saves_it_too(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus)
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    urgent = slurm.ask(
        "sbatch", "--parsable", f"--partition={sandbox.URGENT}", "--nodes=2", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    wait_for("the second attempt's steps", begun(run, 2), run)
    assert state_of(slurm, urgent) == "COMPLETED"
    assert outcomes(run) == [("preempted", "requeue")]
    first = read_json(run.attempt(1).outcome)
    steps = [event.step for _, event in read_events(run.attempt(2).events) if isinstance(event, StepEvent)]
    assert (first["saved_step"], steps[0]) == (first["last_step"], first["last_step"] + 1)
    assert [(record["job_id"], record["restart_count"]) for record in map(read_json_of, run.attempts())] == [
        (job_of(run), 0), (job_of(run), 1),
    ]  # fmt: skip

    slurm.ask("scancel", job_of(run))
    status = wait_to_end(run)
    assert (status.state, status.cause) == (State.CANCELLED, "cancelled")
    assert complete_checkpoints(run)[-1].step == status.step
    wait_for("Slurm's word", lambda: state_of(slurm, job_of(run)) == "CANCELLED", run)
    assert len(run.attempts()) == 2, "what a person cancels is not started again"


def test_a_killed_rank_and_a_dead_node_are_survived_in_the_same_allocation_with_the_very_losses(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=3, slurmd_timeout_seconds=300)
    if not slurm.own_namespaces:
        pytest.skip("a node that can really die needs root")
    options = ("checkpoint.interval_steps=4", "training.tokens=5120")  # 40 steps
    run = launch_on(tmp_path / "runs", corpus, *options, "cluster.spare_nodes=1")
    wait_for("a checkpoint", lambda: any(c.step >= 4 for c in complete_checkpoints(run)), run)
    victim = forked_ranks(slurm)[1]
    victim.send_signal(signal.SIGKILL)
    wait_for("the second attempt's checkpoint", lambda: begun(run, 2)() and _has_saved(run, 2), run)
    first = read_json(run.attempt(1).outcome)
    assert (first["cause"], first["action"]) == ("rank_killed", "restart")
    assert first["host"] in first["ranks_on"], first["message"]

    nodes = read_json(run.attempt(2).checks / "choice.json")["nodes"]
    assert nodes == ["n001", "n003"], "neighbours on a switch come first: odd nodes hang on the same one"
    killed = time.time()
    sandbox.kill_node(slurm, "n003")
    wait_for("the third attempt's steps", begun(run, 3), run)
    second = read_json(run.attempt(2).outcome)
    assert (second["cause"], second["action"], second["host"]) == ("node_failed", "restart", "n003")
    assert second["ended"] - killed < 60, "Slurm itself would have seen it after 300 s"
    assert read_json(run.attempt(3).checks / "choice.json")["nodes"] == ["n001", "n002"]
    status = wait_to_end(run)
    assert (status.state, status.step, status.attempts) == (State.FINISHED, 40, 3)
    assert len({record["job_id"] for record in map(read_json_of, run.attempts())}) == 1
    assert second["ledger"]["spare_gpu_hours"] > 0
    assert second["ledger"]["tokens_lost"] == (second["last_step"] - second["saved_step"]) * 4 * 32

    undisturbed = launch_on(tmp_path / "others", corpus, *options, "cluster=local", "cluster.ranks_per_node=2",
                            "cluster.nodes=1")  # fmt: skip
    assert wait_to_end(undisturbed).state == State.FINISHED
    assert surviving_losses(run) == surviving_losses(undisturbed)


def _has_saved(run: RunDirectory, number: int) -> bool:
    return any(checkpoint.facts.attempt == number for checkpoint in complete_checkpoints(run))


def test_a_node_that_fails_a_check_is_named_and_the_run_starts_without_it_and_is_not_given_it_again(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=4)
    site = 'cluster.checks.own={rack_power: "test $SLURMD_NODENAME != n003 || { echo PSU 2 is out; exit 1; }"}'
    options = ("cluster.spare_nodes=1", "cluster.slurm.exclude=[n004]")
    run = launch_on(tmp_path / "runs", corpus, site, *options, "training.tokens=128000")
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    choice = read_json(run.attempt(1).checks / "choice.json")
    assert choice["nodes"] == ["n001", "n002"]
    assert list(choice["dropped"]) == ["n003"]
    assert "rack_power" in choice["dropped"]["n003"] and "PSU 2 is out" in choice["dropped"]["n003"]

    slurm.ask("scancel", "--batch", "--signal=USR2", job_of(run))
    wait_for("the second attempt's steps", begun(run, 2), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["ranks_on"], outcome["excluded"]) == (["n001", "n002"], ["n003"])
    assert outcome["ledger"]["seconds"]["checking"] > 0
    assert excluded_by_slurm(slurm, run) == {"n003", "n004"}, "the user's own are still there"
    assert read_json_of(run.attempt(2))["restart_count"] == 1


def test_a_job_that_must_not_be_requeued_goes_on_in_a_successor(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus, "cluster.checks.enabled=false")
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    first = job_of(run)
    assert run.submissions()[-1]["may_requeue"] is True
    slurm.ask("scontrol", "update", f"jobid={first}", "Requeue=0")  # as a site's plugin does it
    slurm.ask("scancel", "--batch", "--signal=USR2", first)
    wait_for("the successor's steps", begun(run, 2), run)
    assert outcomes(run) == [("time_limit", "requeue")]
    before = read_json(run.attempt(1).outcome)
    assert [record["by"] for record in run.submissions()] == ["person", "supervisor"]
    assert run.submissions()[-1]["job_name"] == run.submissions()[0]["job_name"]
    assert job_of(run) != first
    assert state_of(slurm, first) == "COMPLETED"
    assert next(iter(sorted(surviving_losses(run)))) == 1
    attempt = [event.step for _, event in read_events(run.attempt(2).events) if isinstance(event, StepEvent)]
    assert attempt[0] == before["last_step"] + 1


def answer_is_lost(folder: Path, after: Sequence[str]) -> None:
    """Put before the real sbatch one that submits, does something, and gives no answer."""
    folder.mkdir()
    real = shutil.which("sbatch")
    script = folder / "sbatch"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --test-only) exec {real} "$@";; esac\n{real} "$@" > /dev/null\n{" ".join(after)}\n'
        "echo 'slurm_load: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_a_submission_whose_answer_is_lost_is_found_again_and_never_made_twice(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = start_slurm(nodes=2)
    answer_is_lost(tmp_path / "bin", [":"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = launch_on(tmp_path / "runs", corpus, "cluster.checks.enabled=false", "training.tokens=640")
    assert slurm.ask("squeue", "--noheader", "--states=all", "--format=%A").split() == [job_of(run)]
    assert wait_to_end(run).state == State.FINISHED


def test_a_submission_of_which_nobody_can_say_keeps_its_folder_and_is_settled_later(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = start_slurm(nodes=2)
    controller = psutil.Process(next(d.process for d in slurm.daemons if d.name == "slurmctld"))
    answer_is_lost(tmp_path / "bin", ["kill", "-STOP", str(controller.pid)])
    monkeypatch.setattr("orchestrator.slurm.scheduler.ANSWER_SECONDS", 3)
    with monkeypatch.context() as lost:
        lost.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        with pytest.raises(UnknownSubmissionError, match="nothing is tried twice"):
            launch_on(tmp_path / "runs", corpus, "cluster.checks.enabled=false")
    run = RunDirectory(tmp_path / "runs" / "on-slurm")
    assert read_status(run).state in (State.UNKNOWN, State.PENDING, State.RUNNING)
    controller.send_signal(signal.SIGCONT)
    wait_for("step 1", lambda: step_of(run) >= 1, run)
    with pytest.raises(RunError, match="cancel it first"):
        prepare_resume(run)
    assert len(slurm.ask("squeue", "--noheader", "--states=all", "--format=%A").split()) == 1
    assert job_of(run) != "None", "the job itself has told its number"


def test_a_job_of_an_older_submission_leaves_and_changes_nothing(trainer: object) -> None:
    run, _ = trainer.make_run()  # type: ignore[attr-defined]
    first = run.add_submission({"time": 1.0, "by": "person", "scheduler": "slurm", "job_id": "1"})
    lost = run.add_submission({"time": 2.0, "by": "person", "scheduler": "slurm", "job_id": None})
    with pytest.raises(RunError, match="does not go on in submission 1"):
        settle_submission(run, first, None)
    run.complete_submission(lost, {"is_withdrawn": True})
    with pytest.raises(RunError, match="does not go on in submission 2"):
        settle_submission(run, lost, None)
    settle_submission(run, first, None)
    assert run.add_submission({"time": 3.0, "by": "person", "scheduler": "slurm", "job_id": "3"}) == 3


def test_a_dry_run_shows_what_would_be_submitted_and_how_the_ranks_start_and_leaves_nothing(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=3)
    options = ["--nodes", "2", "--spare-nodes", "1", "--partition", "graceful", "--time", "0:20:00", "--dry-run"]
    data = [f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}"]
    shown = subprocess.run(
        [sys.executable, "-m", "orchestrator.commands.main", "launch", "demo-base", "cluster=sandbox", *SMALL, *data,
         *options],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "and 1 spare node that idle" in shown.stdout
    for line in ("--nodes=2-3", "--partition=graceful", "--time=20", "--no-kill", "--dependency=singleton"):
        assert f"#SBATCH {line}\n" in shown.stdout
    assert "srun --ntasks=2" in shown.stdout
    assert not (tmp_path / "orchestrate").exists()
    assert slurm.ask("squeue", "--noheader", "--states=all").strip() == ""


def test_all_jobs_of_a_run_have_a_name_that_no_other_run_has(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    start_slurm(nodes=2)
    runs = [launch_on(tmp_path / folder, corpus, "training.tokens=640") for folder in ("one", "other")]
    names = [submission.job_name(run) for run in runs]
    assert len(set(names)) == 2
    assert all(name.startswith("orchestrate-on-slurm-") for name in names)
    assert all("#SBATCH --dependency=singleton" in next(run.jobs.glob("*.sh")).read_text() for run in runs)
