"""What survives a stop: weights, optimizer, schedule and data order, bit for bit at the same layout."""

import dataclasses
import time

import pytest
import torch

from megatron_solar.export import CheckpointTensors
from orchestrator import exit_codes
from orchestrator.checkpoints import choose_checkpoint, complete_checkpoints
from orchestrator.events import EndEvent, StartEvent, StepEvent
from orchestrator.files import write_json
from orchestrator.plan import TrainingPlan, make_plan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from tests.conftest import Trainer, events_of, losses, relative_difference

STEPS = 12
LAYOUTS = [
    pytest.param(("cluster.ranks_per_node=1",), id="one rank"),
    pytest.param(
        ("cluster.ranks_per_node=2", "layout.tensor_parallel=2", "layout.sequence_parallel=true"), id="TP2-SP"
    ),
    pytest.param(("cluster.ranks_per_node=2",), id="DP2"),
    pytest.param(("cluster.ranks_per_node=2", "training.precision=bf16"), id="DP2-bf16"),
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
    read = CheckpointTensors(choose_checkpoint(run, STEPS))
    return {key: read(key) for key in read.keys()}  # noqa: SIM118


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


def test_a_run_resumed_at_another_layout_stays_within_sums_of_another_order(trainer: Trainer) -> None:
    undisturbed, plan = trainer.make_run(steps=STEPS)
    whole = trainer.train(undisturbed, plan)
    run, plan = trainer.make_run(steps=STEPS)
    first = stop_after(trainer, run, plan, 3)
    settings = dataclasses.replace(
        plan.settings,
        layout=dataclasses.replace(plan.settings.layout, tensor_parallel=2, sequence_parallel=True),
        cluster=dataclasses.replace(plan.settings.cluster, ranks_per_node=4),
    )
    moved = make_plan(settings)
    write_plan(run.plan, moved)
    second = trainer.train(run, moved)
    difference = relative_difference(losses(first, second), losses(whole))
    print(f"{plan.layout.describe()} to {moved.layout.describe()}: {difference:.1e}")
    assert difference < 1e-6


def test_a_flipped_byte_in_the_newest_checkpoint_is_named_and_nothing_is_trained(trainer: Trainer) -> None:
    run, plan = trainer.make_run(steps=2)
    trainer.train(run, plan)
    checkpoint = complete_checkpoints(run)[-1]
    path = next(checkpoint.path.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    attempt, ranks = trainer.start(run, plan)
    codes = trainer.wait(run, attempt, ranks)
    assert codes == [exit_codes.BAD_CHECKPOINT]
    assert events_of(attempt) == []
    assert f"{path} does not have the SHA-256" in attempt.rank_log(0).read_text()


def test_a_checkpoint_of_other_data_is_refused(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> None:
    run, plan = trainer.make_run(steps=2)
    trainer.train(run, plan)
    marker = complete_checkpoints(run)[-1].path / "complete.json"
    marker.write_text(marker.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))
    attempt, ranks = trainer.start(run, plan)
    assert trainer.wait(run, attempt, ranks) == [exit_codes.BAD_CHECKPOINT]
    assert "put the data sets back as they were" in attempt.rank_log(0).read_text()
