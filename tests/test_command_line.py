"""The command line as a stranger uses it: real processes, exit codes, and one clear error for bad input."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solar.model_folder import expected_tensors
from megatron_solar.model_writer import write_model_folder
from orchestrator.config import compose, to_yaml
from orchestrator.events import StepEvent, event_record
from orchestrator.files import JsonLines, write_atomic, write_json
from orchestrator.plan import make_plan, write_plan
from orchestrator.run_directory import RunDirectory, create_run
from tests.checkpoint_records import write_checkpoint
from tests.conftest import REPOSITORY, SMALL

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def work(home: Path) -> Path:
    """The working folder of the processes."""
    folder = home / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def orchestrate(home: Path, work: Path) -> Command:
    """Run a command in the working folder."""

    def run(*arguments: str, path: str | None = None, text: str = "") -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"}
        if path is not None:
            environment["PATH"] = path
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.commands.main", *arguments],
            cwd=work, env=environment, input=text, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture
def runs(home: Path) -> Path:
    """The folder of all runs; not made."""
    return home / "orchestrate" / "runs"


def refused(result: "subprocess.CompletedProcess[str]", code: int, *messages: str) -> None:
    """Check that a command ended with a code and one error that says all of these, without a traceback."""
    assert result.returncode == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert len(errors) == 1, result.stderr
    for message in messages:
        assert message in result.stderr


def submission(**facts: object) -> dict[str, object]:
    """Return a job's record as `submit` writes it."""
    return {"time": time.time(), "scheduler": "local", "host": socket.gethostname(), "by": "person", **facts}


def make_run(runs: Path, name: str = "a-run", *overrides: str, ended: str | None = None) -> RunDirectory:
    """Make a run's folder as `launch` and a supervisor leave it; nothing of it lives.

    Args:
        ended: the action of its one attempt's outcome; no attempt without.
    """
    settings = compose("demo-base", [*SMALL, "training.tokens=1280", f"name={name}", f"paths.runs={runs}", *overrides])
    run = create_run(runs, name)
    write_atomic(run.config, to_yaml(settings))
    write_plan(run.launched_plan, make_plan(settings))
    scheduler = settings.cluster.scheduler
    # Process 1 was not created then, so that this is a job that is gone.
    run.add_submission(submission(scheduler=scheduler, time=time.time() - 60, job_id="1", process_created=1.0))
    if ended is not None:
        attempt = run.new_attempt()
        cause = {"finish": "finished", "stop": "exception", "requeue": "time_limit"}[ended]
        attempt.rank_log(0).write_text("what rank 0 wrote\n")
        write_json(
            attempt.outcome,
            {"attempt": 1, "cause": cause, "message": "rank 0: boom", "rank": 0, "host": "here", "first_step": 1,
             "last_step": 4, "saved_step": 0, "started": time.time() - 50, "ended": time.time() - 40, "submissions": 1,
             "exit_codes": {},
             "action": ended, "why": "because"},
        )  # fmt: skip
    return run


def make_base(path: Path, recipe: str = "demo-base", *overrides: str) -> Path:
    """Write a base of a recipe's shape, all zeros."""
    shape = compose(recipe, overrides).model
    tensors = ((name, torch.zeros(size)) for name, size in expected_tensors(shape).items())
    write_model_folder(path, shape, tensors, dtype=torch.float32)
    return path


# What does not exist.


def test_a_misspelt_command_is_answered_with_the_nearest(orchestrate: Command) -> None:
    refused(orchestrate("lanch"), 2, "no command 'lanch'; did you mean launch?")


def test_a_misspelt_option_is_answered_with_the_nearest(orchestrate: Command) -> None:
    refused(orchestrate("status", "--jsn"), 2, "--json")


def test_a_misspelt_key_is_a_usage_error_with_the_whole_key(orchestrate: Command, runs: Path) -> None:
    result = orchestrate("launch", "demo-base", "trainig.tokens=5", "layout.micro_batch_size=x")
    refused(result, 2, "did you mean training.tokens?", "layout.micro_batch_size should be a whole number, found 'x'")
    assert not runs.exists()


def test_an_unknown_recipe_is_answered_with_the_nearest(orchestrate: Command) -> None:
    refused(orchestrate("plan", "dmeo"), 2, "no recipe named 'dmeo'", "did you mean demo?")


def test_sizes_that_do_not_divide_are_answered_with_those_that_would(orchestrate: Command, runs: Path) -> None:
    refused(orchestrate("launch", "layout.tensor_parallel=16"), 2, "use tensor_parallel 1, 2, 4 or 8")
    refused(orchestrate("launch", "demo-base", "layout.global_batch_size=9"), 2, "use global_batch_size 8 or 16")
    assert not runs.exists()


