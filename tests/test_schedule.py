"""The learning rate of every step, against the formulas of the papers and torch's own cosine; how a plan shows it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.plan import make_plan
from orchestrator.schedule import BatchSpan, learning_rate, total_steps
from orchestrator.schedule_table import schedule_lines, schedule_rows
from orchestrator.settings import TrainingSettings

STEPS = 200


def training(**fields: object) -> TrainingSettings:
    given = {"tokens": 1, "learning_rate": 3e-4, "minimum_learning_rate": 3e-5, "warmup_share": 0.1, **fields}
    return TrainingSettings(**given)  # type: ignore[arg-type]


def test_the_last_step_is_whole() -> None:
    def steps(tokens: int, batch_size: int, sequence_length: int) -> int:
        return total_steps([BatchSpan(first_step=1, first_sample=0, batch_size=batch_size)], tokens, sequence_length)

    assert steps(1000, 10, 10) == 10
    assert steps(1001, 10, 10) == 11
    assert steps(1, 10, 10) == 1
    assert steps(10**12, 1024, 4096) == 238_419


def test_the_warm_up_rises_in_equal_parts_to_the_full_rate() -> None:
    rates = [learning_rate(training(), step, STEPS) for step in range(1, 21)]
    assert rates == pytest.approx([3e-4 * step / 20 for step in range(1, 21)])
    assert rates[-1] == 3e-4


def test_the_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180, eta_min=3e-5)
    for step in range(20, STEPS + 1):
        assert learning_rate(training(), step, STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_linear_decay_is_half_way_down_at_half_of_its_steps() -> None:
    linear = training(decay="linear")
    assert learning_rate(linear, 110, STEPS) == pytest.approx((3e-4 + 3e-5) / 2)
    assert learning_rate(linear, STEPS, STEPS) == pytest.approx(3e-5)


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    constant = training(decay="constant")
    assert {learning_rate(constant, step, STEPS) for step in range(20, STEPS + 1)} == {3e-4}


def test_without_warm_up_the_first_step_has_nearly_the_full_rate() -> None:
    assert learning_rate(training(warmup_share=0.0, decay="linear"), 1, 100) == pytest.approx(3e-4 - 2.7e-6)


def test_a_share_that_is_no_binary_fraction_gives_the_steps_that_it_says() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert learning_rate(training(warmup_share=0.07), 7, 100) == 3e-4


def test_a_run_of_one_step_takes_it_at_the_full_rate() -> None:
    assert learning_rate(training(), 1, 1) == 3e-4


def test_a_warm_up_may_begin_at_the_rate_that_the_base_ended_with() -> None:
    rates = [learning_rate(training(warmup_from=1e-5), step, STEPS) for step in range(1, 21)]
    assert rates == pytest.approx([1e-5 + 2.9e-4 * step / 20 for step in range(1, 21)])


def test_a_warm_up_in_steps_takes_the_place_of_its_share() -> None:
    assert [learning_rate(training(warmup_steps=4), step, STEPS) for step in (2, 4)] == pytest.approx([1.5e-4, 3e-4])
    assert learning_rate(training(warmup_steps=0, decay="constant"), 1, STEPS) == 3e-4


@pytest.mark.parametrize("form", ["1-sqrt", "linear"])
def test_wsd_stays_at_the_full_rate_and_decays_over_its_share_as_the_paper_says(form: str) -> None:
    wsd = training(decay="wsd", decay_share=0.2, decay_form=form)
    assert {learning_rate(wsd, step, STEPS) for step in range(20, 161)} == {3e-4}
    for step in range(161, STEPS + 1):
        # Hägele et al. 2024, section 3: n steps, the last N_decay of which decay.
        share = (step - (STEPS - 40)) / 40
        factor = 1 - math.sqrt(share) if form == "1-sqrt" else 1 - share
        assert learning_rate(wsd, step, STEPS) == pytest.approx(3e-5 + (3e-4 - 3e-5) * factor)
    assert learning_rate(wsd, STEPS, STEPS) == 3e-5


def test_a_wsd_run_prolonged_before_its_decay_goes_on_as_the_longer_one() -> None:
    wsd = training(decay="wsd", decay_share=0.1, warmup_steps=10)
    shorter = [learning_rate(wsd, step, 200) for step in range(1, 201)]
    longer = [learning_rate(wsd, step, 400) for step in range(1, 401)]
    assert shorter[:180] == longer[:180]
    assert longer[179:360] == [3e-4] * 181
    assert shorter[180] < 3e-4


@settings(deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    st.floats(min_value=0, max_value=0.99),
    st.integers(min_value=1, max_value=300),
)
def test_no_rate_is_outside_its_bounds_and_none_rises_after_the_warm_up(decay: str, share: float, steps: int) -> None:
    chosen = training(decay=decay, warmup_share=share)
    warmup = math.ceil(share * steps)
    rates = [learning_rate(chosen, step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert all(later <= earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert all(rate >= 3e-5 * (1 - 1e-12) for rate in rates[warmup:])


@settings(deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(min_value=0, max_value=0.99),
    st.integers(min_value=1, max_value=300),
)
def test_rates_of_earlier_versions_are_the_same_to_the_last_bit(decay: str, share: float, steps: int) -> None:
    """What version 0.5 computed, so that a run goes on with an upgrade as it would have without."""
    chosen = training(decay=decay, warmup_share=share)
    for step in range(1, steps + 1):
        warmup = math.ceil(round(share * steps, 6))
        progress = (step - warmup) / max(1, steps - warmup)
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
        before = 3e-5 + (3e-4 - 3e-5) * remaining if decay != "constant" else 3e-4
        assert learning_rate(chosen, step, steps) == (3e-4 * step / warmup if step <= warmup else before)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("warmup_from=1",), "training.warmup_from=1.0 should be from 0 to training.learning_rate=0.003"),
        (("warmup_steps=-1",), "training.warmup_steps=-1 should be 0 or more"),
        (("warmup_steps=129",), "training.warmup_steps=129 is beyond the run's 128 steps"),
        (("decay_share=0",), "training.decay_share=0.0 should be above 0 and at most 1"),
        (("decay=wsd", "decay_share=0.96"), "use a decay_share of at most 0.95"),
        (("decay=wsd", "decay_share=0.6", "warmup_steps=64"), "use a decay_share of at most 0.5, or a shorter warm-up"),
        (("decay=wds",), "training.decay should be one of cosine, linear, constant, wsd"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_what_would_do(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose("demo-base", [f"training.{override}" for override in overrides])
    assert problem in str(error.value)


def test_a_plan_shows_what_holds_from_which_step_to_which() -> None:
    ramp = "training.batch_ramp=[{global_batch_size: 8, until_tokens: 8192}]"
    given = ["training.decay=wsd", "layout.global_batch_size=16", ramp, "training.warmup_steps=4"]
    plan = make_plan(compose("demo-base", [*given, "training.frozen=[{what: layers 0-3, steps: 5}]"]))
    assert plan.total_steps == 8 + 60  # 8,192 of 131,072 tokens at 8 x 128 a step, the rest at 16 x 128
    rows = schedule_rows(plan)
    assert [(row.what, row.first_step, row.last_step, row.last_token) for row in rows] == [
        ("warm-up", 1, 4, 4096),
        ("full rate", 5, 61, 8192 + 53 * 2048),
        ("1-sqrt decay", 62, 68, 131072),
        ("batch", 1, 8, 8192),
        ("batch", 9, 68, 131072),
        ("frozen layers 0-3", 1, 5, 5120),
    ]
    assert [(row.begins_with, row.ends_with) for row in rows[1:5:3]] == [(3e-3, 3e-3), (16, 16)]
    lines = dict(schedule_lines(plan, 32))
    assert lines == {"rate": "▅" + "█" * 28 + "▅▃▂", "batch": "▅▅" + "█" * 30}
