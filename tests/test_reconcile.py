"""Where a run stands: a table of what the folder holds and what the scheduler says."""

import itertools
from typing import Any

import pytest

from orchestrator.exit_codes import Cause
from orchestrator.reconcile import ENDED, JobAnswer, RunRecords, State, reconcile
from orchestrator.recovery import Action

PENDING, RUNNING, GONE, SILENT = JobAnswer.PENDING, JobAnswer.RUNNING, JobAnswer.GONE, JobAnswer.SILENT


def outcome(action: Action, cause: Cause, ended: float) -> dict[str, Any]:
    return {
        "action": str(action),
        "cause": str(cause),
        "ended": ended,
        "submissions": 1,
        "message": "what happened",
        "why": "what follows",
    }


def records(
    *outcomes: dict[str, Any] | None,
    submitted: tuple[float, ...] = (1.0,),
    cancelled: float | None = None,
    heard: float | None = None,
    supervisor: float | None = None,
) -> RunRecords:
    attempts = [{"number": number, "outcome": found} for number, found in enumerate(outcomes, 1)]
    return RunRecords(
        submitted=submitted, attempts=attempts, cancel_asked=cancelled, last_heard=heard, supervisor_heard=supervisor
    )


FINISHED = outcome(Action.FINISH, Cause.FINISHED, 5.0)
CRASHED = outcome(Action.STOP, Cause.EXCEPTION, 5.0)
CANCELLED = outcome(Action.STOP, Cause.CANCELLED, 5.0)
STOPPED = outcome(Action.STOP, Cause.STOPPED, 5.0)
STUCK = outcome(Action.STOP, Cause.RANK_KILLED, 5.0)
REQUEUED = outcome(Action.REQUEUE, Cause.TIME_LIMIT, 5.0)
RESTARTED = outcome(Action.RESTART, Cause.RANK_KILLED, 5.0)
NOW = 10.0
AGAIN = (1.0, 6.0)
"""Submitted once more after the attempt ended."""
AWAY = "the scheduler does not answer"


