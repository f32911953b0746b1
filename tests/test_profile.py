"""Traces of chosen steps and ranks, what is refused before a run starts, and how the loop's overhead is reckoned."""

import gzip
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.loop_overhead import WARM_UP, compared, interval
from orchestrator.commands.launch import command as launch_command
from orchestrator.commands.logs import event_line
from orchestrator.commands.status import show_status
from orchestrator.config import compose, recompose
from orchestrator.errors import ConfigError
from orchestrator.events import ProfileEvent
from orchestrator.files import write_json
from orchestrator.launch import check_start
from orchestrator.plan import make_plan, write_plan
from orchestrator.resume import prepare_resume
from orchestrator.settings import ProfileSettings
from orchestrator.status import read_status
from orchestrator.traced_steps import profile_problems, traced_steps, unreachable_problems
from tests.conftest import Trainer, events_of, losses


def names_in(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as stream:
        content: dict[str, Any] = json.load(stream)
    return {str(event.get("name")) for event in content["traceEvents"]}


def test_chosen_steps_of_chosen_ranks_are_traced_and_nothing_else_changes(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plan = trainer.make_run("cluster.ranks_per_node=2", steps=6)
    without = trainer.train(run, plan)
    assert not without.traces.exists()

    run, plan = trainer.make_run("cluster.ranks_per_node=2", "profile.steps=2-3", "profile.ranks=[1]", steps=6)
    first, ranks = trainer.start(run, plan)
    write_json(first.stop_request, {"reason": "time_limit"})  # it does one step
    trainer.wait(run, first, ranks)
    assert not first.traces.exists()
    attempt = trainer.train(run, plan)
    assert losses(first, attempt) == losses(without)
    assert [path.name for path in attempt.traces.iterdir()] == ["rank_0001.json.gz"]
    names = names_in(attempt.rank_trace(1))
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names
    assert {"aten::mm", "Optimizer.step#Adam.step"} <= {name.replace("AdamW", "Adam") for name in names}
    (told,) = (event for event in events_of(attempt) if isinstance(event, ProfileEvent))
    assert f"traces of steps {told.first_step} to {told.last_step} of {len(told.ranks)} ranks" in event_line(told)
    assert (told.first_step, told.last_step, tuple(told.ranks)) == (2, 3, (1,))

    status = read_status(run)
    assert status.traces == (str(attempt.rank_trace(1)),)
    show_status(status)
    said = " ".join(capsys.readouterr().out.split())
    assert "traces steps 2-3: " in said and "rank_0001.json.gz" in said.replace(" ", "")

    # Of another resume one step only, on both ranks, which is its last one.
    longer = make_plan(recompose(plan.settings, ["training.tokens=896", "profile.steps=7", "profile.ranks=[0,1]"]))
    write_plan(run.launched_plan, longer)
    last = trainer.train(run, longer)
    assert sorted(path.name for path in last.traces.iterdir()) == ["rank_0000.json.gz", "rank_0001.json.gz"]
    assert "step 7" in names_in(last.rank_trace(0))
    with pytest.raises(ConfigError, match=r"profile.steps=7-8 should lie within 8-9"):
        prepare_resume(run, ["training.tokens=1152", "profile.steps=7-8"])


@pytest.mark.parametrize(
    ("said", "steps"),
    [("", []), ("20", [20]), ("20-22", [20, 21, 22]), ("22-20", []), ("0", []), ("20-", []), ("a", [])],
)
def test_steps_are_first_and_last(said: str, steps: list[int]) -> None:
    profile = ProfileSettings(steps=said)
    assert list(traced_steps(profile)) == steps
    assert bool(profile_problems(profile, 1)) == (said != "" and not steps)


@pytest.mark.parametrize(
    ("steps", "done", "total", "is_refused"),
    [("5-7", 4, 7, False), ("5-7", 5, 9, True), ("5-7", 9, 12, True), ("5-7", 0, 6, True), ("", 3, 3, False)],
)
def test_steps_that_are_past_or_beyond_the_end_are_refused(steps: str, done: int, total: int, is_refused: bool) -> None:
    assert bool(unreachable_problems(ProfileSettings(steps=steps), done, total)) == is_refused


def test_a_launch_refuses_steps_and_ranks_that_the_run_does_not_have(tmp_path: Path) -> None:
    asked = ["data.train=unused", f"paths.runs={tmp_path}", "name=x"]
    with pytest.raises(ConfigError, match=r"profile.ranks has \[9\], and the run has 1 ranks; use 0 to 0"):
        compose("demo-base", [*asked, "profile.steps=1", "profile.ranks=[9]"])
    plan = make_plan(compose("demo-base", [*asked, "profile.steps=100000-100001"]))
    with pytest.raises(ConfigError, match=r"profile.steps=100000-100001 should lie within 1-"):
        check_start(plan)


def test_the_command_takes_steps_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["demo-base", "data.train=unused", f"paths.runs={tmp_path}", "--dry-run"]
    result = CliRunner().invoke(launch_command, [*asked, "--profile", "100000-100001", "--profile-ranks", "0"])
    assert isinstance(result.exception, ConfigError) and "should lie within 1-" in str(result.exception)
    result = CliRunner().invoke(launch_command, [*asked, "--profile", "2-1", "--profile-ranks", "0,7"])
    assert isinstance(result.exception, ConfigError)
    assert "profile.steps='2-1' should read" in str(result.exception) and "has [7]" in str(result.exception)
    result = CliRunner().invoke(launch_command, [*asked, "--profile-ranks", "0"])
    assert result.exit_code == 2 and "--profile-ranks needs --profile" in result.output


def test_the_overhead_of_the_loop_is_told_from_neighbouring_blocks_whatever_drifts() -> None:
    drift = [1.0 + 0.05 * number for number in range(22)]  # a machine that grows slower
    bare = [4 * slower for slower in drift]
    ours = [4 * 1.01 * (before + after) / 2 for before, after in itertools.pairwise(drift)]
    found = compared(ours, bare, steps=4)
    assert found.more == pytest.approx(0.01) and (found.low, found.high) == pytest.approx((0.01, 0.01))
    assert found.bare == pytest.approx(statistics.median(drift[WARM_UP:]))
    spread = [1 + 0.001 * number for number in range(-10, 11)]
    low, high = interval(spread)
    assert low < 1 < high and 0.004 < high - low < 0.014  # +-1.96 times 1.25 sd / sqrt(21), sd 0.006, is 0.0066
