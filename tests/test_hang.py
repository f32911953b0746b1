"""Ranks that hang, for real: each notices, says where it stood and who waited, and the run goes on.

A FIFO in place of a file blocks who opens it; SIGSTOP makes a rank that tells nothing.
"""

import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import exit_codes
from orchestrator.checkpoints import checkpoint_name, complete_checkpoints, part_record
from orchestrator.events import StepEvent, read_events
from orchestrator.files import read_json, write_json
from orchestrator.plan import write_plan
from orchestrator.reconcile import State
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from tests.conftest import REPOSITORY, Trainer, losses
from tests.launched import step_of, wait_for, wait_to_end
from tests.test_supervisor import ranks_of

STEPS = 120
TWO_RANKS = ("cluster.ranks_per_node=2", "checkpoint.interval_steps=40")
PATIENCE = ("patience.step_seconds=6", "patience.save_seconds=6", "patience.validation_seconds=6")


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> list[float]:
    run, plan = trainer.make_run(*TWO_RANKS, steps=STEPS)
    return losses(trainer.train(run, plan))


def surviving_losses(run: RunDirectory) -> list[float]:
    """Return the loss of each step as the last attempt that did it recorded it."""
    steps = {e.step: e.loss for a in run.attempts() for _, e in read_events(a.events) if isinstance(e, StepEvent)}
    return [steps[step] for step in sorted(steps)]


def record_of(attempt: AttemptDirectory, rank: int) -> dict[str, Any]:
    record = read_json(attempt.rank_failure(rank))
    assert isinstance(record, dict)
    return record


def outcome_of(attempt: AttemptDirectory) -> dict[str, Any]:
    outcome = attempt.read_outcome()
    assert outcome is not None
    return outcome


def stacks_of(attempt: AttemptDirectory, rank: int) -> str:
    """Return the stacks that a rank's record names; several threads, the blocked one among them."""
    text = (attempt.path / record_of(attempt, rank)["stands"]["stacks"]).read_text()
    assert len(re.findall(r"^(?:Current thread|Thread) 0x", text, re.MULTILINE)) >= 2
    return text


