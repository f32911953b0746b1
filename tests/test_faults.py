"""Faults of nodes, memory, storage and the supervisor itself, each caused for real on a Slurm of our own."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator import exit_codes
from orchestrator.checkpoints import MARKER, complete_checkpoints
from orchestrator.events import StepEvent, read_events
from orchestrator.files import read_json
from orchestrator.launch import cancel
from orchestrator.reconcile import State
from orchestrator.resume import prepare_resume, resume
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm import sandbox
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.scheduler import local_process, warn_of_time_limit
from tests.launched import processes_of, wait_for, wait_to_end
from tests.slurm_faults import little_memory_group
from tests.slurm_runs import (
    begun,
    excluded_by_slurm,
    forked_ranks,
    job_of,
    launch_on,
    needs_root,
    needs_slurm,
    outcomes,
    state_of,
)
from tests.test_supervisor import ranks_of

pytestmark = [needs_slurm, needs_root, pytest.mark.fault]


def steps_told(attempt: AttemptDirectory) -> list[int]:
    """Return the steps that an attempt's ranks have done."""
    return [event.step for _, event in read_events(attempt.events) if isinstance(event, StepEvent)]


def has_saved(run: RunDirectory, number: int, step: int = 1) -> Callable[[], bool]:
    """Return whether an attempt has saved a step at or after this one."""
    return lambda: any(c.facts.attempt == number and c.step >= step for c in complete_checkpoints(run))


def test_a_dead_node_is_left_behind_at_once_also_the_first_one_with_the_supervisor(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=6, slurmd_timeout_seconds=300)  # Slurm itself sees no death in this test
    run = launch_on(tmp_path / "runs", corpus, "checkpoint.interval_steps=4", "cluster.slurm.exclude=[n005]",
                    "cluster.checks.enabled=false")  # fmt: skip
    wait_for("a checkpoint", has_saved(run, 1), run)
    first = read_json(run.attempt(1).checks / "choice.json")["nodes"]
    sandbox.kill_node(slurm, first[1])
    wait_for("the second attempt's checkpoint", has_saved(run, 2), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["cause"], outcome["action"], outcome["excluded"]) == ("node_failed", "requeue", [first[1]])
    assert excluded_by_slurm(slurm, run) == {first[1], "n005"}
    second = read_json(run.attempt(2).checks / "choice.json")["nodes"]
    assert not {first[1], "n005"} & set(second)

    sandbox.kill_node(slurm, second[0])  # the supervisor dies with it
    wait_for("the third job", lambda: len(run.submissions()) == 3 and job_of(run) != "None", run)
    outcome = read_json(run.attempt(2).outcome)
    assert (outcome["cause"], outcome["action"], outcome["host"]) == ("node_failed", "requeue", second[0])
    assert outcome["saved_step"] >= 4
    assert any(second[0] in piece["text"] for piece in outcome["evidence"])
    assert [record["by"] for record in run.submissions()] == ["person", "supervisor", "supervisor"]
    assert excluded_by_slurm(slurm, run) == {first[1], second[0], "n005"}
    wait_for("the third attempt's steps", begun(run, 3), run)
    assert steps_told(run.attempt(3))[0] == outcome["saved_step"] + 1


@pytest.fixture
def little_memory() -> Iterator[Callable[[psutil.Process], None]]:
    """Leave a process a megabyte more than it has; needs root and the memory cgroup, as in CI."""
    group = little_memory_group(f"orchestrate-{os.getpid()}")

    def squeeze(process: psutil.Process) -> None:
        (group / "cgroup.procs").write_text(str(process.pid))

    yield squeeze
    psutil.wait_procs([psutil.Process(int(pid)) for pid in (group / "cgroup.procs").read_text().split()], timeout=20)
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_said_to_be_so_and_goes_on(
    start: Callable[..., RunDirectory], little_memory: Callable[[psutil.Process], None]
) -> None:
    run = start("cluster.ranks_per_node=2", "checkpoint.interval_steps=4", steps=100_000)
    wait_for("a checkpoint", has_saved(run, 1), run)
    little_memory(ranks_of(run)[1])
    wait_for("the second attempt's steps", begun(run, 2), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["cause"], outcome["action"]) == ("out_of_memory", "restart")
    assert f"rank {outcome['rank']} on " in outcome["message"]
    assert any("oom_kill" in piece["text"] for piece in outcome["evidence"])
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED


