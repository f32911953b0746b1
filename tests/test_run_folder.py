"""Launched runs whose folder is the truth: one supervisor, a full disk, an edited checkout, resumes and branches."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import MARKER, checkpoint_name, choose_checkpoint, complete_checkpoints, damage
from orchestrator.config import recompose
from orchestrator.errors import CheckpointError, ConfigError, RunError
from orchestrator.events import RepeatEvent, StepEvent, read_events
from orchestrator.files import read_json, write_json
from orchestrator.launch import BranchPoint, cancel, check_disk, launch
from orchestrator.plan import make_plan, read_plan
from orchestrator.reconcile import State
from orchestrator.resume import notes_on, prepare_resume, resume
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.scheduler import local_process
from orchestrator.status import read_status
from tests.conftest import REPOSITORY, relative_difference
from tests.launched import processes_of, step_of, wait_for, wait_to_end

Start = Callable[..., RunDirectory]


def supervisor(run: RunDirectory) -> "subprocess.CompletedProcess[str]":
    """Start a supervisor by hand, as a second job would."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.slurm.supervisor", str(run.path), "1"],
        env={**os.environ, "PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def losses_of(run: RunDirectory) -> dict[int, float]:
    """Return the loss of each step as the newest attempt that did it recorded it."""
    events = [e for a in run.attempts() for _, e in read_events(a.events) if isinstance(e, StepEvent)]
    return {event.step: event.loss for event in events}


def client_of(supervisor: psutil.Process) -> psutil.Process:
    """Return the process that stands for a rank; where it dies, its rank does."""
    children = supervisor.children(recursive=True)
    return next(child for child in children if any("rank_client" in word for word in child.cmdline()))


def gone(run: RunDirectory) -> bool:
    return local_process(run) is None and not processes_of(run)


# Two supervisors.


def test_a_second_supervisor_on_a_folder_says_who_has_it_and_leaves(start: Start) -> None:
    run = start(steps=3000)
    wait_for("step 3", lambda: step_of(run) >= 3, run)
    second = supervisor(run)
    assert second.returncode == 1
    first = local_process(run)
    assert first is not None
    assert f"run {run.name} has a supervisor, process {first.pid} on " in second.stderr
    assert len(run.attempts()) == 1
    before = step_of(run)
    wait_for("more steps of the first", lambda: step_of(run) > before, run)
    cancel(run)
    assert wait_to_end(run).state == State.CANCELLED
    wait_for("an empty machine", lambda: gone(run), run)
    assert not run.supervisor_lock.exists()


def test_a_supervisor_whose_run_was_taken_over_ends_its_ranks_and_marks_nothing_more(start: Start) -> None:
    run = start("checkpoint.interval_steps=2", steps=100_000)
    wait_for("a checkpoint", lambda: bool(complete_checkpoints(run)), run)
    record = read_json(run.supervisor_lock)
    write_json(run.supervisor_lock, {**record, "host": "another-node", "token": "another"})
    wait_for("the old supervisor's end", lambda: gone(run), run)
    marked = [checkpoint.name for checkpoint in complete_checkpoints(run)]
    assert run.attempts()[0].read_outcome() is None, "who has the run now writes down how it ended"
    assert "attempt 1 is not ours any more: " in next(run.jobs.glob("*.out")).read_text()
    assert read_json(run.supervisor_lock)["token"] == "another"  # its new owner's lock is not touched
    assert [checkpoint.name for checkpoint in complete_checkpoints(run)] == marked


# A full disk.


@pytest.fixture
def small_disk(mount_disk: Callable[..., Path]) -> Path:
    return mount_disk(400)


def fill(disk: Path, but_bytes: int) -> None:
    """Take all space of a disk but so much, while others write to it."""
    with (disk / "ballast").open("ab", buffering=0) as stream:
        with contextlib.suppress(OSError):  # somebody else was faster
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - but_bytes)
        if but_bytes == 0:
            with contextlib.suppress(OSError):
                stream.seek(0, os.SEEK_END)
                while True:
                    stream.write(bytes(4096))


