"""Steps that are done again: what is compared with what, and what is told of it."""

import dataclasses
import math

import pytest

from orchestrator.config import compose
from orchestrator.events import RepeatEvent
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.repeats import NOISE, EarlierAttempt, RecordedStep, RepeatedSteps, noise, recorded_losses

PLAN = make_plan(compose("demo-base"))


def with_(**changes: dict[str, object]) -> TrainingPlan:
    """Return the plan with fields of its sections changed."""
    settings = PLAN.settings
    for section, fields in changes.items():
        settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **fields)})
    return make_plan(settings)


GPU = {"device": "cuda"}
BF16_ON_GPU = with_(cluster=GPU, precision={"dtype": "bf16"})
EXACT_ON_GPU = with_(cluster=GPU, training={"deterministic": True})


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (PLAN, PLAN, 0.0),
        (PLAN, with_(checkpoint={"keep_last": 9}, cluster={"time_limit": "2:00:00"}), 0.0),
        (PLAN, with_(cluster={"ranks_per_node": 2}), NOISE["fp32"]),
        (with_(cluster=GPU), with_(cluster=GPU), NOISE["fp32"]),
        (BF16_ON_GPU, BF16_ON_GPU, NOISE["bf16"]),
        (EXACT_ON_GPU, EXACT_ON_GPU, 0.0),
        (PLAN, with_(cluster=GPU), NOISE["fp32"]),
        (PLAN, with_(training={"learning_rate": 1e-3}), None),
        (PLAN, with_(training={"tokens": 10**7}), None),
        (PLAN, with_(data={"weights": (1.0,)}), None),
        (PLAN, with_(numerics={"on_spike": "record"}), None),
        (PLAN, with_(numerics={"rank_time_steps": 7, "replica_check_steps": 0}), 0.0),
    ],
)  # fmt: skip
def test_the_noise_is_none_where_the_same_bits_are_due(
    before: TrainingPlan, now: TrainingPlan, expected: float | None
) -> None:
    assert noise(before, now) == expected


def test_the_newest_attempt_that_did_a_step_is_what_it_is_compared_with() -> None:
    first = EarlierAttempt(plan=PLAN, losses={1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0})
    second = EarlierAttempt(plan=PLAN, losses={3: 7.5})
    assert recorded_losses([first, second], PLAN, after_step=1) == {
        2: RecordedStep(8.0, 0.0),
        3: RecordedStep(7.5, 0.0),
        4: RecordedStep(6.0, 0.0),
    }
    other = EarlierAttempt(plan=with_(training={"learning_rate": 1e-3}), losses={4: 5.0})
    assert recorded_losses([first, second, other], PLAN, after_step=2) == {
        3: RecordedStep(7.5, 0.0)
    }  # 4 was trained otherwise
    unreadable = EarlierAttempt(plan=None, losses={3: 1.0})
    assert recorded_losses([first, unreadable], PLAN, after_step=2) == {4: RecordedStep(6.0, 0.0)}


def told_of(
    recorded: dict[int, tuple[float, float]],
    losses: dict[int, float],
    was_skipped: frozenset[int] = frozenset(),
    is_skipped: frozenset[int] = frozenset(),
) -> list[tuple[int, int, int, bool]]:
    told: list[RepeatEvent] = []
    steps = {step: RecordedStep(*known, step in was_skipped) for step, known in recorded.items()}
    repeats = RepeatedSteps(steps, min(losses) - 1, told.append)
    for step, loss in losses.items():
        repeats.compare(step, loss, is_skipped=step in is_skipped)
    repeats.finish()
    return [(event.first_step, event.last_step, event.step, event.is_beyond_noise) for event in told]


@pytest.mark.parametrize(
    ("recorded", "losses", "expected"),
    [
        ({}, {5: 1.0, 6: 1.0}, []),
        ({5: (1.0, 0.0), 6: (2.0, 0.0)}, {5: 1.0, 6: 2.0, 7: 3.0}, [(5, 6, 6, False)]),
        ({5: (1.0, 0.0), 6: (2.0, 0.0), 7: (3.0, 0.0)}, {5: 1.0, 6: 2.0}, [(5, 6, 6, False)]),  # stopped in between
        ({5: (1.0, 0.1), 6: (2.0, 0.1)}, {5: 1.05, 6: 2.0}, [(5, 6, 5, False)]),
        ({5: (1.0, 0.0), 6: (2.0, 0.0), 7: (3.0, 0.0)}, {5: 1.0, 6: 2.1, 7: 3.0}, [(5, 6, 6, True), (7, 7, 7, False)]),
    ],
)
def test_what_is_told_names_the_steps_and_the_worst_of_them(
    recorded: dict[int, tuple[float, float]], losses: dict[int, float], expected: list[tuple[int, int, int, bool]]
) -> None:
    assert told_of(recorded, losses) == expected


THREE = {5: (1.0, 0.0), 6: (2.0, 0.0), 7: (3.0, 0.0)}
SIX = frozenset({6})


@pytest.mark.parametrize(
    ("losses", "was_skipped", "is_skipped", "expected"),
    [
        pytest.param({5: 1.0, 6: 2.0, 7: 3.0}, SIX, SIX, [(5, 7, 7, False)], id="skipped both times"),
        pytest.param({5: 1.0, 6: 2.0, 7: 9.0}, SIX, frozenset(), [(5, 6, 6, False)], id="skipped before, applied now"),
        pytest.param({5: 1.0, 6: 2.0, 7: 9.0}, frozenset(), SIX, [(5, 6, 6, False)], id="skipped now alone"),
        pytest.param({5: 1.0, 6: math.nan, 7: 9.0}, frozenset(), SIX, [(5, 6, 6, False)], id="no number now"),
        pytest.param({5: 1.0, 6: 2.0, 7: 9.0}, SIX, SIX, [(5, 7, 7, True)], id="another loss after the same skip"),
    ],
)
def test_steps_that_only_one_of_two_attempts_skipped_are_the_end_of_what_can_be_compared(
    losses: dict[int, float], was_skipped: frozenset[int], is_skipped: frozenset[int], expected: list[object]
) -> None:
    assert told_of(THREE, losses, was_skipped, is_skipped) == expected


def test_a_step_that_gave_no_number_either_time_is_no_difference() -> None:
    assert told_of({5: (math.nan, 0.0)}, {5: math.nan}, frozenset({5}), frozenset({5})) == [(5, 5, 5, False)]