@pytest.fixture
def freezing_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """A file system of our own that can be made to stop answering, as one whose server is away; needs root."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(256 << 20)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    frozen = [False]

    def freeze(wanted: bool) -> None:
        if wanted != frozen[0]:
            subprocess.run(["fsfreeze", "-f" if wanted else "-u", str(folder)], check=True)
        frozen[0] = wanted

    yield folder, freeze
    freeze(False)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_storage_that_stops_answering_is_a_cause_of_its_own_and_the_run_goes_on_when_it_answers(
    start: Callable[..., RunDirectory], freezing_disk: tuple[Path, Callable[[bool], None]]
) -> None:
    disk, freeze = freezing_disk
    run = start(f"paths.runs={disk}", "patience.storage_seconds=4", "checkpoint.interval_steps=4", steps=100_000)
    wait_for("a checkpoint", has_saved(run, 1), run)
    ranks = ranks_of(run)
    freeze(True)
    wait_for("the ranks' end", lambda: all(map(is_told_to_die, ranks)), run)
    supervisor = local_process(run)
    assert supervisor is not None and supervisor.is_running()
    freeze(False)
    wait_for("the second attempt's steps", begun(run, 2), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["cause"], outcome["action"]) == ("storage", "restart")
    assert "has not answered for" in outcome["message"]
    assert any(piece["source"] == "storage" for piece in outcome["evidence"])
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED


def is_told_to_die(process: psutil.Process) -> bool:
    """Whether a process has ended, or will as soon as the kernel lets it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return "State:\tZ" in status or bool(int(pending, 16) >> (signal.SIGKILL - 1) & 1)


def test_a_supervisor_that_raises_is_recorded_started_again_once_and_then_stops_the_run(
    start: Callable[..., RunDirectory],
) -> None:
    run = start(steps=100_000)
    for number in (1, 2):
        wait_for(f"attempt {number}", begun(run, number), run)
        save = next(json.loads(line) for line in run.attempt(1).events.read_text().splitlines() if '"save"' in line)
        with run.attempt(number).events.open("a") as stream:  # a save whose name is none
            stream.write(json.dumps({**save, "name": 5}) + "\n")
        wait_for("its outcome", run.attempt(number).outcome.exists, run)
    status = wait_to_end(run)
    assert outcomes(run) == [("supervisor_failed", "requeue"), ("supervisor_failed", "stop")]
    assert "supervisor_failed, supervisor_failed" in status.reason
    evidence = read_json(run.attempt(1).outcome)["evidence"]
    assert any(piece["source"] == "supervisor" and "TypeError" in piece["text"] for piece in evidence)
    assert [record["by"] for record in run.submissions()] == ["person", "supervisor"]


def test_a_warning_while_ranks_start_or_save_leaves_no_half_state(start: Callable[..., RunDirectory]) -> None:
    run = start("cluster.ranks_per_node=2", "checkpoint.interval_steps=2", steps=100_000)
    wait_for("ranks that start", run.attempt(1).rendezvous.exists, run)
    warn_of_time_limit(run)
    folder = run.checkpoints_folder
    wait_for("a save under way", lambda: any(path.name.endswith(".attempt_0002") and not (path / MARKER).exists()
                                             for path in folder.iterdir()), run)  # fmt: skip
    warn_of_time_limit(run)
    wait_for("the third attempt's steps", begun(run, 3), run)
    assert outcomes(run)[:2] == [("time_limit", "requeue")] * 2
    for number in (1, 2):
        outcome = read_json(run.attempt(number).outcome)
        assert (outcome["message"], outcome["saved_step"]) == ("saved and left", outcome["last_step"])
    cancel(run)
    status = wait_to_end(run)
    assert (status.state, status.last_checkpoint_step) == (State.CANCELLED, status.step)
    steps = [step for attempt in run.attempts() for step in steps_told(attempt)]
    assert steps == list(range(1, len(steps) + 1)), "each step once"


def test_a_warning_and_a_cancellation_during_the_node_checks_start_no_rank(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus, "cluster.checks.own={slow: sleep 100}")
    wait_for("node checks", (run.attempt(1).checks / "nodes").exists, run)
    slurm.ask("scancel", "--batch", "--signal=USR2", job_of(run))
    wait_for("the second attempt's node checks", (run.attempt(2).checks / "nodes").exists, run)
    slurm.ask("scancel", job_of(run))
    status = wait_to_end(run)
    assert status.state == State.CANCELLED
    assert outcomes(run) == [("time_limit", "requeue"), ("cancelled", "stop")]
    assert not any(attempt.events.exists() or attempt.srun_log.exists() for attempt in run.attempts())
    wait_for("Slurm's word", lambda: state_of(slurm, job_of(run)) == "CANCELLED", run)


