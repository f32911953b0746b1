"""Why attempts ended: evidence put together from folders, one screen for any history, advice for every cause."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.commands.status import show_status
from orchestrator.commands.why import show_attempt, show_run
from orchestrator.events import DamageEvent, event_record
from orchestrator.exit_codes import Cause
from orchestrator.files import JsonLines, write_json
from orchestrator.reconcile import State
from orchestrator.recovery import Action
from orchestrator.remedies import REMEDIES, advice
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import RunSettings
from orchestrator.slurm.scheduler import local_process
from orchestrator.status import read_status
from orchestrator.values import field_types, to_plain
from orchestrator.why import RunExplanation, explain_run, stretches
from tests.conftest import REPOSITORY
from tests.histories import add_attempt, failure, long_history, make_run
from tests.launched import step_of, wait_for, wait_to_end

FAULTS = REPOSITORY / "docs" / "faults.md"
PLACEHOLDERS = {
    "run": "RUN",
    "attempt": "N",
    "rank": "R",
    "node": "NODE",
    "job": "JOB",
    "without_node": "cluster.slurm.exclude=NODE",
}


def hung(rank: int, *, waits: bool) -> dict[str, Any]:
    """Return what a rank that hung writes down, the peers before the one that is to blame."""
    stands = {
        "phase": "step",
        "seconds": 612.0,
        "waits_for_others": waits,
        "at": "comm.py:3 in all_reduce" if waits else "data.py:88 in read",
        "stacks": f"stacks/rank_{rank:04d}.txt",
        "flight_record": None,
    }
    return failure(rank, "n004", exit_code=76, error="HangError", stands=stands, time=1.0 if waits else 2.0)


def shown(run: RunExplanation, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that a person sees."""
    show_run(run)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def text_of(lines: list[str]) -> str:
    """Return lines as one, however they were broken."""
    return " ".join(" ".join(lines).split())


# What a person could do.


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_says_what_helps_even_where_nothing_is_known_of_node_rank_and_job(cause: Cause) -> None:
    said = advice(cause, run="deeper", attempt=3, rank=None, node=None, without_node=None, job=None)
    assert said
    assert not any(re.search(r"[{}]|None", line) for line in said)


def test_advice_on_a_node_is_given_only_where_there_is_one() -> None:
    known = {"run": "deeper", "attempt": 3, "rank": 7, "job": "4711"}
    with_node = advice(Cause.RANK_KILLED, **known, node="n007", without_node="cluster.slurm.exclude=n007")
    without = advice(Cause.RANK_KILLED, **known, node=None, without_node=None)
    assert any("orchestrate resume deeper cluster.slurm.exclude=n007" in line for line in with_node)
    assert any("orchestrate logs deeper --attempt 3 --rank 7" in line for line in without)
    assert "n007" not in " ".join(without) and len(without) < len(with_node)


def sections() -> dict[str, str]:
    """Return what docs/faults.md says of each cause, in one line."""
    parted = re.split(r"^### `(\w+)`$", FAULTS.read_text(), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parted[1::2], parted[2::2], strict=True)}


def test_the_page_on_faults_has_every_cause_with_the_sentences_that_the_command_prints() -> None:
    found = sections()
    assert list(found) == [str(cause) for cause in REMEDIES] and set(REMEDIES) == set(Cause)
    for cause, remedy in REMEDIES.items():
        said = [remedy.meaning, f"By itself: {remedy.by_itself}", f"Lost: {remedy.lost}"]
        said += [f"You: {action.format(**PLACEHOLDERS)}." for action in remedy.actions]
        assert [sentence for sentence in said if sentence not in found[cause]] == []
        assert found[cause].count("You: ") == len(remedy.actions)


def test_the_page_on_faults_has_the_limits_with_their_defaults() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (\d+) \|", FAULTS.read_text(), re.MULTILINE)
    for field in dataclasses.fields(field_types(RunSettings)["patience"]):
        assert f"patience.{field.name}" in dict(rows)
    for name, default in rows:
        kind: Any = RunSettings
        *sections_of, last = name.split(".")
        for section in sections_of:
            kind = field_types(kind)[section]
        assert {field.name: field.default for field in dataclasses.fields(kind)}[last] == float(default), name


# Evidence.