def test_a_disk_that_is_full_before_a_save_ends_the_run_with_its_cause_and_a_resume_goes_on(
    start: Start, small_disk: Path
) -> None:
    run = start(f"paths.runs={small_disk / 'runs'}", "checkpoint.interval_steps=4", steps=100)
    wait_for("a checkpoint", lambda: any(c.step >= 4 for c in complete_checkpoints(run)), run)
    fill(small_disk, but_bytes=2_000_000)
    status = wait_to_end(run)
    assert (status.state, status.cause) == (State.FAILED, "disk_full")
    assert "free space or raise the quota" in status.reason
    saved = complete_checkpoints(run)
    assert saved and all(damage(checkpoint) == [] for checkpoint in saved)
    wait_for("an empty machine", lambda: gone(run), run)
    with pytest.raises(ConfigError, match="has no room for its checkpoints"):
        prepare_resume(run)
    (small_disk / "ballast").unlink()
    resume(run, prepare_resume(run), "a test")
    assert wait_to_end(run).state == State.FINISHED


def test_a_disk_that_fills_while_ranks_write_ends_the_run_with_its_cause_and_the_last_checkpoint_whole(
    start: Start, small_disk: Path
) -> None:
    run = start(
        f"paths.runs={small_disk / 'runs'}", "checkpoint.interval_steps=2", "checkpoint.keep_last=2",
        "cluster.ranks_per_node=2", steps=2000,
    )  # fmt: skip
    wait_for("a checkpoint", lambda: any(c.step >= 2 for c in complete_checkpoints(run)), run)

    def is_writing() -> bool:
        return any(run.checkpoints_folder.glob("*/.*.partial"))

    wait_for("a file that is being written", is_writing, run)
    fill(small_disk, but_bytes=0)
    status = wait_to_end(run)
    assert (status.state, status.cause) == (State.FAILED, "disk_full")
    saved = complete_checkpoints(run)
    assert saved and all(damage(checkpoint) == [] for checkpoint in saved)
    unfinished = [p.name for p in run.checkpoints_folder.iterdir() if not (p / MARKER).exists()]
    assert unfinished == []  # their space went to the record of what happened
    assert not list(run.path.rglob("*.tmp"))


def test_a_run_whose_checkpoints_have_no_room_is_refused_before_it_starts(start: Start, small_disk: Path) -> None:
    with pytest.raises(ConfigError, match=r"\d+ checkpoints of 25.2 MB at once need .* keep fewer"):
        start(f"paths.runs={small_disk}", "checkpoint.keep_last=99", "checkpoint.interval_steps=1", steps=90)
    assert list(small_disk.iterdir()) == []


# The code and the versions that a run was begun with.


def test_an_edit_of_the_checkout_reaches_neither_a_restart_nor_a_resume(tmp_path: Path, corpus: Path) -> None:
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0")[:-1]:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_symlink():
            target.symlink_to((REPOSITORY / name).readlink())
        elif (REPOSITORY / name).exists():
            shutil.copyfile(REPOSITORY / name, target)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(checkout)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    (checkout / "megatron_solar" / "not_tracked.py").write_text("import nothing_that_exists\n")

    def orchestrate(*arguments: str) -> str:
        code = "import sys; from orchestrator.commands.main import main; sys.argv[0] = 'orchestrate'; main()"
        result = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(checkout), "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    from tests.conftest import SMALL

    overrides = [*SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}"]
    orchestrate("launch", "demo-base", "name=edited", *overrides, "checkpoint.interval_steps=2", "tokens=10000000")
    run = RunDirectory(tmp_path / "orchestrate" / "runs" / "edited")
    wait_for("a checkpoint", lambda: any(c.step >= 2 for c in complete_checkpoints(run)), run)
    assert read_json(run.provenance)["untracked_sources"] == ["megatron_solar/not_tracked.py"]
    assert not list(run.code.rglob("not_tracked.py"))
    (checkout / "megatron_solar" / "train.py").write_text("raise SystemExit('an edit has reached a run')\n")

    process = local_process(run)
    assert process is not None
    client_of(process).kill()
    wait_for("the second attempt's steps", lambda: len(run.attempts()) == 2 and step_of(run) > 2, run)
    orchestrate("cancel", "edited")
    assert wait_to_end(run).state == State.CANCELLED
    wait_for("an empty machine", lambda: gone(run), run)
    orchestrate("resume", "edited")
    wait_for("the third attempt's steps", lambda: _steps_of_attempt(run, 3) > 0, run)
    orchestrate("cancel", "edited")
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)


def _steps_of_attempt(run: RunDirectory, number: int) -> int:
    return sum(isinstance(event, StepEvent) for _, event in read_events(run.attempt(number).events))


