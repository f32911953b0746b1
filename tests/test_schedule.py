"""The learning rate of every step, against the formulas of the papers and torch's own cosine."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule import learning_rate, total_steps
from orchestrator.settings import TrainingSettings

STEPS = 200


def training(**fields: object) -> TrainingSettings:
    given = {"tokens": 1, "learning_rate": 3e-4, "minimum_learning_rate": 3e-5, "warmup_share": 0.1, **fields}
    return TrainingSettings(**given)  # type: ignore[arg-type]


def test_the_last_step_is_whole() -> None:
    assert total_steps(training(tokens=1000), 100) == 10
    assert total_steps(training(tokens=1001), 100) == 11
    assert total_steps(training(tokens=1), 100) == 1
    assert total_steps(training(tokens=10**12), 1024 * 4096) == 238_419


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


@settings(deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "constant"]),
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