def test_an_exceptions_traceback_comes_first_and_whole_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    message = "rank 3 on n007 after step 9: ValueError: no such thing"
    add_attempt(run, Cause.EXCEPTION, Action.STOP, steps=(1, 9), saved=5, rank=3, host="n007", message=message,
                failures=[failure(3, "n007"), failure(1, "n001", error="RuntimeError", message="closed")])  # fmt: skip
    explained = explain_run(run)
    lines = shown(explained, capsys)
    assert lines[0].startswith(f"deeper is FAILED because {message}")
    assert lines.index("  ValueError: no such thing") < 25
    assert lines.index("  ValueError: no such thing") < next(i for i, line in enumerate(lines) if "you can do" in line)
    assert "line 0, in step" not in text_of(lines) and "orchestrate why deeper --attempt 1" in text_of(lines)
    show_attempt(explained.attempts[0])
    whole = capsys.readouterr().out
    assert failure(3, "n007")["traceback"] in whole
    assert "rank 3       on n007, after step 9: ValueError: no such thing, raised in" in whole
    assert "other ranks  1 (1) told of a failure as well" in whole
    assert explained.next_command == "orchestrate resume deeper"


def test_of_ranks_that_hung_the_one_to_blame_is_shown_and_the_others_as_those_that_waited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(
        run, Cause.HANG, Action.STOP, steps=(1, 9), saved=5, rank=3, host="n004",
        failures=[hung(rank, waits=rank != 3) for rank in range(8)],
    )  # fmt: skip
    attempt.stacks.mkdir()
    (attempt.stacks / "rank_0003.txt").write_text('Thread 0x1:\n  File "data.py", line 88 in read\n')
    (attempt.stacks / "rank_0000.txt").write_text("another\n")
    (explained,) = explain_run(run).attempts
    rank, others = explained.evidence
    assert rank.source == "rank 3"
    assert "stood 10 min 12 s in its step, at data.py:88 in read" in rank.text
    assert others.text == "7 (0, 1, 2, 4, 5, 6, 7) waited for it"
    assert explained.stacks == 'Thread 0x1:\n  File "data.py", line 88 in read'
    show_attempt(explained)
    assert explained.stacks in capsys.readouterr().out
    assert "'cluster.slurm.exclude" not in " ".join(explained.advice)
    assert any("cluster.slurm.exclude=n004" in line for line in explained.advice)