def test_other_package_versions_are_refused_unless_they_are_allowed(start: Start) -> None:
    run = start(steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    record = read_json(run.provenance)
    record["packages"]["numpy"] = "1.0"
    write_json(run.provenance, record)
    with pytest.raises(RunError, match=r"begun with other versions(.|\n)*numpy: 1\.0 -> (.|\n)*") as error:
        prepare_resume(run, ["tokens=1024"])
    assert "--allow-upgrade" in str(error.value)
    prepared = prepare_resume(run, ["tokens=1024"], allow_upgrade=True)
    resume(run, prepared, "a test")
    assert wait_to_end(run).state == State.FINISHED
    (folder,) = run.resumes()
    assert run.code == folder / "code"  # today's code goes with today's packages
    assert read_json(folder / "provenance.json")["upgrades"] == list(prepared.upgrades)


# Resumes and branches.


def test_a_finished_run_is_prolonged_at_another_layout_as_if_it_had_been_planned_so(start: Start) -> None:
    constant = ("training.decay=constant", "training.warmup_share=0")
    undisturbed = start(*constant, steps=10)
    wait_to_end(undisturbed)
    run = start(*constant, steps=6)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    with pytest.raises(RunError, match="prolong it with `orchestrate resume"):
        prepare_resume(run)
    asked = ["tokens=1280", "layout.tensor_parallel=2", "cluster.ranks_per_node=4", "checkpoint.keep_last=9"]
    prepared = prepare_resume(run, asked)
    assert prepared.steps_left == 4
    assert [change.field for change in prepared.changes] == [
        "training.tokens", "layout.tensor_parallel", "checkpoint.keep_last", "cluster.ranks_per_node",
    ]  # fmt: skip
    assert any("their order stay" in note for note in notes_on(prepared))
    resume(run, prepared, "orchestrate resume")
    status = wait_to_end(run)
    assert (status.state, status.step, status.total_steps) == (State.FINISHED, 10, 10)
    found, expected = losses_of(run), losses_of(undisturbed)
    assert list(found) == list(expected) == list(range(1, 11))
    difference = relative_difference(list(found.values()), list(expected.values()))
    print(f"prolonged at {status.layout}: {difference:.1e}")
    assert difference < 1e-6
    (folder,) = run.resumes()
    changes = read_json(folder / "provenance.json")["changes"]
    assert {"field": "training.tokens", "before": 768, "after": 1280, "rule": "recorded"} in changes
    assert read_plan(run.launched_plan).total_steps == 6  # what was launched stays as it was
    assert read_plan(run.attempts()[0].plan).layout.world_size == 1
    assert read_plan(run.attempts()[1].plan).layout.world_size == 4


def test_what_a_resume_may_not_change_is_refused_by_name_and_nothing_is_written(start: Start) -> None:
    run = start(steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        prepare_resume(run, ["tokens=9999", "training.seed=1", "layout.global_batch_size=8", "model.num_layers=8"])
    assert all(name in str(error.value) for name in ("training.seed", "layout.global_batch_size", "model.num_layers"))
    with pytest.raises(ConfigError, match="cannot be split over"):
        prepare_resume(run, ["tokens=9999", "layout.tensor_parallel=3", "cluster.ranks_per_node=3"])
    assert sorted(run.path.rglob("*")) == before


def test_of_two_resumes_at_the_same_time_one_is_refused(start: Start) -> None:
    run = start(steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    one, other = prepare_resume(run, ["tokens=1024"]), prepare_resume(run, ["tokens=2048"])
    resume(run, one, "a test")
    with pytest.raises(RunError, match="was resumed meanwhile"):
        resume(run, other, "a test")
    status = wait_to_end(run)
    assert (status.state, status.total_steps, len(run.submissions())) == (State.FINISHED, 8, 2)


def test_a_branch_goes_on_from_anothers_checkpoint_and_outlives_it(start: Start, tmp_path: Path) -> None:
    source = start("checkpoint.interval_steps=2", "checkpoint.keep_last=9", steps=6)
    wait_to_end(source)
    point = BranchPoint(run=source, checkpoint=choose_checkpoint(source, 4))
    settings = recompose(read_plan(source.plan).settings, ["name=branch", "training.learning_rate=4e-4", "tokens=1024"])
    branch = launch(make_plan(settings), "a test", point)
    assert wait_to_end(branch).state == State.FINISHED
    adopted = branch.checkpoint_path(checkpoint_name(4, 0))
    assert (adopted / "rank_0000.safetensors").samefile(point.checkpoint.path / "rank_0000.safetensors")
    assert read_json(branch.provenance)["branched_from"] == {
        "run": str(source.path), "checkpoint": point.checkpoint.name,
    }  # fmt: skip
    mine, theirs = losses_of(branch), losses_of(source)
    assert list(mine) == [5, 6, 7, 8]
    assert mine[5] == theirs[5]  # the same weights and samples; from then on another rate
    assert mine[6] != theirs[6]
    assert losses_of(source).keys() == {1, 2, 3, 4, 5, 6}
    wait_for("an empty machine", lambda: gone(branch), branch)
    shutil.rmtree(source.path)
    resume(branch, prepare_resume(branch, ["tokens=1280"]), "a test")
    assert wait_to_end(branch).state == State.FINISHED

    other = recompose(settings, ["name=other", "training.seed=9"])
    with pytest.raises(ConfigError, match=r"cannot go on from branch@8(.|\n)*training\.seed"):
        launch(make_plan(other), "a test", BranchPoint(run=branch, checkpoint=choose_checkpoint(branch, 8)))
    assert not (tmp_path / "runs" / "other").exists()


def test_data_that_were_tokenized_anew_are_refused_at_once(
    start: Start, tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    from orchestrator.tokenize.stage import tokenize_corpus

    mine = tmp_path / "mine"
    shutil.copytree(corpus / "train", mine)
    run = start(f"data.train={mine}", steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    moved = shutil.move(mine, tmp_path / "moved")
    assert [c.field for c in prepare_resume(run, ["tokens=1024", f"data.train={moved}"]).changes] == [
        "data.train", "training.tokens",
    ]  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text(Path(dataclasses.__file__).read_text())
    tokenize_corpus([text], tokenizer, mine, progress=False)
    with pytest.raises(CheckpointError, match="put the data sets back as they were"):
        prepare_resume(run, ["tokens=1024"])
    with pytest.raises(ConfigError, match=r"add one with from_tokens=512 or more to data.phases"):
        prepare_resume(run, ["tokens=1024", f"data.train=[{moved}, {mine}]"])


# Who may read it.


def test_the_group_reads_a_runs_folder_others_see_nothing_and_only_the_owner_writes(start: Start) -> None:
    run = start(steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    paths = [path for path in [run.path, *run.path.rglob("*")] if not path.is_symlink()]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    wrong = {
        str(path.relative_to(run.path)): oct(mode)
        for path, mode in modes.items()
        if mode & (stat.S_IWGRP | stat.S_IRWXO) or not mode & stat.S_IRGRP
    }
    assert wrong == {}


def test_no_variable_of_the_launching_shell_lies_in_a_runs_folder(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "correct-horse-battery-staple")
    run = start(steps=4)
    wait_to_end(run)
    wait_for("an empty machine", lambda: gone(run), run)
    holding = [path for path in run.path.rglob("*") if path.is_file() and b"correct-horse" in path.read_bytes()]
    assert holding == []


def test_a_run_in_which_steps_were_repeated_says_that_they_gave_the_same(start: Start) -> None:
    run = start("cluster.ranks_per_node=2", "checkpoint.interval_steps=50", steps=400)
    wait_for("step 60", lambda: step_of(run) >= 60, run)
    process = local_process(run)
    assert process is not None
    client_of(process).kill()
    wait_for("the repeated steps", lambda: _repeats(run) != [], run)
    (repeat, *_) = _repeats(run)
    assert (repeat.first_step, repeat.relative_difference, repeat.is_beyond_noise) == (51, 0.0, False)
    assert read_status(run).warnings == ()
    cancel(run)
    wait_to_end(run)


def _repeats(run: RunDirectory) -> list[RepeatEvent]:
    return [e for a in run.attempts() for _, e in read_events(a.events) if isinstance(e, RepeatEvent)]


def test_the_disk_forecast_of_the_plan_is_what_the_launch_asks_for(start: Start, tmp_path: Path) -> None:
    run = start(steps=4)
    wait_to_end(run)
    plan = read_plan(run.plan)
    (largest,) = [c for c in complete_checkpoints(run) if c.step == 4]
    assert plan.checkpoint_bytes == pytest.approx(largest.size_bytes, rel=0.01)
    check_disk(plan, tmp_path)
    text = json.dumps(read_json(run.launched_plan))
    assert re.search(r'"checkpoint_bytes": \d+', text)