@pytest.mark.fault
def test_a_rank_that_hangs_in_a_step_is_named_with_its_place_and_the_run_ends_as_if_undisturbed(
    start: Callable[..., RunDirectory], undisturbed: list[float]
) -> None:
    run = start(*TWO_RANKS, *PATIENCE, steps=STEPS)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    first = run.attempts()[0]
    os.mkfifo(first.stop_request)  # rank 0 reads it before each step
    wait_for("the second attempt", lambda: len(run.attempts()) == 2, run)

    outcome, culprit, victim = outcome_of(first), record_of(first, 0), record_of(first, 1)
    assert (outcome["cause"], outcome["action"], outcome["rank"]) == ("hang", "restart", 0)
    assert re.search(
        r"rank 0 on \S+ stood for \d+ s in a step after step \d+: files.py:\d+ in read_json", outcome["message"]
    )
    assert outcome["message"].endswith("; 1 rank waited for it")
    assert (culprit["exit_code"], victim["exit_code"]) == (exit_codes.HANG, exit_codes.HANG)
    assert (culprit["stands"]["phase"], victim["stands"]["phase"]) == ("step", "step")
    assert (culprit["stands"]["waits_for_others"], victim["stands"]["waits_for_others"]) == (False, True)
    assert culprit["stands"]["seconds"] >= 6
    assert " in read_json" in stacks_of(first, 0) and " in agree" in stacks_of(first, 0)
    assert " in all_reduce" in stacks_of(first, 1)
    flight = pickle.loads((first.path / victim["stands"]["flight_record"]).read_bytes())
    assert flight["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    assert wait_to_end(run).state == State.FINISHED
    assert surviving_losses(run) == undisturbed


@pytest.mark.fault
def test_a_rank_that_hangs_in_a_save_is_named_though_training_went_on(
    start: Callable[..., RunDirectory], undisturbed: list[float]
) -> None:
    run = start(*TWO_RANKS, *PATIENCE, steps=STEPS)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    folder = run.checkpoint_path(checkpoint_name(40, 1))
    folder.mkdir()
    for process in ranks_of(run):  # one of them is rank 1
        os.mkfifo(folder / f".{part_record(1)}.{socket.gethostname()}.{process.pid}.tmp")
    wait_for("the second attempt", lambda: len(run.attempts()) == 2, run)

    first = run.attempts()[0]
    outcome, culprit = outcome_of(first), record_of(first, 1)
    assert (outcome["cause"], outcome["action"], outcome["rank"]) == ("hang", "restart", 1)
    assert re.search(
        r"rank 1 on \S+ stood for \d+ s in a save \(step 40\): files.py:\d+ in write_atomic", outcome["message"]
    )
    assert (culprit["stands"]["phase"], culprit["stands"]["waits_for_others"]) == ("save", False)
    assert " in write_part" in stacks_of(first, 1)
    assert outcome["last_step"] > 40  # the save ran beside training
    assert outcome["saved_step"] == 0
    assert wait_to_end(run).state == State.FINISHED
    assert surviving_losses(run) == undisturbed


@pytest.mark.fault
def test_a_rank_that_hangs_before_the_first_step_is_told_from_the_one_that_waits_for_it(
    start: Callable[..., RunDirectory],
) -> None:
    run = start(*TWO_RANKS, "patience.start_seconds=20", steps=5)
    index = run.data_index / "train" / "complete.json"  # rank 0 reads it
    index.parent.mkdir(parents=True)
    os.mkfifo(index)
    wait_for("the hang", lambda: bool(run.attempts()) and run.attempts()[0].rank_failure(0).exists(), run)
    index.unlink()
    wait_for("the second attempt", lambda: len(run.attempts()) == 2, run)

    first = run.attempts()[0]
    outcome, culprit = outcome_of(first), record_of(first, 0)
    assert (outcome["cause"], outcome["action"], outcome["rank"]) == ("hang", "restart", 0)
    assert re.search(r"stood for \d+ s in its start: ", outcome["message"])
    assert (culprit["step"], culprit["stands"]["phase"]) == (None, "start")
    assert record_of(first, 1)["stands"]["waits_for_others"]
    assert " in open_samples" in stacks_of(first, 0)
    assert wait_to_end(run).state == State.FINISHED


@pytest.mark.fault
def test_a_stopped_rank_that_tells_nothing_is_named_by_those_that_waited(start: Callable[..., RunDirectory]) -> None:
    # With pipelines the other waits in a call of megatron's, not of torch.distributed.
    run = start(*TWO_RANKS, *PATIENCE, "layout.pipeline_parallel=2", steps=60)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    ranks_of(run)[1].suspend()
    wait_for("the second attempt", lambda: len(run.attempts()) == 2, run)

    first = run.attempts()[0]
    (told,) = first.failures.iterdir()
    outcome = outcome_of(first)
    silent = 1 - read_json(told)["rank"]
    assert (outcome["cause"], outcome["action"], outcome["rank"]) == ("hang", "restart", silent)
    assert re.search(rf"rank {silent} on \S+ told nothing while 1 rank waited for \d+ s in a step", outcome["message"])
    assert wait_to_end(run).state == State.FINISHED


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited 120 s for {what}"
        time.sleep(0.05)


@pytest.mark.parametrize("layout", ["layout.pipeline_parallel=2", "layout.tensor_parallel=2"])
def test_a_run_within_its_limits_is_left_alone(trainer: Trainer, layout: str) -> None:
    often = ("checkpoint.interval_steps=5", "training.validation_interval_steps=5")
    run, plan = trainer.make_run("cluster.ranks_per_node=2", layout, *often, *PATIENCE, steps=40)
    attempt = trainer.train(run, plan)
    assert complete_checkpoints(run)[-1].step == 40
    assert not list(attempt.failures.iterdir()) and not attempt.stacks.exists()


def test_a_job_that_was_suspended_does_not_count_as_hung(trainer: Trainer) -> None:
    run, plan = trainer.make_run("cluster.ranks_per_node=2", *PATIENCE, steps=100_000)
    attempt, ranks = trainer.start(run, plan)
    wait_until("step 3", lambda: step_of(run) >= 3)
    assert trainer._preload is not None
    processes = psutil.Process(trainer._preload._process.pid).children()
    for process in processes:
        process.suspend()
    before = step_of(run)
    time.sleep(13)  # how long it is suspended: more than the limit
    for process in processes:
        process.resume()
    wait_until("more steps", lambda: step_of(run) > before + 5)
    write_json(attempt.stop_request, {"reason": "stopped"})
    assert trainer.wait(run, attempt, ranks) == [exit_codes.SAVED_AND_LEFT] * 2
    assert not list(attempt.failures.iterdir())


def test_the_ranks_of_an_attempt_that_was_given_up_leave_when_a_newer_one_was_started(trainer: Trainer) -> None:
    run, plan = trainer.make_run("cluster.ranks_per_node=2", steps=100_000)
    attempt, ranks = trainer.start(run, plan)
    wait_until("step 3", lambda: step_of(run) >= 3)
    run.new_attempt()
    codes = [process.wait(timeout=60) for process in ranks._processes.values()]
    assert codes == [exit_codes.SUPERSEDED, exit_codes.EXCEPTION]
    record = record_of(attempt, 0)
    assert (record["exit_code"], record["error"]) == (exit_codes.SUPERSEDED, "Superseded")
    assert "attempt 2 was started" in record["message"]


WATCHED = """
import sys, time, ctypes
from pathlib import Path
from megatron_solar.hang_watch import HangWatch, Phase
from megatron_solar.stacks import waits_for_others
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import PatienceSettings

@waits_for_others
def wait_for_others(seconds):
    time.sleep(seconds)

def hold_the_lock_of_python():
    ctypes.PyDLL(None).sleep(600)

patience = PatienceSettings(start_seconds=60, step_seconds=0.5, save_seconds=60, validation_seconds=60)
run = RunDirectory(Path(sys.argv[1]))
watch = HangWatch(run, run.attempt(1), 1, patience, began=time.monotonic())
watch.enter(Phase.STEP, 1)
watch.enter(Phase.STEP, 2)
watch.start()
"""


def start_watched(folder: Path, last_lines: str) -> "subprocess.Popen[bytes]":
    """Start a process that is watched as a rank is, with half a second for a step."""
    RunDirectory(folder).new_attempt()
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", WATCHED + last_lines, str(folder)], cwd=REPOSITORY, stdout=log, stderr=log
        )


