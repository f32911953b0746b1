"""The loop's numbers: every layout against one rank, and a resumed run against one never stopped.

fp32 on the CPU. The tolerance of 1e-6 relative is that of sums in another order; measured values are
in docs/log.md.
"""

import pytest
import torch

from tests.conftest import Trainer, losses, relative_difference, validation_losses

STEPS = 20


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer) -> tuple[list[float], list[float]]:
    run, plan = trainer.make_run(steps=STEPS)
    attempt = trainer.train(run, plan)
    return losses(attempt), validation_losses(attempt)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("layout.tensor_parallel=2", "cluster.ranks_per_node=2"), id="TP2"),
        pytest.param(("layout.pipeline_parallel=2", "cluster.ranks_per_node=2"), id="PP2"),
        pytest.param(
            ("layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2", "cluster.ranks_per_node=2"),
            id="PP2-VPP2",
        ),
        pytest.param(
            (
                "layout.tensor_parallel=2",
                "layout.pipeline_parallel=2",
                "layout.sequence_parallel=true",
                "cluster.ranks_per_node=4",
            ),
            id="TP2-PP2-SP",
        ),
        pytest.param(("cluster.ranks_per_node=2",), id="DP2"),
    ],
)
def test_twenty_steps_at_a_layout_have_the_losses_of_one_rank(
    trainer: Trainer, one_rank: tuple[list[float], list[float]], overrides: tuple[str, ...]
) -> None:
    run, plan = trainer.make_run(*overrides, steps=STEPS)
    attempt = trainer.train(run, plan)
    difference = relative_difference(losses(attempt), one_rank[0])
    held_out = relative_difference(validation_losses(attempt), one_rank[1])
    print(f"{plan.layout.describe()}: largest relative difference {difference:.1e}, held-out {held_out:.1e}")
    assert len(losses(attempt)) == STEPS
    assert difference < 1e-6
    assert held_out < 1e-6


def test_bf16_follows_fp32_within_its_rounding(trainer: Trainer, one_rank: tuple[list[float], list[float]]) -> None:
    run, plan = trainer.make_run("precision=bf16", steps=STEPS)
    attempt = trainer.train(run, plan)
    difference = relative_difference(losses(attempt), one_rank[0])
    print(f"bf16: largest relative difference {difference:.1e}")
    assert 0 < difference < 2e-2  # 8 bits of mantissa, 2**-8 = 4e-3, over 20 steps


def test_training_lowers_the_loss(one_rank: tuple[list[float], list[float]]) -> None:
    steps, held_out = one_rank
    assert steps[0] == pytest.approx(torch.tensor(32000.0).log().item(), rel=0.01)  # new weights know nothing
    assert held_out[-1] < held_out[0] - 0.2
