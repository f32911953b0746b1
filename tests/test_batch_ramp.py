"""A global batch that grows: which samples each step reads, and that a resume loses none and reads none twice."""

import dataclasses
import itertools
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solar.checkpoint_files import CheckpointTensors, open_verified
from orchestrator.checkpoints import checkpoint_name, choose_checkpoint
from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.events import RepeatEvent, StartEvent, StepEvent
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.schedule_checks import past_problems
from orchestrator.settings import BatchStage
from tests.conftest import Trainer, events_of, losses

RAMP = "training.batch_ramp=[{global_batch_size: 2, until_tokens: 160}, {global_batch_size: 4, until_tokens: 400}]"
"""At 32 tokens a sample: 3 steps of 2 samples, since 5 are needed and steps are whole, then 2 of 4 up to 14."""
TWO_RANKS = ("cluster.ranks_per_node=2", "layout.global_batch_size=8", f"training.tokens={38 * 32}")


def plan_of(*overrides: str) -> TrainingPlan:
    return make_plan(compose("demo-base", ["layout.micro_batch_size=1", *overrides]))


SETTINGS = compose("demo-base", ["layout.micro_batch_size=1"])


def test_a_stage_ends_with_the_step_that_reaches_its_tokens() -> None:
    plan = plan_of("data.sequence_length=32", "layout.global_batch_size=8", "training.tokens=1216", RAMP)
    assert [plan.batch_size(step) for step in range(1, plan.total_steps + 1)] == [2, 2, 2, 4, 4, 8, 8, 8]
    assert [plan.consumed_samples(step) for step in range(9)] == [0, 2, 4, 6, 10, 14, 22, 30, 38]
    assert plan.total_tokens == 38 * 32


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), max_size=4),
    st.integers(1, 9),
    st.integers(1, 2000),
    st.integers(1, 20),
)
def test_steps_samples_and_tokens_are_those_of_counting_them_one_by_one(
    stages: list[tuple[int, int]], final: int, tokens: int, length: int
) -> None:
    untils = sorted({until for _, until in stages})
    pairs = zip(stages, untils, strict=False)  # of equal ends one stage is left
    ramp = [BatchStage(global_batch_size=size, until_tokens=until) for (size, _), until in pairs]
    tokens = max(tokens, final * length)
    plan = make_plan(
        dataclasses.replace(
            SETTINGS,
            data=dataclasses.replace(SETTINGS.data, sequence_length=length),
            layout=dataclasses.replace(SETTINGS.layout, global_batch_size=final),
            training=dataclasses.replace(SETTINGS.training, tokens=tokens, batch_ramp=tuple(ramp)),
        )
    )
    step, samples = 0, 0
    while samples * length < tokens:
        left = [stage.global_batch_size for stage in ramp if stage.until_tokens > samples * length]
        size = left[0] if left else final
        step, samples = step + 1, samples + size
        assert (plan.batch_size(step), plan.consumed_samples(step)) == (size, samples)
        assert plan.num_microbatches(step) == size
    assert (plan.total_steps, plan.total_tokens) == (step, samples * length)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ((), "training.batch_ramp[0].global_batch_size=6 does not divide by 4"),
        ((), "use global_batch_size 4 or 8"),
        (("layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2"), "training.batch_ramp[0].global_batch_"),
        (
            ("training.batch_ramp=[{global_batch_size: 4, until_tokens: 9}, {global_batch_size: 8, until_tokens: 9}]",),
            "training.batch_ramp[1].until_tokens=9 should be above 9, where the stage before it ends",
        ),
        (
            ("training.batch_ramp=[{global_batch_size: 0, until_tokens: 9}]",),
            "training.batch_ramp[0].global_batch_size should be at least 1, found 0",
        ),
        (
            ("training.batch_ramp=[{global_batch_size: 4, untiltokens: 9}]",),
            "unknown key training.batch_ramp[0].untiltokens; did you mean training.batch_ramp[0].until_tokens?",
        ),
    ],
)
def test_a_ramp_that_cannot_be_is_refused_with_what_would_do(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(
            "cluster.ranks_per_node=4", "layout.global_batch_size=8",
            "training.batch_ramp=[{global_batch_size: 6, until_tokens: 9999}]", *overrides,
        )  # fmt: skip
    assert problem in str(error.value)


def test_a_resume_may_change_the_stages_to_come_and_not_those_that_were() -> None:
    def ramp(*stages: tuple[int, int]) -> TrainingPlan:
        written = [{"global_batch_size": size, "until_tokens": until} for size, until in stages]
        return plan_of("data.sequence_length=32", "layout.global_batch_size=8", f"training.batch_ramp={written}")

    before = ramp((2, 160), (4, 400)).settings
    assert past_problems(before, ramp((2, 160), (4, 800)).settings, 5) == []
    assert past_problems(before, ramp((2, 160), (6, 800)).settings, 3) == []
    assert past_problems(before, ramp().settings, 0) == []
    for other in (ramp((2, 160), (6, 400)), ramp((2, 320), (4, 400)), ramp()):
        (problem,) = past_problems(before, other.settings, 4)
        assert "training.batch_ramp gives the first 4 steps other batches" in problem


def test_a_ramp_resumed_across_a_border_is_the_run_that_was_never_stopped(trainer: Trainer) -> None:
    run, plan = trainer.make_run(RAMP, *TWO_RANKS, "checkpoint.interval_steps=2", "checkpoint.keep_last=9")
    whole = trainer.train(run, plan)
    final = everything(open_verified(choose_checkpoint(run, 8)))
    for step in (4, 6, 8):
        shutil.rmtree(run.checkpoint_path(checkpoint_name(step, whole.number)))
    again = trainer.train(run, plan)

    starts = [event for event in events_of(again) if isinstance(event, StartEvent)]
    assert starts[0].step == 2  # of the first stage; three more steps, and the batch is 4, then 8
    assert losses(again) == losses(whole)[2:]
    assert everything(open_verified(choose_checkpoint(run, 8))) == final
    (repeated,) = (event for event in events_of(again) if isinstance(event, RepeatEvent))
    assert (repeated.first_step, repeated.last_step, repeated.relative_difference) == (3, 8, 0)
    told = [event.consumed_samples for event in events_of(whole) if isinstance(event, StepEvent)]
    assert told == [2, 4, 6, 10, 14, 22, 30, 38]


def test_each_step_of_a_ramp_reads_the_samples_that_follow_those_of_the_step_before(trainer: Trainer) -> None:
    """A rate that moves no weight makes a step's loss the mean over its samples, whatever came before."""
    still = ("training.learning_rate=1e-30", "training.minimum_learning_rate=0", "training.weight_decay=0")
    run, plan = trainer.make_run(RAMP, *TWO_RANKS, *still)
    ramped = losses(trainer.train(run, plan))
    run, plan = trainer.make_run(*TWO_RANKS, *still, "layout.global_batch_size=2")
    pairs = losses(trainer.train(run, plan))
    assert len(pairs) == 19
    first = 0
    for loss, samples in zip(ramped, [2, 2, 2, 4, 4, 8, 8, 8], strict=True):
        of_the_step = pairs[first : first + samples // 2]
        first += samples // 2
        assert loss == pytest.approx(sum(of_the_step) / len(of_the_step), rel=1e-6)
    assert min(abs(a - b) for a, b in itertools.pairwise(pairs)) > 1e-5  # so that samples are told apart


def everything(tensors: CheckpointTensors) -> dict[str, bytes]:
    """Return every tensor of a checkpoint by its bits."""
    return {name: tensors.whole(name).numpy().tobytes() for name in tensors.names()}