def test_a_rank_in_native_code_that_holds_pythons_lock_leaves_its_stacks_in_its_log(tmp_path: Path) -> None:
    process = start_watched(tmp_path, "hold_the_lock_of_python()")
    log = tmp_path / "log"
    wait_until("the stacks", lambda: " in <module>" in log.read_text())
    assert "Timeout (" in log.read_text() and "in hold_the_lock_of_python" in log.read_text()
    assert process.poll() is None  # it can't end itself; the supervisor does
    process.kill()
    process.wait()


def test_a_rank_that_waits_after_a_save_gives_others_the_time_of_theirs(tmp_path: Path) -> None:
    process = start_watched(tmp_path, "watch.enter(Phase.SAVE, 2)\nwatch.enter(Phase.STEP, 2)\nwait_for_others(4)")
    assert process.wait(timeout=120) == 0


@pytest.mark.parametrize(
    ("last_lines", "waits"),
    [
        ("wait_for_others(600)", True),
        ("time.sleep(600)", False),
        ("watch.enter(Phase.SAVE, 2)\nwatch.enter(Phase.STEP, 2)\ntime.sleep(600)", False),
    ],
)  # fmt: skip
def test_a_rank_that_is_late_ends_itself_and_says_whether_it_waited(
    tmp_path: Path, last_lines: str, waits: bool
) -> None:
    assert start_watched(tmp_path, last_lines).wait(timeout=120) == exit_codes.HANG
    stands = record_of(RunDirectory(tmp_path).attempt(1), 1)["stands"]
    assert (stands["phase"], stands["waits_for_others"], stands["flight_record"]) == ("step", waits, None)


def test_a_disk_that_does_not_take_the_record_does_not_keep_a_hung_rank(tmp_path: Path) -> None:
    (tmp_path / "attempts" / "0001" / "stacks").mkdir(parents=True)
    os.mkfifo(tmp_path / "attempts" / "0001" / "stacks" / "rank_0001.txt")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED + "time.sleep(600)", str(tmp_path)], cwd=REPOSITORY, stderr=log
        )
    assert process.wait(timeout=120) == exit_codes.HANG


def test_a_model_that_does_not_fit_into_memory_says_what_needs_less(trainer: Trainer) -> None:
    run, plan = trainer.make_run("model.ffn_hidden_size=40000000")  # one matrix of 10 GB
    attempt = run.new_attempt()
    write_plan(attempt.plan, plan)
    words = [sys.executable, "-m", "megatron_solar.worker", str(run.path), "1", "--rank", "0", "--local-rank", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    limited = ["prlimit", f"--as={8 << 30}", *words]
    with attempt.rank_log(0).open("wb") as log:
        code = subprocess.run(limited, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, timeout=120).returncode
    assert code == exit_codes.OUT_OF_MEMORY, attempt.rank_log(0).read_text()
    assert "layout.micro_batch_size" in record_of(attempt, 0)["message"]
    assert "can't allocate memory" in record_of(attempt, 0)["message"]