@pytest.mark.parametrize(
    ("found", "job", "state"),
    [
        # Before the first attempt.
        (records(), PENDING, State.PENDING),
        (records(), RUNNING, State.PENDING),
        (records(), SILENT, State.UNKNOWN),
        (records(), GONE, State.FAILED),
        (records(submitted=()), GONE, State.FAILED),
        (records(cancelled=2.0), PENDING, State.PENDING),
        (records(cancelled=2.0), GONE, State.CANCELLED),
        (records(cancelled=2.0), SILENT, State.UNKNOWN),
        # An attempt without an outcome runs, or its supervisor was lost.
        (records(None), RUNNING, State.RUNNING),
        (records(None), SILENT, State.UNKNOWN),
        (records(None), GONE, State.FAILED),
        (records(None), PENDING, State.PENDING),  # Slurm requeued the job after a node failure
        (records(None, cancelled=2.0), RUNNING, State.RUNNING),
        (records(None, cancelled=2.0), GONE, State.CANCELLED),  # killed before it could say so
        (records(None, submitted=AGAIN), PENDING, State.PENDING),  # resumed after the supervisor was lost
        (records(RESTARTED, None), RUNNING, State.RUNNING),
        # The last attempt decided that the run has ended; the scheduler's word changes nothing.
        *[(records(FINISHED), job, State.FINISHED) for job in JobAnswer],
        *[(records(CRASHED), job, State.FAILED) for job in JobAnswer],
        *[(records(STUCK), job, State.FAILED) for job in JobAnswer],
        *[(records(CANCELLED, cancelled=4.0), job, State.CANCELLED) for job in JobAnswer],
        *[(records(STOPPED), job, State.STOPPED) for job in JobAnswer],
        (records(FINISHED, cancelled=5.5), GONE, State.FINISHED),  # too late to be cancelled
        # A person resumed it.
        (records(CRASHED, submitted=AGAIN), PENDING, State.PENDING),
        (records(CRASHED, submitted=AGAIN), RUNNING, State.PENDING),
        (records(CRASHED, submitted=AGAIN), SILENT, State.UNKNOWN),
        (records(CRASHED, submitted=AGAIN), GONE, State.FAILED),
        (records(STOPPED, submitted=AGAIN), GONE, State.FAILED),
        (records(CRASHED, submitted=AGAIN, cancelled=7.0), GONE, State.CANCELLED),
        (records(CANCELLED, None, submitted=AGAIN), RUNNING, State.RUNNING),
        # It goes on by itself, in this allocation or in another job.
        (records(RESTARTED), RUNNING, State.RUNNING),
        (records(RESTARTED), PENDING, State.PENDING),
        (records(RESTARTED), SILENT, State.UNKNOWN),
        (records(RESTARTED), GONE, State.FAILED),
        (records(REQUEUED), RUNNING, State.RUNNING),  # its supervisor has not left yet
        (records(REQUEUED), PENDING, State.PENDING),  # Slurm: the same job waits
        (records(REQUEUED), SILENT, State.UNKNOWN),
        (records(REQUEUED), GONE, State.STOPPED),
        (records(REQUEUED, cancelled=5.5), GONE, State.CANCELLED),  # cancelled while it waited
        (records(REQUEUED, submitted=AGAIN), PENDING, State.PENDING),  # locally: a job of its own
        (records(REQUEUED, submitted=AGAIN), RUNNING, State.PENDING),
        (records(REQUEUED, submitted=AGAIN), GONE, State.FAILED),
        (records(REQUEUED, None, submitted=AGAIN), RUNNING, State.RUNNING),
    ],
)
def test_a_run_stands_where_folder_and_scheduler_say(found: RunRecords, job: JobAnswer, state: State) -> None:
    assert reconcile("x", found, job, NOW).state == state


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause not in (Cause.FINISHED, Cause.CANCELLED)])
def test_every_cause_that_stops_a_run_or_has_it_requeued_is_in_its_reason(cause: Cause) -> None:
    stopped = {**outcome(Action.STOP, cause, 5.0), "message": "rank 3 stood still"}
    standing = reconcile("x", records(stopped), GONE, NOW)
    assert standing.state in ENDED and standing.cause == cause
    assert standing.reason == "rank 3 stood still; what follows"
    for job in (PENDING, RUNNING, SILENT, GONE):
        standing = reconcile("x", records(outcome(Action.REQUEUE, cause, 5.0)), job, NOW)
        assert str(cause) in standing.reason and "None" not in standing.reason


LASTS = (None, FINISHED, CRASHED, CANCELLED, STOPPED, STUCK, REQUEUED, RESTARTED)
EVERY = [
    (records(*([] if last == "none" else [last]), submitted=submitted, cancelled=cancelled), job)
    for last, submitted, cancelled, job in itertools.product(
        ("none", *LASTS), ((), (1.0,), AGAIN), (None, 5.5), JobAnswer
    )
]


def test_a_silent_scheduler_never_ends_a_run() -> None:
    for found, job in EVERY:
        if job == SILENT and not found.is_settled:
            assert reconcile("x", found, job, NOW).state == State.UNKNOWN


def test_a_living_job_never_ends_a_run() -> None:
    for found, job in EVERY:
        if job in (PENDING, RUNNING) and not found.is_settled:
            assert reconcile("x", found, job, NOW).state in (State.PENDING, State.RUNNING)


def test_a_job_that_is_gone_has_ended_its_run() -> None:
    for found, job in EVERY:
        if job == GONE:
            assert reconcile("x", found, job, NOW).state in ENDED


def test_every_standing_but_a_plain_running_has_a_reason_and_a_next_command() -> None:
    for found, job in EVERY:
        standing = reconcile("my-run", found, job, NOW)
        assert "my-run" in standing.actions[0]
        assert standing.reason or standing.state == State.RUNNING


def test_a_run_that_failed_again_before_its_attempt_does_not_show_the_old_reason() -> None:
    assert (
        reconcile("x", records(CRASHED, submitted=AGAIN), GONE, NOW).reason == "the job ended before its first attempt"
    )


def test_a_lost_supervisor_is_named() -> None:
    assert "supervisor_lost" in reconcile("x", records(None), GONE, NOW).reason
    assert "supervisor_lost" in reconcile("x", records(None), PENDING, NOW).reason


def test_a_requeued_run_says_why_it_waits() -> None:
    assert (
        reconcile("x", records(REQUEUED), PENDING, NOW).reason
        == "time_limit; the job was requeued and waits for the scheduler"
    )