def test_a_killed_supervisor_is_named_with_slurms_record_and_the_run_is_resumed(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    start_slurm(nodes=2)
    run = launch_on(tmp_path / "runs", corpus, "checkpoint.interval_steps=4", "cluster.checks.enabled=false")
    wait_for("a checkpoint", has_saved(run, 1), run)
    (supervisor,) = [p for p in processes_of(run) if "orchestrator.slurm.supervisor" in p.cmdline()]
    supervisor.kill()
    status = wait_to_end(run)
    assert (status.state, status.cause) == (State.FAILED, "supervisor_lost")
    assert status.next_command == f"orchestrate resume {run.name}"
    resume(run, prepare_resume(run), "a test")
    wait_for("the second attempt's steps", begun(run, 2), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["cause"], outcome["action"]) == ("supervisor_lost", "stop")
    assert any("ExitCode=0:9" in piece["text"] for piece in outcome["evidence"]), outcome["evidence"]
    assert steps_told(run.attempt(2))[0] == outcome["saved_step"] + 1


def test_ranks_that_outlive_slurmd_commit_nothing_once_the_job_runs_elsewhere(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=4)
    run = launch_on(tmp_path / "runs", corpus, "checkpoint.interval_steps=4", "cluster.checks.enabled=false")
    wait_for("a checkpoint", has_saved(run, 1), run)
    first, other = read_json(run.attempt(1).checks / "choice.json")["nodes"]
    (supervisor,) = [p for p in processes_of(run) if "orchestrator.slurm.supervisor" in p.cmdline()]
    ranks = forked_ranks(slurm)
    supervisor.suspend()  # nobody tells its ranks to end
    for node in (first, other):
        sandbox.kill_slurmd(slurm, node)
    slurm.ask("scontrol", "requeue", job_of(run))
    wait_for("the second attempt's checkpoint", has_saved(run, 2), run)
    wait_for("the old ranks' end", lambda: not any(map(is_alive, ranks)), run)
    assert read_json(run.attempt(1).rank_failure(0))["exit_code"] == exit_codes.SUPERSEDED
    supervisor.resume()
    wait_for("the old supervisor's end", lambda: not is_alive(supervisor), run)
    outcome = read_json(run.attempt(1).outcome)
    assert (outcome["cause"], outcome["host"], outcome["action"]) == ("node_failed", first, "requeue")
    begun_at = read_json(run.attempt(2).job)["started"]
    late = [c.name for c in complete_checkpoints(run) if c.facts.attempt == 1 and c.facts.written > begun_at]
    assert not late and len(steps_told(run.attempt(1))) > outcome["saved_step"], "they trained on, and nothing counts"
    assert steps_told(run.attempt(2))[0] == outcome["saved_step"] + 1


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_stopped_rank_a_preemption_with_grace_and_an_administrators_requeue_have_each_its_cause(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=2)
    options = ("cluster.partition=graceful", "cluster.checks.enabled=false", "checkpoint.interval_steps=4")
    # A rank that waits after a save gives the others the time of theirs.
    run = launch_on(tmp_path / "runs", corpus, *options, "patience.step_seconds=10", "patience.save_seconds=10")
    wait_for("a checkpoint", has_saved(run, 1), run)
    forked_ranks(slurm)[1].suspend()
    wait_for("the second attempt's steps", begun(run, 2), run)
    hung = read_json(run.attempt(1).outcome)
    assert (hung["cause"], hung["action"], hung["host"]) == ("hang", "restart", hung["ranks_on"][hung["rank"]])
    assert "told nothing while 1 rank waited" in hung["message"]

    slurm.ask("sbatch", f"--partition={sandbox.URGENT}", "--nodes=2", "--exclusive", "--output=/dev/null",
              "--wrap", "sleep 1")  # fmt: skip
    wait_for("the third attempt's steps", begun(run, 3), run)
    slurm.ask("scontrol", "requeue", job_of(run))
    wait_for("the fourth attempt's steps", begun(run, 4), run)
    assert outcomes(run)[1:] == [("preempted", "requeue")] * 2
    for number in (2, 3):
        outcome = read_json(run.attempt(number).outcome)
        assert outcome["saved_step"] == outcome["last_step"], "all that was done is saved"
        assert steps_told(run.attempt(number + 1))[0] == outcome["last_step"] + 1
        assert any("taken for preempted" in piece["text"] for piece in outcome["evidence"])
    assert [read_json(run.attempt(number).job)["restart_count"] for number in (1, 2, 3, 4)] == [0, 0, 1, 2]
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED
    wait_for("Slurm's word", lambda: state_of(slurm, job_of(run)) == "CANCELLED", run)
