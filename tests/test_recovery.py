"""What follows an ending: a table of histories."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.exit_codes import Cause
from orchestrator.recovery import Action, Decision, Ending, decide

KILLED, LIMIT, PREEMPTED = Cause.RANK_KILLED, Cause.TIME_LIMIT, Cause.PREEMPTED
HANG, MEMORY, STORAGE = Cause.HANG, Cause.OUT_OF_MEMORY, Cause.STORAGE
CHECK, FAILED = Cause.NODE_CHECK, Cause.SUPERVISOR_FAILED
STOPPING = (
    Cause.CANCELLED, Cause.STOPPED, Cause.EXCEPTION, Cause.NOT_FINITE, Cause.BAD_DATA, Cause.BAD_CONFIG,
    Cause.BAD_CHECKPOINT, Cause.SPIKE, Cause.PRECISION,
)  # fmt: skip


def follow(*endings: tuple[Cause, int], most: int = 2, apart: int = 10, started_from: int = 0) -> Decision:
    """Decide on the last of some endings."""
    *history, last = [Ending(cause=cause, saved_step=step) for cause, step in endings]
    return decide(history, last, most, apart, started_from=started_from)


@pytest.mark.parametrize(
    ("endings", "action"),
    [
        pytest.param([(Cause.FINISHED, 100)], Action.FINISH, id="finished"),
        pytest.param([(KILLED, 0), (Cause.FINISHED, 0)], Action.FINISH, id="finished-after-a-failure"),
        pytest.param([(KILLED, 0)], Action.RESTART, id="killed-before-the-first-checkpoint"),
        pytest.param([(KILLED, 0), (KILLED, 0)], Action.STOP, id="twice-before-the-first-checkpoint"),
        pytest.param([(KILLED, 20)], Action.RESTART, id="killed-after-progress"),
        pytest.param([(KILLED, 20), (KILLED, 20)], Action.RESTART, id="once-without-progress"),
        pytest.param([(KILLED, 20), (KILLED, 20), (KILLED, 20)], Action.STOP, id="twice-without-progress"),
        pytest.param([(KILLED, 20), (KILLED, 20), (KILLED, 40)], Action.RESTART, id="progress-resets"),
        pytest.param([(KILLED, 0), (KILLED, 20), (KILLED, 20)], Action.RESTART, id="progress-between-resets"),
        pytest.param([(LIMIT, 500)], Action.REQUEUE, id="time-limit"),
        pytest.param([(PREEMPTED, 500)], Action.REQUEUE, id="preempted"),
        pytest.param([(LIMIT, 500), (KILLED, 500)], Action.RESTART, id="a-good-job-and-then-one-failure"),
        pytest.param([(LIMIT, 500), (KILLED, 500), (KILLED, 500)], Action.STOP, id="a-good-job-and-two-failures"),
        pytest.param([(KILLED, 500), (LIMIT, 500)], Action.REQUEUE, id="a-failure-and-then-the-time-limit"),
        pytest.param([(PREEMPTED, 0)], Action.REQUEUE, id="preempted-while-starting"),
        pytest.param([(PREEMPTED, 0)] * 9, Action.REQUEUE, id="preempted-nine-times-while-starting"),
        pytest.param([(PREEMPTED, 0)] * 10, Action.STOP, id="never-got-anywhere"),
        pytest.param([(CHECK, 0), (PREEMPTED, 0)] * 5, Action.STOP, id="never-got-anywhere-for-two-reasons"),
        pytest.param([(CHECK, 0), (CHECK, 0)], Action.RESTART, id="too-few-healthy-nodes-are-no-failure"),
        pytest.param([(KILLED, 0), (PREEMPTED, 0)], Action.REQUEUE, id="a-failure-and-a-preemption-are-counted-apart"),
        pytest.param([(KILLED, 0), (PREEMPTED, 0), (KILLED, 0)], Action.STOP, id="two-failures-around-a-preemption"),
        pytest.param([(KILLED, 0), *[(PREEMPTED, 0)] * 9], Action.REQUEUE, id="a-failure-and-nine-preemptions"),
        pytest.param([(HANG, 20)], Action.RESTART, id="a-hang"),
        pytest.param([(Cause.HARDWARE, 20)], Action.RESTART, id="a-rank-that-computed-wrongly"),
        pytest.param([(HANG, 20), (KILLED, 20), (HANG, 20)], Action.STOP, id="a-hang-and-a-kill-at-one-step"),
        pytest.param([(LIMIT, 0), (LIMIT, 0)], Action.STOP, id="two-whole-jobs-and-no-checkpoint"),
        pytest.param([(MEMORY, 0)], Action.STOP, id="out-of-memory-at-once"),
        pytest.param([(MEMORY, 20)], Action.RESTART, id="out-of-memory-after-progress"),
        pytest.param([(MEMORY, 20), (MEMORY, 20)], Action.STOP, id="out-of-memory-again"),
        pytest.param([(FAILED, 0)], Action.REQUEUE, id="the-supervisor-raised"),
        pytest.param([(FAILED, 0), (FAILED, 0)], Action.STOP, id="the-supervisor-raised-twice"),
        pytest.param([(FAILED, 20), (FAILED, 40)], Action.REQUEUE, id="the-supervisor-raised-after-progress"),
        pytest.param([(STORAGE, 20)] * 9, Action.RESTART, id="storage-comes-and-goes"),
        pytest.param([(KILLED, 40), (KILLED, 20)], Action.RESTART, id="a-checkpoint-was-removed"),
        pytest.param([(KILLED, 40), (KILLED, 20), (KILLED, 20)], Action.STOP, id="and-removing-it-did-not-help"),
        *[pytest.param([(cause, 20)], Action.STOP, id=str(cause)) for cause in STOPPING],
        *[pytest.param([(LIMIT, 10), (cause, 20)], Action.STOP, id=f"{cause}-with-progress") for cause in STOPPING],
    ],
)
def test_an_ending_is_followed_by_what_its_history_says(endings: list[tuple[Cause, int]], action: Action) -> None:
    assert follow(*endings).action == action


def test_preemptions_with_progress_go_on_for_ever() -> None:
    endings = [(PREEMPTED, step) for step in range(10, 5000, 10)]
    assert all(follow(*endings[:count]).action == Action.REQUEUE for count in (1, 2, 100, len(endings)))


def test_what_stops_a_run_without_progress_is_told() -> None:
    assert follow((KILLED, 20), (LIMIT, 20), (KILLED, 20)).why == (
        "no progress beyond step 20 in 2 attempts (time_limit, rank_killed)"
    )
    assert follow((KILLED, 0), most=1).why == "no progress beyond step 0 in 1 attempt (rank_killed)"


def test_a_resumed_run_is_measured_from_where_it_was_resumed() -> None:
    assert follow((KILLED, 20), (KILLED, 20), started_from=20).action == Action.STOP
    assert follow((KILLED, 20), (KILLED, 20), started_from=10).action == Action.RESTART
    assert follow((Cause.SUPERVISOR_LOST, 20), (KILLED, 20), started_from=20).action == Action.STOP


def test_a_restart_says_from_where() -> None:
    assert follow((KILLED, 20)).why == "ranks start again from step 20"


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_a_decision_with_a_reason(cause: Cause) -> None:
    assert follow((cause, 20)).why


endings = st.tuples(st.sampled_from([KILLED, LIMIT, PREEMPTED, HANG]), st.integers(min_value=0, max_value=4))


@settings(deadline=None)
@given(st.lists(endings, min_size=1), st.integers(min_value=1, max_value=4), st.integers(min_value=1, max_value=6))
def test_no_run_goes_on_without_progress_and_none_with_progress_stops(
    made: list[tuple[Cause, int]], most: int, apart: int
) -> None:
    steps = [0, *(step for _, step in made)]
    is_stopped = follow(*made, most=most, apart=apart).action == Action.STOP
    progress = [i for i, (earlier, later) in enumerate(itertools.pairwise(steps)) if later > earlier]
    lately = [cause == PREEMPTED for cause, _ in made[progress[-1] + 1 if progress else 0 :]]
    preempted, failed = sum(lately), len(lately) - sum(lately)
    was_preempted = made[-1][0] == PREEMPTED
    assert is_stopped == (bool(lately) and (preempted >= apart if was_preempted else failed >= most))