def test_the_supervisors_evidence_is_believed_and_files_add_what_it_has_not(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(
        run, Cause.NODE_FAILED, Action.REQUEUE, steps=(1, 9), saved=5, host="n007", excluded=["n007"],
        evidence=[{"source": "srun", "text": "as the supervisor saw it"}, {"source": "slurm", "text": "DOWN*"}],
    )  # fmt: skip
    attempt.srun_log.write_text("srun: error: n009: task 12: Killed\n")
    finding = {"node": "n019", "check": "memory", "message": "3 GB free", "remedy": "reboot it", "excludes": True}
    attempt.checks.mkdir()
    write_json(attempt.checks / "choice.json", {"findings": [finding]})
    write_json(attempt.stop_request, {"reason": "preempted", "time": 0.0})
    lines = JsonLines(attempt.supervisor_events)
    lines.append(event_record(DamageEvent(time=1.0, step=5, name="step_5", problems=("rank_0001 is short",))))
    lines.close()
    (explained,) = explain_run(run).attempts
    assert [(item.source, item.text) for item in explained.evidence] == [
        ("srun", "as the supervisor saw it"),
        ("slurm", "DOWN*"),
        ("signal", "asked the ranks to save and leave at 1970-01-01T00:00:00Z: preempted"),
        ("node check", "n019: memory: 3 GB free; reboot it"),
        ("checkpoint", "step_5 is damaged, the one before is used: rank_0001 is short"),
    ]
    assert explained.status.excluded == ("n007",)


def test_an_outcome_of_a_version_without_evidence_is_explained_from_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(run, Cause.RANK_KILLED, Action.RESTART, steps=(1, 9), saved=5, rank=12, host="n009")
    outcome = attempt.read_outcome() or {}
    write_json(attempt.outcome, {key: outcome[key] for key in outcome.keys() - {"evidence", "excluded"}})
    attempt.srun_log.write_text("srun: error: n009: task 12: Killed\n")
    (explained,) = explain_run(run).attempts
    assert [(item.source, item.text) for item in explained.evidence] == [("srun", "rank 12 on n009: Killed")]
    assert explained.status.excluded == ()


@pytest.mark.parametrize(
    ("cause", "log", "told"),
    [
        (Cause.NODE_FAILED, "srun: error: n001: task 0: Killed\n", []),  # the supervisor killed it
        (Cause.HANG, "srun: error: n001: task 0: Killed\n", []),
        (Cause.NODE_FAILED, "srun: error: Node failure on n003\n", ["n003: Slurm has lost the node"]),
        (Cause.START_FAILED, "srun: unrecognized option '--x'\n", ["unrecognized option '--x'"]),
        (Cause.START_FAILED, "", []),
    ],
)
def test_ranks_that_the_supervisor_killed_are_no_evidence(
    tmp_path: Path, cause: Cause, log: str, told: list[str]
) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(run, cause, Action.RESTART, steps=(1, 9), saved=5)
    attempt.srun_log.write_text(log)
    (explained,) = explain_run(run).attempts
    assert [item.text for item in explained.evidence] == told


def test_a_file_that_cannot_be_read_is_named_and_hides_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(run, Cause.EXCEPTION, Action.STOP, steps=(1, 9), rank=3, host="n007",
                          failures=[failure(3, "n007")])  # fmt: skip
    attempt.rank_failure(1).write_text("{torn")
    attempt.stop_request.write_text('{"reason": "no time is there"}')
    (explained,) = explain_run(run).attempts
    assert explained.traceback.endswith("ValueError: no such thing")
    torn, strange = [item.text for item in explained.evidence if item.source == "file"]
    assert "rank_0001.json should hold JSON" in torn
    assert strange.endswith("stop.json is not as it should be: KeyError: 'time'")


def test_an_attempt_that_nobody_closed_says_when_it_was_heard_and_what_came_after(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_attempt(run, None, steps=(1, 9))
    add_attempt(run, Cause.PREEMPTED, Action.STOP, steps=(6, 12), saved=12, restarts=1)
    lost, _ = explain_run(run).attempts
    assert lost.status.cause == Cause.SUPERVISOR_LOST
    supervisor, slurm = lost.evidence
    assert re.fullmatch(r"it was heard last at 1970-01-01T00:2\d:\d\dZ, and wrote no outcome", supervisor.text)
    assert slurm.source == "slurm" and "job 4711 was started again (restart 1)" in slurm.text


# Histories.


@pytest.mark.parametrize("attempts", [1, 3, 40])
def test_the_status_of_any_history_is_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attempts: int
) -> None:
    run = make_run(tmp_path)
    long_history(run, attempts)
    status = read_status(run)
    show_status(status)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 29 and max(map(len, lines)) <= 100
    assert status.next_command == "orchestrate why deeper"
    rows = [line.split()[0] for line in lines if re.match(r"\d+ +4711 ", line)]
    assert rows == [str(number) for number in range(max(1, attempts - 7), attempts + 1)]
    text = text_of(lines)
    if attempts == 40:
        told = (
            "attempts 1-32: 24 preempted, 5 node_failed on 2 nodes, 3 hang; steps 1-280, 3 h 34 min, 134 M tokens lost"
        )
        assert told in text
        ends = [attempt.cause for attempt in status.attempt_list[:32]]
        assert [ends.count(cause) for cause in ("preempted", "node_failed", "hang")] == [24, 5, 3]
    else:
        assert "attempts 1-" not in text


def test_a_status_with_a_long_list_of_warnings_is_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    long_history(run, 40)
    lines = JsonLines(run.attempts()[-1].events)
    for step in range(30):
        lines.append(event_record(DamageEvent(time=1.0, step=step, name=f"step_{step}", problems=("short " * 90,))))
    lines.close()
    show_status(read_status(run))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= 36
    assert "27 before these" in text_of(printed) and "step_29" in text_of(printed)


def test_a_failure_that_is_met_by_itself_is_hinted_at_and_an_expected_end_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hints = []
    for name, cause in (("hung", Cause.HANG), ("waiting", Cause.PREEMPTED)):
        run = make_run(tmp_path, name=name)
        add_attempt(run, cause, Action.REQUEUE, steps=(1, 9), saved=5)
        show_status(read_status(run))
        hints.append(f"orchestrate why {name}" in capsys.readouterr().out)
    assert hints == [True, False]


def test_nodes_that_are_kept_out_are_shown_until_a_person_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    add_attempt(run, Cause.NODE_FAILED, Action.REQUEUE, steps=(1, 9), saved=5, host="n007", excluded=["n007"])
    add_attempt(run, None, steps=(6, 12))
    show_status(read_status(run))
    assert "n[001-033], 1 of them to spare; kept out: n007" in text_of(capsys.readouterr().out.splitlines())
    newest = run.submissions()[-1]
    run.add_submission({key: value for key, value in newest.items() if key != "number"})
    assert read_status(run).excluded == ()


def test_a_long_history_is_told_in_stretches_that_ended_alike_and_its_newest_attempts_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    long_history(run, 40)
    explained = explain_run(run)
    parted = stretches(explained.attempts)
    assert [attempt.status.number for stretch in parted for attempt in stretch] == list(range(1, 41))
    for stretch, following in itertools.pairwise(parted):
        assert len({attempt.status.cause for attempt in stretch}) == 1
        assert stretch[-1].status.cause != following[0].status.cause
    lines = shown(explained, capsys)
    assert len(lines) <= 80
    text = text_of(lines)
    assert "18-23 preempted requeued 146-205" in text and "24 node_failed on n019 requeued" in text
    for number in (38, 39, 40):
        assert any(line.startswith(f"attempt {number}: ") for line in lines)
    assert json.loads(json.dumps(to_plain(explained)))["attempts"][39]["traceback"].endswith("no such thing")


def test_nodes_where_failures_begin_again_and_again_are_named_with_the_command_that_keeps_them_out(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, "cluster.slurm.exclude=n001")
    for host in ("n007", "n019", "n007"):
        add_attempt(run, Cause.RANK_KILLED, Action.RESTART, steps=(1, 9 + len(run.attempts())), host=host)
    found = explain_run(run).patterns
    assert found[0] == (
        "of 3 failures 2 on n007: tell the site, and keep them out with "
        "`orchestrate resume deeper 'cluster.slurm.exclude=[n001,n007]'`"
    )


def test_failures_after_one_step_and_preemptions_without_end_are_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path, name="same-step")
    for host in ("n007", "n019"):
        add_attempt(run, Cause.RANK_KILLED, Action.RESTART, steps=(1, 9), saved=0, host=host)
    assert any("attempts 1 and 2 both failed after step 9, on different nodes" in p for p in explain_run(run).patterns)
    run = make_run(tmp_path, name="preempted")
    for count in range(5):
        assert not any("all preempted" in pattern for pattern in explain_run(run).patterns)
        add_attempt(run, Cause.PREEMPTED, Action.REQUEUE, steps=(1 + count, 1 + count), saved=1 + count)
    assert any("the last 5 attempts were all preempted" in pattern for pattern in explain_run(run).patterns)