@pytest.mark.parametrize("verb", ["status", "why", "logs", "cancel", "resume", "export"])
def test_an_unknown_run_is_answered_with_the_nearest(orchestrate: Command, runs: Path, verb: str) -> None:
    make_run(runs, "something")
    output = ["--output", "out"] if verb == "export" else []
    refused(orchestrate(verb, "nothign", *output), 1, "no run named 'nothign'", "did you mean something?")


def test_the_status_of_nothing_is_an_empty_list(orchestrate: Command) -> None:
    result = orchestrate("status")
    assert result.returncode == 0
    assert "no runs in" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: orchestrate demo"
    assert json.loads(orchestrate("status", "--json").stdout) == []
    refused(orchestrate("status", "last"), 1, "start one with `orchestrate launch`")


# What cannot start.


def test_every_missing_input_is_told_at_once(orchestrate: Command, runs: Path, work: Path) -> None:
    folders = (f"{work}/data/train", f"{work}/data/validation", f"{work}/upscaled")
    refused(orchestrate("launch", "demo"), 2, "3 to mend", *folders, "orchestrate tokenize", "Hugging Face")
    assert not runs.exists()


@pytest.mark.parametrize(
    "fault", ["no weights", "another architecture", "another shape", "another tokenizer", "a small vocabulary"]
)
def test_a_base_or_data_that_do_not_fit_are_refused(
    orchestrate: Command, runs: Path, work: Path, corpus: Path, fault: str
) -> None:
    base = make_base(work / "base")
    overrides, message = ["base=base"], ""
    if fault == "no weights":
        (base / "model.safetensors").unlink()
        message = "model.safetensors"
    elif fault == "another architecture":
        config = json.loads((base / "config.json").read_text())
        write_json(base / "config.json", {**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
        message = "gpt2"
    elif fault == "another shape":
        overrides.append("model.num_layers=4")
        message = "model.num_layers: the base has 8, the settings say 4"
    elif fault == "another tokenizer":
        (base / "tokenizer.model").write_bytes(b"of other ids")
        overrides.append("data.validation=[]")
        message = "was made with another tokenizer"
    else:
        overrides = ["base=random", "model.vocab_size=1000", "data.validation=[]"]
        message = "was made with 32000 ids, the model knows 1000"
    data = [f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}"]
    refused(orchestrate("launch", "demo-base", *data, *overrides), 2, "1 to mend", message)
    assert not runs.exists()


def test_a_run_name_that_is_taken_is_refused_and_the_run_left_as_it_was(
    orchestrate: Command, runs: Path, corpus: Path
) -> None:
    run = make_run(runs, "demo-base")
    before = sorted(path.relative_to(runs) for path in runs.rglob("*"))
    result = orchestrate("launch", "demo-base", f"data.train={corpus / 'train'}", "data.validation=[]")
    refused(result, 1, "run 'demo-base' exists already", f"orchestrate status {run.name}")
    assert sorted(path.relative_to(runs) for path in runs.rglob("*")) == before


@pytest.mark.parametrize(("path", "options"), [("/nowhere", ("--yes",)), ("", ("--dry-run",)), (None, ())])
def test_slurm_without_sbatch_is_an_unreachable_cluster(
    orchestrate: Command, runs: Path, path: str | None, options: tuple[str, ...]
) -> None:
    if path is None and shutil.which("sbatch"):
        path = "/nowhere"
    refused(orchestrate("launch", *options, path=path), 3, "there is no `sbatch` on this machine")
    assert not runs.exists()


def test_a_resume_without_sbatch_is_an_unreachable_cluster(orchestrate: Command, runs: Path) -> None:
    slurm = ("cluster=h100", "layout.global_batch_size=2048", "training.tokens=65536")
    run = make_run(runs, "a-run", *slurm, ended="stop")
    run.write_cancel_mark()
    refused(orchestrate("resume", "--yes", path="/nowhere"), 3, "there is no `sbatch` on this machine")
    assert run.cancel_mark.exists()


def test_gpu_hours_are_not_spent_without_a_yes(orchestrate: Command, runs: Path, work: Path, corpus: Path) -> None:
    # A cluster of one CPU that says it has a GPU: the question is the same, and nobody answers or says no.
    data = (f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}")
    for answer in ("", "n\n"):
        refused(
            orchestrate("launch", "demo-base", *data, "cluster.device=cuda", text=answer),
            1,
            "--yes",
            "nothing was started",
        )
    make_run(runs, "a-run", "cluster.device=cuda", *data, ended="stop")
    refused(orchestrate("resume", "a-run"), 1, "--yes", "nothing was started")


def test_a_dry_run_checks_everything_and_starts_nothing(orchestrate: Command, runs: Path, corpus: Path) -> None:
    overrides = (f"data.train={corpus / 'train'}", f"data.validation=[{corpus / 'validation'}]")
    result = orchestrate("launch", "demo-base", "--dry-run", *overrides)
    assert result.returncode == 0, result.stderr
    assert "128 for 131 k tokens" in result.stdout
    assert "data set" in result.stdout
    assert not runs.exists()
    # The last line can be pasted: what a shell would read as a pattern is quoted.
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next: orchestrate launch demo-base data.train=")
    assert last.endswith(f" 'data.validation=[{corpus / 'validation'}]'")


def test_a_runs_folder_that_cannot_be_made_is_one_error(orchestrate: Command, home: Path, corpus: Path) -> None:
    (home / "file").write_text("")
    data = (f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}")
    result = orchestrate("launch", "demo-base", *data, f"paths.runs={home / 'file'}")
    refused(
        result, 2, f"paths.runs={home / 'file'} should be a folder to write to", "set paths.runs to a folder of yours"
    )


# Runs in the wrong state.


def test_a_finished_run_is_neither_cancelled_nor_resumed(orchestrate: Command, runs: Path) -> None:
    make_run(runs, ended="finish")
    refused(orchestrate("cancel", "a-run"), 1, "has ended already: FINISHED")
    refused(orchestrate("resume", "a-run"), 1, "orchestrate export a-run --output DIR")


def test_a_run_whose_job_is_gone_cannot_be_cancelled(orchestrate: Command, runs: Path) -> None:
    run = make_run(runs)
    refused(orchestrate("cancel"), 1, "has ended already: FAILED")
    assert not run.cancel_mark.exists()


def test_a_living_run_is_not_resumed(orchestrate: Command, runs: Path) -> None:
    import psutil

    run = make_run(runs)
    own = psutil.Process()  # a job that lives: this very process
    run.add_submission(submission(job_id=str(own.pid), process_created=own.create_time()))
    refused(orchestrate("resume"), 1, "run a-run is PENDING", "cancel it first")
    assert json.loads(orchestrate("status", "--json", "a-run").stdout)["state"] == "PENDING"


def test_a_local_run_of_another_host_is_unknown_here_and_cannot_be_cancelled(orchestrate: Command, runs: Path) -> None:
    run = make_run(runs)
    run.add_submission(submission(job_id="1", process_created=1.0, host="elsewhere"))
    assert json.loads(orchestrate("status", "--json", "a-run").stdout)["state"] == "UNKNOWN"
    refused(orchestrate("cancel"), 3, "runs on elsewhere; cancel it there")


def test_a_run_without_a_checkpoint_is_not_exported(orchestrate: Command, runs: Path, work: Path) -> None:
    make_run(runs, ended="stop")
    refused(orchestrate("export", "--output", "out"), 1, "run a-run has no complete checkpoint")
    refused(orchestrate("export", "last@20", "--output", "out"), 1, "run a-run has no complete checkpoint")
    refused(orchestrate("export", "last@x", "--output", "out"), 2, "should read RUN or RUN@STEP")
    refused(orchestrate("export", "last@", "--output", "out"), 2, "should read RUN or RUN@STEP")
    refused(orchestrate("export"), 2, "--output")
    assert list(work.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(orchestrate: Command, runs: Path, work: Path) -> None:
    run = make_run(runs, ended="stop")
    checkpoint = write_checkpoint(run, 4)
    (checkpoint.path / "rank_0001.safetensors").write_bytes(b"short")
    refused(orchestrate("export", "--output", "out"), 1, "rank_0001.safetensors should have")
    assert list(work.iterdir()) == []


def test_logs_that_are_not_there_are_refused(orchestrate: Command, runs: Path) -> None:
    make_run(runs, "new")
    refused(orchestrate("logs", "new"), 1, "has no attempt yet", "--supervisor")
    refused(orchestrate("logs", "new", "--supervisor"), 1, "has written nothing yet")
    refused(orchestrate("logs", "new", "--follow"), 1, "has no attempt yet")  # its job is gone: nothing to wait for
    make_run(runs, "old", ended="stop")
    refused(orchestrate("logs", "old", "--attempt", "2"), 1, "has 1 attempt, there is no attempt 2")
    refused(orchestrate("logs", "old", "--rank", "7"), 1, "has no rank 7")
    assert orchestrate("logs", "old", "--rank", "0").stdout == "what rank 0 wrote\n"


def test_following_a_run_that_ended_ends_and_says_how(orchestrate: Command, runs: Path) -> None:
    run = make_run(runs, ended="stop")
    write_json(
        run.attempt(1).rank_failure(0),
        {"rank": 0, "host": "here", "step": None, "time": 1.0, "traceback": "Boom: the trace of rank 0"},
    )
    result = orchestrate("logs", "--follow")
    assert result.returncode == 0, result.stderr
    assert "rank 0 on here failed first, before the first step:\nBoom: the trace of rank 0" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAILED: rank 0: boom")


# What programs read.


def test_the_status_is_json_with_the_promised_keys(orchestrate: Command, runs: Path) -> None:
    make_run(runs, "one", ended="finish")
    make_run(runs, "two", ended="stop")
    make_run(runs, "three")
    many = json.loads(orchestrate("status", "--json").stdout)
    states = {status["name"]: (status["state"], status["attempts"], status["total_steps"]) for status in many}
    assert states == {"one": ("FINISHED", 1, 10), "two": ("FAILED", 1, 10), "three": ("FAILED", 0, 10)}
    one = json.loads(orchestrate("status", "one", "--json").stdout)
    assert {"name", "state", "step", "total_steps", "attempts"} <= one.keys()
    assert one["path"] == str(runs / "one")


def test_a_damaged_run_does_not_hide_the_others(orchestrate: Command, runs: Path) -> None:
    make_run(runs, "good", ended="finish")
    make_run(runs, "bad").plan.write_text("{")
    result = orchestrate("status", "--json")
    assert [status["name"] for status in json.loads(result.stdout)] == ["good"]
    assert "bad is left out" in result.stderr
    refused(orchestrate("status", "bad"), 1, "plan.json should hold JSON")


def test_the_plan_is_json(orchestrate: Command) -> None:
    plan = json.loads(orchestrate("plan", "--nodes", "16", "--json").stdout)
    assert plan["parameters"] == 10_731_524_096
    assert plan["layout"]["data_parallel"] == 64
    assert plan["settings"]["cluster"]["nodes"] == 16


def test_the_recipe_may_stand_behind_its_overrides(orchestrate: Command) -> None:
    plan = json.loads(orchestrate("plan", "name=mine", "demo-base", "--json").stdout)
    assert (plan["settings"]["name"], plan["parameters"]) == ("mine", 6_956_640)
    refused(orchestrate("plan", "demo", "demo-base"), 2, "override 'demo-base' should read section.field=value")


def test_a_plan_fits_the_terminal_and_names_the_next_command(orchestrate: Command, work: Path) -> None:
    lines = orchestrate("plan", "data.train=[a,b]", "tracking.experiment=a b").stdout.splitlines()
    assert max(len(line) for line in lines[:-1] if str(work.parent) not in line) <= 100, "paths are as long as they are"
    assert lines[-1] == "next: orchestrate launch 'data.train=[a,b]' 'tracking.experiment=a b'"
    assert any("GPU hours" in line for line in lines)


def test_a_run_outside_the_runs_folder_is_named_by_its_path(orchestrate: Command, home: Path) -> None:
    run = make_run(home / "elsewhere", ended="stop")
    result = orchestrate("status", str(run.path))
    assert result.returncode == 0, result.stderr
    assert "FAILED" in result.stdout
    refused(orchestrate("status", "a-run"), 1, "no run named 'a-run'")


def test_help_names_every_command(orchestrate: Command) -> None:
    from orchestrator.commands.main import COMMANDS

    result = orchestrate("--help")
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert orchestrate("--version").stdout.startswith("orchestrate, version ")
    bare = orchestrate()
    assert bare.returncode == 2
    assert "Usage: orchestrate" in bare.stderr + bare.stdout


def test_output_that_nobody_reads_on_is_no_error(home: Path, work: Path) -> None:
    command = f"{sys.executable} -m orchestrator.commands.main plan | true"
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        ["/bin/sh", "-c", command], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""


def test_an_attempt_whose_supervisor_was_lost_is_told_from_its_events(orchestrate: Command, runs: Path) -> None:
    run = make_run(runs)
    attempt = run.new_attempt()
    job = {"job_id": "1", "nodes": "here", "started": 100.0, "process": 1, "process_created": 1.0, "submissions": 1}
    write_json(attempt.job, job)
    lines = JsonLines(attempt.events)
    for step in (1, 2):
        lines.append(event_record(make_step(step=step, time=100.0 + 10 * step)))
    lines.close()
    status = json.loads(orchestrate("status", "--json", "a-run").stdout)
    (lost,) = status["attempt_list"]
    assert status["state"] == "FAILED"
    assert (lost["cause"], lost["first_step"], lost["last_step"], lost["ended"]) == ("supervisor_lost", 1, 2, 120.0)


def make_step(*, step: int, time: float) -> StepEvent:
    """Return a step's event; only its number and time are looked at."""
    numbers: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(StepEvent)}
    return StepEvent(**{**numbers, "step": step, "time": time})