@pytest.mark.parametrize(
    ("found", "job", "command"),
    [
        (records(FINISHED), GONE, "orchestrate export x --output DIR"),
        (records(CRASHED), GONE, "orchestrate why x"),
        (records(STOPPED), GONE, "orchestrate resume x"),
        (records(None), RUNNING, "orchestrate logs x --follow"),
        (records(), GONE, "orchestrate logs x --supervisor"),
        (records(None), GONE, "orchestrate resume x"),
    ],
)
def test_the_next_command_is_the_useful_one(found: RunRecords, job: JobAnswer, command: str) -> None:
    assert reconcile("x", found, job, NOW).actions[0] == command


@pytest.mark.parametrize(
    ("found", "job", "cause"),
    [
        (records(), PENDING, None),
        (records(None), RUNNING, None),
        (records(RESTARTED, None), RUNNING, None),
        (records(None), GONE, Cause.SUPERVISOR_LOST),
        (records(None, cancelled=2.0), GONE, Cause.CANCELLED),
        (records(REQUEUED), GONE, Cause.TIME_LIMIT),
        (records(CRASHED), GONE, Cause.EXCEPTION),
        (records(FINISHED), SILENT, Cause.FINISHED),
        (records(REQUEUED), PENDING, Cause.TIME_LIMIT),
    ],
)
def test_the_cause_is_that_of_the_newest_end(found: RunRecords, job: JobAnswer, cause: Cause | None) -> None:
    assert reconcile("x", found, job, NOW).cause == cause


@pytest.mark.parametrize(
    ("found", "job", "now", "reason"),
    [
        (records(None, heard=100.0), RUNNING, 160.0, ""),
        (records(None, heard=100.0), RUNNING, 820.0, "last heard 12 min 0 s ago; its ranks may hang"),
        (records(None, heard=100.0, cancelled=5.0), RUNNING, 820.0, "told to save and end"),
        # What was seen last, where the scheduler is silent.
        (records(submitted=(100.0,)), SILENT, 160.0, f"{AWAY}; last seen pending, submitted 1 min 0 s ago"),
        (records(None), SILENT, 160.0, f"{AWAY}; last seen running"),
        (records(None, heard=100.0), SILENT, 160.0, f"{AWAY}; last seen running 1 min 0 s ago"),
        (records(None, heard=100.0, supervisor=155.0), SILENT, 160.0, f"{AWAY}; last seen running 5.0 s ago"),
        (records(None, supervisor=165.0), SILENT, 160.0, f"{AWAY}; last seen running 0.0 s ago"),  # a clock ahead
        (records(None, heard=100.0, cancelled=90.0), SILENT, 160.0,
         f"{AWAY}; last seen running 1 min 0 s ago; a person has cancelled it"),
        (records(REQUEUED), SILENT, 10.0,
         f"{AWAY}; last seen pending, requeued after attempt 1 ended 5.0 s ago: time_limit"),
        (records(RESTARTED), SILENT, 10.0,
         f"{AWAY}; last seen running, about to start again after attempt 1 ended 5.0 s ago: rank_killed"),
        (records(CRASHED, submitted=AGAIN), SILENT, 10.0, f"{AWAY}; last seen pending, submitted 4.0 s ago"),
        # A job that is gone though no attempt ended the run.
        (records(None, heard=100.0, supervisor=155.0), GONE, 160.0,
         "supervisor_lost: the supervisor was killed, or its node died, before it could say why; last heard 5.0 s ago; "
         "a resume goes on from the newest checkpoint"),
        (records(REQUEUED), GONE, 10.0, "time_limit 5.0 s ago; it was to go on in another job, and there is none"),
        (records(RESTARTED), GONE, 10.0,
         "rank_killed 5.0 s ago; its ranks were to start again, and the supervisor was lost before"),
        (records(), PENDING, 100.0, "waiting for the scheduler"),
        (records(), PENDING, 7201.0, "waiting for the scheduler for 2 h 0 min"),
    ],
)  # fmt: skip
def test_what_time_adds_is_said(found: RunRecords, job: JobAnswer, now: float, reason: str) -> None:
    assert reconcile("x", found, job, now).reason == reason