# As it is typed.


def test_the_command_prints_text_and_json_and_refuses_attempts_that_are_not_there(tmp_path: Path) -> None:
    runs = tmp_path / "orchestrate" / "runs"
    runs.mkdir(parents=True)
    long_history(make_run(runs), 3)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"}

    def why(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.commands.main", "why", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    plain, one, as_json = why(), why("deeper", "--attempt", "2"), why("--json")
    assert (plain.returncode, one.returncode, as_json.returncode) == (0, 0, 0), plain.stderr + one.stderr
    assert plain.stdout.startswith("deeper is FAILED because ")
    assert plain.stdout.splitlines()[-1] == "next: orchestrate resume deeper"
    assert one.stdout.startswith("attempt 2: preempted")
    assert [attempt["status"]["cause"] for attempt in json.loads(as_json.stdout)["attempts"]] == [
        "preempted", "preempted", "exception"]  # fmt: skip
    assert json.loads(why("--attempt", "3", "--json").stdout)["traceback"].endswith("no such thing")
    refused = why("--attempt", "4")
    assert refused.returncode == 1 and "has 3 attempts, there is no attempt 4" in refused.stderr


# A real one.


def test_a_run_whose_rank_and_then_supervisor_were_killed_says_so(
    start: Callable[..., RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("checkpoint.interval_steps=4", steps=100_000)
    wait_for("a checkpoint", lambda: any(c.step >= 4 for c in complete_checkpoints(run)), run)
    supervisor = local_process(run)
    assert supervisor is not None
    preload = next(c for c in supervisor.children(recursive=True) if "megatron_solar.preload" in c.cmdline())
    preload.children()[0].kill()
    wait_for("the second attempt's steps", lambda: len(run.attempts()) == 2 and step_of(run) > 4, run)
    os.kill(supervisor.pid, signal.SIGKILL)
    status = wait_to_end(run)
    assert (status.state, status.cause) == (State.FAILED, "supervisor_lost")
    assert re.search(r"the supervisor was killed, or its node died.*; last heard [\d.]+ s ago;", status.reason)
    assert status.next_command == f"orchestrate resume {run.name}"

    explained = explain_run(run)
    killed, lost = explained.attempts
    assert (killed.status.cause, killed.status.action) == ("rank_killed", "restart")
    assert "SIGKILL" in killed.status.message
    assert lost.status.cause == "supervisor_lost"
    assert any(item.source == "supervisor" and "heard last at" in item.text for item in lost.evidence)
    lines = shown(explained, capsys)
    assert lines[0].startswith(f"{run.name} is FAILED because supervisor_lost: ")
    assert "sacct" not in text_of(lines)  # it is no job of Slurm
    assert f"orchestrate resume {run.name}` goes on" in text_of(lines)
