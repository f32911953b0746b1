"""What is out of the ordinary: robust scores against normal values, real curves, and what skipped steps add up to."""

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import compose
from orchestrator.plan import make_plan
from orchestrator.settings import NumericsSettings
from orchestrator.spikes import Doubt, Recent, interventions, new_levels, robust_score, skipped_steps, suspicion

SETTINGS = NumericsSettings()


def recent(count: int, *, seed: int = 0) -> Recent:
    """Return steps of a run that goes well: a loss about 2 that falls slowly, norms spread over their logarithm."""
    noise = random.Random(seed)
    losses = [2 - 1e-4 * step + noise.gauss(0, 0.02) for step in range(count)]
    return Recent(losses=tuple(losses), norms=tuple(math.exp(noise.gauss(-1, 0.1)) for _ in range(count)))


def doubt(state: Recent, loss: float, norm: float, **settings: float) -> Doubt | None:
    found = suspicion(state, loss, norm, dataclasses.replace(SETTINGS, **settings))
    return None if found is None else found.doubt


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (2.0, 0.37, None),
        (2.0, 0.8, None),
        (1.0, 0.01, None),  # a fall harms nothing
        (2.5, 0.37, Doubt.LOSS_SPIKE),
        (2.0, 3.0, Doubt.NORM_SPIKE),
        (2.5, 3.0, Doubt.LOSS_SPIKE),
        (math.nan, math.nan, Doubt.LOSS_NOT_FINITE),
        (math.inf, 1.0, Doubt.LOSS_NOT_FINITE),
        (2.0, math.nan, Doubt.NORM_NOT_FINITE),
        (2.0, math.inf, Doubt.NORM_NOT_FINITE),
        (2.0, 0.0, None),
    ],
)
def test_a_step_is_in_doubt_where_its_numbers_are_none_or_far_above_those_before(
    loss: float, norm: float, expected: Doubt | None
) -> None:
    assert doubt(recent(128), loss, norm) == expected


def test_there_are_no_spikes_before_half_a_window_and_none_where_none_are_looked_for() -> None:
    assert doubt(recent(63), 9.0, 9.0) is None
    assert doubt(recent(64), 9.0, 9.0) == Doubt.LOSS_SPIKE
    assert doubt(recent(128), 9.0, 9.0, spike_score=0.0) is None
    assert doubt(Recent(), math.nan, 1.0, spike_score=0.0) == Doubt.LOSS_NOT_FINITE


def test_the_score_of_normal_values_is_their_standard_score() -> None:
    noise = random.Random(1)
    values = [noise.gauss(5, 0.5) for _ in range(20_000)]
    assert robust_score(values, 7.0, 0.0) == pytest.approx(4.0, rel=0.03)  # (7 - 5) / 0.5


def test_spikes_among_the_steps_before_do_not_hide_the_next_one() -> None:
    state = recent(128)
    spiked = dataclasses.replace(state, losses=(*state.losses[:-20], *[6.0] * 20))
    assert doubt(spiked, 3.0, 0.37) == Doubt.LOSS_SPIKE
    mean, deviation = statistics.mean(spiked.losses), statistics.stdev(spiked.losses)
    assert (3.0 - mean) / deviation < 1  # which is why the median and not the mean


def test_losses_that_hardly_move_have_no_spikes_of_rounding() -> None:
    flat = Recent(losses=(1.5,) * 128, norms=(1.0,) * 128)
    assert doubt(flat, 1.5 * (1 + 5e-3), 1.05) is None
    assert doubt(flat, 1.5 * (1 + 5e-2), 1.0) == Doubt.LOSS_SPIKE


def test_a_level_that_stays_up_becomes_the_ordinary_one() -> None:
    state, spikes = recent(128), 0
    for _ in range(128):
        spikes += doubt(state, 2.6, 0.37) == Doubt.LOSS_SPIKE
        state = state.after(2.6, 0.37, SETTINGS.window)
    assert 0 < spikes <= 64
    assert len(state.losses) == len(state.norms) == 128


def test_numbers_are_not_compared_across_a_new_phase_or_a_thaw() -> None:
    settings = compose(
        "demo-base",
        [
            "data.phases=[{from_tokens: 100000, train: [other]}]",
            "training.frozen=[{what: embeddings, steps: 7}]",
        ],
    )
    plan = make_plan(settings)
    assert new_levels(plan) == {8, -(-100000 // plan.tokens_per_step) + 1}
    assert new_levels(make_plan(compose("demo-base"))) == set()


SPANS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))), max_size=8)


@given(SPANS, st.integers(0, 60))
def test_skipped_steps_are_counted_once_however_their_spans_overlap(spans: list[tuple[int, int]], after: int) -> None:
    assert skipped_steps(spans, after) == len({s for first, last in spans for s in range(first, last + 1) if s > after})


def test_a_rollback_counts_once_and_only_within_the_window() -> None:
    spans = [(5, 5), (90, 100), (101, 101)]
    assert interventions(spans, 102, 128) == 3
    assert interventions(spans, 134, 128) == 2
    assert interventions(spans, 250, 128) == 0
