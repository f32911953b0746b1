"""Where the hours went: histories reckoned by hand, sums that always come out, and a run that was killed."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from orchestrator.attempt_record import attempt_record
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.commands.status import show_status
from orchestrator.config import compose
from orchestrator.events import (
    CheckpointEvent,
    DamageEvent,
    EndEvent,
    Event,
    RepeatEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
    read_events,
)
from orchestrator.files import JsonLines, write_json
from orchestrator.launch import cancel
from orchestrator.ledger import Kind, Ledger, ledger_of, total
from orchestrator.plan import make_plan, write_plan
from orchestrator.reconcile import State
from orchestrator.run_directory import AttemptDirectory, RunDirectory, create_run
from orchestrator.slurm.scheduler import local_process
from orchestrator.status import _attempt_status, read_status
from orchestrator.values import to_plain
from tests.launched import step_of, wait_for, wait_to_end

TOKENS_PER_STEP = 1000
KINDS: dict[str, type[Any]] = {
    "start": StartEvent,
    "step": StepEvent,
    "validation": ValidationEvent,
    "save": SaveEvent,
    "complete": CheckpointEvent,
    "damage": DamageEvent,
    "repeat": RepeatEvent,
    "end": EndEvent,
}


def event(kind: str, time: float, step: int) -> Event:
    """Return an event; only its kind, time and step are looked at."""
    rest = {field.name: 1 for field in dataclasses.fields(KINDS[kind])}
    made: Event = KINDS[kind](**{**rest, "time": time, "step": step})
    return made


def history(text: str) -> list[Event]:
    """Return events written as `kind time step` and parted by commas."""
    told = [part.split() for part in text.split(",") if part.strip()]
    return [event(kind, float(time), int(step)) for kind, time, step in told]


def reckon(events: Sequence[Event] = (), **different: Any) -> Ledger:
    """Return the ledger of an attempt submitted at 0, begun at 100 and ended at 1000, with what differs."""
    facts: dict[str, Any] = {
        "since": 0.0,
        "is_queued": True,
        "started": 100.0,
        "checking": None,
        "saved_step": 0,
        "consumed_tokens": lambda step: step * TOKENS_PER_STEP,
        "gpus": 8,
        "spare_gpus": 0,
        "ended": 1000.0,
        **different,
    }
    return ledger_of(events=events, **facts)


def spent(ledger: Ledger) -> dict[str, float]:
    """Return the kinds that took any time."""
    return {kind: seconds for kind, seconds in ledger.seconds.items() if seconds}


WHOLE = "start 200 0, save 230 0, validation 250 0, step 350 1, step 450 2, validation 460 2, save 490 2, step 590 3"
"""30 s and 20 s at the start, steps of 100 s, and 10 s and 30 s after the second."""


@pytest.mark.parametrize(
    ("events", "facts", "expected", "tokens_lost"),
    [
        # Ended before anything: on the first line the checks are the last thing that was heard.
        ("", {"checking": (110.0, 150.0), "ended": 150.0}, {"queued": 100, "starting": 10, "checking": 40}, 0),
        ("", {}, {"queued": 100, "starting": 900}, 0),
        ("", {"ended": 100.0}, {"queued": 100}, 0),
        ("damage 300 7", {}, {"queued": 100, "starting": 900}, 0),
        # Ended well: the ranks waited 60 s for their last save, and left within 5 s.
        (
            f"{WHOLE}, save 600 3, end 660 3",
            {"saved_step": 3, "ended": 665.0, "checking": (100.0, 140.0)},
            {"queued": 100, "checking": 40, "starting": 60, "training": 300, "validation": 30,
             "checkpoint": 130, "idle": 5},
            0,
        ),
        # Killed 10 s after step 3; what came after the save of step 2 is done again.
        (
            WHOLE,
            {"saved_step": 2, "ended": 600.0},
            {"queued": 100, "starting": 100, "training": 200, "validation": 30, "checkpoint": 60, "lost": 100,
             "idle": 10},
            TOKENS_PER_STEP,
        ),
        # The save of step 2 was never completed: its standstill is lost as well.
        (
            WHOLE,
            {"saved_step": 0, "ended": 590.0},
            {"queued": 100, "starting": 100, "validation": 20, "checkpoint": 30, "lost": 340},
            3 * TOKENS_PER_STEP,
        ),
        # In the allocation of the attempt before: 7 s until the supervisor was at it again.
        (
            "start 120 2, step 170 3, repeat 170 3, step 220 4",
            {"since": 93.0, "is_queued": False, "saved_step": 3, "ended": 220.0},
            {"idle": 7, "starting": 20, "training": 50, "lost": 50},
            TOKENS_PER_STEP,
        ),
        # What the ranks load was found damaged first; the step it was of is nothing lost.
        (
            "damage 150 9, start 200 5, step 300 6",
            {"saved_step": 6, "ended": 300.0},
            {"queued": 100, "starting": 100, "training": 100},
            0,
        ),
        # Marks of the supervisor cut no time.
        ("start 200 0, step 300 1, complete 350 1, step 400 2", {"saved_step": 2, "ended": 400.0},
         {"queued": 100, "starting": 100, "training": 200}, 0),
        # Clocks: of the ranks' node 50 s behind, far ahead, and of the submitting host ahead.
        ("start 60 0, step 160 1", {"saved_step": 1, "ended": 260.0}, {"queued": 100, "training": 60, "idle": 100}, 0),
        ("start 5000 0, step 5100 1", {"saved_step": 1}, {"queued": 100, "starting": 900}, 0),
        ("start 200 0", {"since": 130.0, "ended": 200.0}, {"starting": 100}, 0),
    ],
)  # fmt: skip
def test_each_stretch_of_an_attempt_goes_to_what_it_ended_with(
    events: str, facts: dict[str, Any], expected: dict[str, float], tokens_lost: int
) -> None:
    ledger = reckon(history(events), **facts)
    assert spent(ledger) == expected
    assert ledger.tokens_lost == tokens_lost


def test_hours_are_paid_from_the_supervisors_start_with_spares_and_not_in_the_queue() -> None:
    ledger = reckon(history("start 1000 0, step 4600 1"), saved_step=1, gpus=256, spare_gpus=8, started=1000.0,
                    ended=8200.0)  # fmt: skip
    assert spent(ledger) == {"queued": 1000, "training": 3600, "idle": 3600}
    assert (ledger.gpu_hours, ledger.spare_gpu_hours) == (512, 16)
    assert ledger.cost(2.5) == 1320
    assert ledger.effective_share == pytest.approx(3600 / 8200)


def test_attempts_add_up() -> None:
    first = reckon(history(WHOLE), saved_step=2, ended=600.0, spare_gpus=8)
    second = reckon(history("start 650 2, step 750 3, step 850 4"), since=600.0, is_queued=False, started=605.0,
                    saved_step=4, ended=850.0)  # fmt: skip
    both = total([first, second])
    assert spent(both) == {"queued": 100, "starting": 145, "training": 400, "validation": 30, "checkpoint": 60,
                           "lost": 100, "idle": 15}  # fmt: skip
    assert both.total_seconds == 850
    assert both.tokens_lost == TOKENS_PER_STEP
    assert both.gpu_hours == pytest.approx(8 * 750 / 3600)
    assert both.spare_gpu_hours == pytest.approx(8 * 500 / 3600)
    assert (total([]).total_seconds, total([]).effective_share) == (0, None)


TIMES = some.one_of(some.floats(-100, 2000), some.floats(-1e9, 4e9))
EVENTS = some.builds(event, some.sampled_from(sorted(KINDS)), TIMES, some.integers(0, 9))


@given(
    events=some.lists(EVENTS, max_size=20),
    since=TIMES,
    started=TIMES,
    ended=TIMES,
    checking=some.none() | some.tuples(TIMES, TIMES),
    saved_step=some.integers(0, 9),
    is_queued=some.booleans(),
)
def test_kinds_are_never_negative_and_add_up_to_the_wall_time_whatever_the_clocks_say(
    events: list[Event],
    since: float,
    started: float,
    ended: float,
    checking: tuple[float, float] | None,
    saved_step: int,
    is_queued: bool,
) -> None:
    ledger = reckon(events, since=since, started=started, ended=ended, checking=checking, saved_step=saved_step,
                    is_queued=is_queued)  # fmt: skip
    assert list(ledger.seconds) == list(Kind)
    assert min(ledger.seconds.values()) >= 0
    wall = round((max(started, ended) - min(since, started)) * 1000)
    assert sum(round(seconds * 1000) for seconds in ledger.seconds.values()) == wall
    assert is_queued or ledger.seconds[Kind.QUEUED] == 0
    assert ledger.gpu_hours == pytest.approx(8 * (wall / 1000 - ledger.seconds[Kind.QUEUED]) / 3600)


# From a run's folder.

JOB = "12345678"


def make_run(runs: Path, *overrides: str) -> RunDirectory:
    """Make a run of 32 nodes and one to spare, submitted at 1000."""
    plan = make_plan(compose("solar-10.7b", [f"paths.runs={runs}", "cluster.spare_nodes=1", *overrides]))
    run = create_run(runs, plan.settings.name)
    write_plan(run.launched_plan, plan)
    submit(run, 1000.0)
    return run


def submit(run: RunDirectory, time: float) -> None:
    record = {"time": time, "scheduler": "slurm", "job_id": JOB, "host": "login", "by": "person"}
    run.add_submission({**record, "process_created": 0.0})


def add_attempt(
    run: RunDirectory,
    started: float,
    events: str = "",
    *,
    process: int = 1,
    restarts: int = 0,
    outcome: dict[str, Any] | None = None,
) -> AttemptDirectory:
    """Add an attempt of the newest submission as a supervisor leaves it; one without an outcome was lost."""
    attempt, submissions = run.new_attempt(), run.submissions()
    job = {
        "scheduler": "slurm",
        "job_id": submissions[-1]["job_id"],
        "restart_count": restarts,
        "host": "n001",
        "process": process,
        "process_created": 1.0,
        "nodes": "n[001-033]",
        "node_count": 33,
        "started": started,
        "submissions": len(submissions),
    }
    write_json(attempt.job, job)
    lines = JsonLines(attempt.events)
    for told in history(events):
        lines.append(event_record(told))
    lines.close()
    if outcome is not None:
        common: dict[str, Any] = {"message": "", "rank": None, "host": None, "submissions": len(submissions)}
        write_json(attempt.outcome, {**common, "exit_codes": {}, "why": "because", "started": started, **outcome})
    return attempt


def kinds(record: dict[str, Any]) -> dict[str, float]:
    return {kind: seconds for kind, seconds in record["ledger"]["seconds"].items() if seconds}


def later(events: str, seconds: float) -> str:
    """Return events as they are written above, with other times."""
    parted = [part.split() for part in events.split(",")]
    return ", ".join(f"{kind} {float(time) + seconds} {step}" for kind, time, step in parted)


KILLED = {
    "cause": "rank_killed",
    "action": "restart",
    "first_step": 1,
    "last_step": 3,
    "saved_step": 2,
    "ended": 1600.0,
}


def test_an_attempts_time_begins_with_its_submission_or_with_the_end_of_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = add_attempt(run, 1100.0, "start 1200 0, step 1300 1, step 1400 2, step 1590 3", outcome=KILLED)
    record = attempt_record(run, first, saved_step=2, ended=1600.0)
    assert kinds(record) == {"queued": 100, "starting": 100, "training": 200, "lost": 190, "idle": 10}
    assert (record["job_id"], record["restart_count"], record["nodes"], record["spare_nodes"]) == (
        JOB, 0, "n[001-033]", 1)  # fmt: skip
    assert record["ledger"]["tokens_lost"] == 1024 * 4096
    assert record["ledger"]["gpu_hours"] == pytest.approx(256 * 500 / 3600)
    assert record["ledger"]["spare_gpu_hours"] == pytest.approx(8 * 500 / 3600)

    same = add_attempt(run, 1605.0)  # lost after it was heard last at 1700
    JsonLines(same.events).append(event_record(event("start", 1700.0, 2)))
    assert kinds(attempt_record(run, same, saved_step=2, ended=1700.0)) == {"idle": 5, "starting": 95}

    requeued = add_attempt(run, 1800.0, process=2, restarts=1, outcome={**KILLED, "ended": 1900.0})
    assert kinds(attempt_record(run, requeued, saved_step=2, ended=1900.0)) == {"queued": 100, "starting": 100}

    submit(run, 9000.0)  # a person resumes, long after
    resumed = add_attempt(run, 9050.0, process=3)
    checked = attempt_record(run, resumed, saved_step=2, ended=9100.0, checking=(9051.0, 9060.0))
    assert kinds(checked) == {"queued": 50, "starting": 41, "checking": 9}


def test_a_step_that_is_told_while_the_status_is_read_is_not_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = add_attempt(run, 1100.0, "start 1200 0, step 1300 1, step 1400 2")
    before = [event for _, event in read_events(attempt.events)][:2]
    found = _attempt_status(run, attempt, None, before, is_over=False, saved_step=0)
    assert found.ledger is not None
    assert (found.ledger.seconds["lost"], found.ledger.seconds["training"], found.ledger.tokens_lost) == (0, 200, 0)


def test_an_outcome_without_a_ledger_is_still_read_and_one_with_it_is_believed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_attempt(run, 1100.0, "start 1200 0, step 1300 1, step 1400 2, step 1590 3", outcome=KILLED)
    add_attempt(run, 1605.0, "start 1700 2, step 1800 3", outcome={**KILLED, "action": "stop", "ended": 1800.0})
    first, second = read_status(run).attempt_list
    assert first.ledger is not None and first.ledger.seconds["lost"] == 190
    assert second.ledger is not None and second.ledger.seconds["lost"] == 100  # its outcome says step 2 is saved

    recorded = dataclasses.replace(second.ledger, tokens_lost=5)
    outcome = {**(run.attempts()[1].read_outcome() or {}), "ledger": to_plain(recorded), "nodes": "n[002-033]"}
    write_json(run.attempts()[1].outcome, outcome)
    status = read_status(run)
    assert status.attempt_list[1].ledger == recorded
    assert (status.attempt_list[1].nodes, status.attempt_list[1].job_id) == ("n[002-033]", JOB)
    assert status.ledger == total([first.ledger, recorded])

    # Of a version that knows another kind: reckoned anew.
    other = dataclasses.replace(recorded, seconds={**recorded.seconds, "thinking": 1.0})
    write_json(run.attempts()[1].outcome, {**outcome, "ledger": to_plain(other)})
    assert read_status(run).attempt_list[1].ledger == second.ledger


def test_what_a_lost_supervisor_left_counts_as_lost_from_where_the_next_attempt_began(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_attempt(run, 1100.0, "start 1200 0, step 1300 1, step 1400 2, step 1500 3, step 1600 4")
    add_attempt(run, 1700.0, "start 1800 1, step 1900 2", process=2,
                outcome={**KILLED, "action": "stop", "ended": 1900.0})  # fmt: skip
    lost, _ = read_status(run).attempt_list
    assert (lost.cause, lost.ended) == ("supervisor_lost", 1600.0)
    assert lost.ledger is not None
    assert spent(lost.ledger) == {"queued": 100, "starting": 100, "training": 100, "lost": 300}


def test_the_screen_tells_hours_cost_and_nodes_within_100_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "cluster.price_per_gpu_hour=2.5")
    on_a_node = {**KILLED, "host": "n017", "first_step": 119_501, "last_step": 119_780, "saved_step": 119_750}
    steps = ", ".join(f"step {30 * step} {119_500 + step}" for step in range(1, 281))
    first = "start 0 119500, " + steps  # 280 steps of 30 s each, of which the last 30 are lost
    add_attempt(run, 12_000.0, later(first, 20_000), outcome={**on_a_node, "ended": 28_430.0})
    outcome = {**on_a_node, "action": "stop", "ended": 118_010.0}
    add_attempt(run, 28_500.0, later(first, 28_600), process=2, restarts=1, outcome=outcome)
    show_status(read_status(run))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    shown = "\n".join(lines)
    for expected in (
        "training 13% of 1 d 8 h, queued 3 h 4 min, starting 2 h 15 min, lost 30 min 0 s, idle",
        "7,534 GPU hours, 235 more of spare nodes; at the cluster's price 19,422",
        "nodes       n[001-033], 1 of them to spare",
        "1    12345678  01-01 03:20  n[001-033]  119501-119780  4 h 33 min        126 M  rank_killed on n017",
    ):
        assert expected in shown, shown


# A real one.


def test_a_run_with_a_killed_rank_accounts_for_every_second(start: Callable[..., RunDirectory]) -> None:
    run = start("cluster.price_per_gpu_hour=1000", steps=100_000)  # the next save after that of step 0 is far away
    wait_for("steps after a checkpoint", lambda: bool(complete_checkpoints(run)) and step_of(run) >= 5, run)
    supervisor = local_process(run)
    assert supervisor is not None
    preload = next(
        child for child in supervisor.children(recursive=True) if "megatron_solar.preload" in child.cmdline()
    )
    preload.children()[0].kill()
    wait_for("steps of the second attempt", lambda: len(run.attempts()) == 2 and _steps(run.attempts()[1]) > 0, run)
    running = read_status(run)
    assert running.attempt_list[1].ledger is not None
    assert running.attempt_list[1].ledger.seconds["lost"] == 0  # nothing is, as long as it goes on
    cancel(run)
    status = wait_to_end(run)
    assert status.state == State.CANCELLED

    first, second = status.attempt_list
    outcomes = [attempt.read_outcome() for attempt in run.attempts()]
    submitted = run.submissions()[0]["time"]
    for ledger, begun, outcome in zip((first.ledger, second.ledger), (submitted, first.ended), outcomes, strict=True):
        assert ledger is not None and outcome is not None and begun is not None
        assert sum(ledger.seconds.values()) == pytest.approx(outcome["ended"] - begun, abs=0.002)
        assert min(ledger.seconds.values()) >= 0
        assert ledger.seconds["starting"] > 0
    assert first.ledger is not None and second.ledger is not None and outcomes[0] is not None
    assert outcomes[0]["saved_step"] == 0 and outcomes[0]["last_step"] >= 5
    assert first.ledger.tokens_lost == outcomes[0]["last_step"] * 4 * 32
    assert first.ledger.seconds["lost"] > 0 and first.ledger.seconds["training"] == 0
    assert second.ledger.tokens_lost == 0 and second.ledger.seconds["training"] > 0  # it saved before it left
    assert second.ledger.seconds["queued"] == 0
    held = status.ledger.total_seconds - status.ledger.seconds["queued"]
    assert status.cost == pytest.approx(1000 * held / 3600)
    assert json.loads(json.dumps(to_plain(status), default=str))["ledger"] == to_plain(
        total([first.ledger, second.ledger])
    )


def _steps(attempt: AttemptDirectory) -> int:
    return sum(isinstance(told, StepEvent) for _, told in read_events(attempt.events))
