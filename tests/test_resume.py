"""What survives a stop: weights, optimizer, schedule and data order, bit for bit at the same layout."""

import shutil
import time

import pytest
import torch

from megatron_solar.checkpoint_files import open_verified
from orchestrator import exit_codes
from orchestrator.checkpoints import choose_checkpoint
from orchestrator.config import recompose
from orchestrator.events import EndEvent, StartEvent, StepEvent
from orchestrator.files import write_json
from orchestrator.plan import TrainingPlan, make_plan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from tests.conftest import Trainer, events_of, losses, relative_difference

STEPS = 12
TP2_PP2_VPP2_SP = (
    "layout.tensor_parallel=2",
    "layout.pipeline_parallel=2",
    "layout.virtual_pipeline_parallel=2",
    "layout.sequence_parallel=true",
    "cluster.ranks_per_node=4",
)
DP4 = ("cluster.ranks_per_node=4",)
TP2_DP2 = ("layout.tensor_parallel=2", "cluster.ranks_per_node=4")
BACK_TO_ONE_RANK = (
    "layout.tensor_parallel=1",
    "layout.pipeline_parallel=1",
    "layout.virtual_pipeline_parallel=1",
    "layout.sequence_parallel=false",
)
LAYOUTS = [
    pytest.param(("cluster.ranks_per_node=1",), id="one rank"),
    pytest.param(
        ("cluster.ranks_per_node=2", "layout.tensor_parallel=2", "layout.sequence_parallel=true"), id="TP2-SP"
    ),
    pytest.param(("cluster.ranks_per_node=2",), id="DP2"),
    pytest.param(("cluster.ranks_per_node=2", "precision=bf16"), id="DP2-bf16"),
    pytest.param(
        ("cluster.ranks_per_node=2", "layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2"), id="PP2-VPP2"
    ),
]


def stop_after(trainer: Trainer, run: RunDirectory, plan: TrainingPlan, step: int) -> AttemptDirectory:
    """Start an attempt and ask it to stop as the supervisor does, once a step was told of."""
    attempt, ranks = trainer.start(run, plan)
    deadline = time.monotonic() + 60
    while not any(isinstance(e, StepEvent) and e.step >= step for e in events_of(attempt)):
        assert time.monotonic() < deadline, attempt.rank_log(0).read_text()
        time.sleep(0.002)
    write_json(attempt.stop_request, {"reason": "time_limit"})
    codes = trainer.wait(run, attempt, ranks)
    assert set(codes) == {exit_codes.SAVED_AND_LEFT}, attempt.rank_log(0).read_text()
    return attempt


def final_tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    tensors = open_verified(choose_checkpoint(run, STEPS))
    return {name: tensors.whole(name) for name in tensors.names()}


@pytest.mark.parametrize("overrides", LAYOUTS)
def test_a_run_stopped_and_resumed_equals_one_never_stopped_bit_for_bit(
    trainer: Trainer, overrides: tuple[str, ...]
) -> None:
    undisturbed, plan = trainer.make_run(*overrides, steps=STEPS)
    whole = trainer.train(undisturbed, plan)
    interrupted, plan = trainer.make_run(*overrides, steps=STEPS)
    first = stop_after(trainer, interrupted, plan, 3)
    second = trainer.train(interrupted, plan)

    ends = [event for event in events_of(first) if isinstance(event, EndEvent)]
    starts = [event for event in events_of(second) if isinstance(event, StartEvent)]
    assert ends[0].reason == "time_limit" and 3 < ends[0].step < STEPS
    assert starts[0].step == ends[0].step
    assert losses(first, second) == losses(whole)
    left, right = final_tensors(interrupted), final_tensors(undisturbed)
    assert left.keys() == right.keys() and any("exp_avg_sq" in key for key in left)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(TP2_PP2_VPP2_SP, DP4, id="TP2-PP2-VPP2-SP to DP4"),
        pytest.param(DP4, TP2_PP2_VPP2_SP, id="DP4 to TP2-PP2-VPP2-SP"),
        pytest.param((), TP2_DP2, id="one rank to TP2-DP2"),
    ],
)
def test_a_run_resumed_at_another_layout_stays_within_sums_of_another_order(
    trainer: Trainer, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    undisturbed, plan = trainer.make_run(*before, steps=STEPS)
    whole = trainer.train(undisturbed, plan)
    run, plan = trainer.make_run(*before, steps=STEPS)
    first = stop_after(trainer, run, plan, 3)
    moved = make_plan(recompose(plan.settings, BACK_TO_ONE_RANK + after))
    write_plan(run.launched_plan, moved)
    second = trainer.train(run, moved)
    difference = relative_difference(losses(first, second), losses(whole))
    print(f"{plan.layout.describe()} to {moved.layout.describe()}: {difference:.1e}")
    assert moved.layout != plan.layout
    assert difference < 1e-6


def test_another_layout_reads_the_same_weights_and_moments_bit_for_bit(trainer: Trainer) -> None:
    run, plan = trainer.make_run(*TP2_PP2_VPP2_SP, steps=4)
    trainer.train(run, plan)
    before = open_verified(choose_checkpoint(run, 4))
    for layout in (DP4, TP2_DP2):
        moved = make_plan(recompose(plan.settings, (*BACK_TO_ONE_RANK, *layout, "training.tokens=640")))
        attempt, ranks = trainer.start(run, moved)
        write_json(attempt.stop_request, {"reason": "time_limit"})  # one step, which leaves nothing as it was
        trainer.wait(run, attempt, ranks)
        assert [e.step for e in events_of(attempt) if isinstance(e, StartEvent)] == [4]
        after = open_verified(choose_checkpoint(run, 5))
        assert after.names() == before.names()
        assert not torch.equal(after.whole(before.names()[0]), before.whole(before.names()[0]))
        shutil.rmtree(choose_checkpoint(run, 5).path)
