"""Frozen parts of a model keep their bits and take no part in anything else; then they are trained on.

What is frozen for three steps is looked at in the checkpoints of every step, at layouts whose ranks hold ranges of
frozen and of free parameters. Adam is checked against its formula (Kingma and Ba 2015; decoupled decay: Loshchilov and
Hutter 2019), from the moments that a checkpoint holds.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_solar.checkpoint_files import open_verified
from megatron_solar.depth import STRATEGIES
from megatron_solar.frozen import part_of_key
from megatron_solar.weights import EMBEDDING, canonical_keys
from orchestrator.checkpoints import checkpoint_name, choose_checkpoint
from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.events import StepEvent
from orchestrator.freezing import all_parts, parts_of, spell_layers
from orchestrator.named_layers import with_layers_named
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.schedule_checks import past_problems
from orchestrator.settings import RunSettings, TrainingSettings
from tests.conftest import Trainer, events_of, losses, relative_difference

STEPS, FROZEN = 6, 3
EVERY_STEP = ("checkpoint.interval_steps=1", "checkpoint.keep_last=99", "checkpoint.asynchronous=false")
DP2 = ("cluster.ranks_per_node=2", "model.tie_embeddings=false", "precision=bf16")
ONE_RANK_TIED = ("model.tie_embeddings=true", "training.decay_embeddings=false")
TP2_PP2_TIED = (
    *ONE_RANK_TIED,
    "cluster.ranks_per_node=4",
    "layout.tensor_parallel=2",
    "layout.pipeline_parallel=2",
    "layout.virtual_pipeline_parallel=2",
)


def frozen(*parts: str, steps: int = FROZEN) -> str:
    return f"training.frozen={json.dumps([{'what': part, 'steps': steps} for part in parts])}"


def states(run: RunDirectory, step: int) -> dict[str, Tensor]:
    """Return weights and moments after a step."""
    tensors = open_verified(choose_checkpoint(run, step))
    return {name: tensors.whole(name) for name in tensors.names()}


def told(attempt: AttemptDirectory, step: int) -> StepEvent:
    return next(event for event in events_of(attempt) if isinstance(event, StepEvent) and event.step == step)


def first_adam_step(
    training: TrainingSettings, rate: float, key: str, before: dict[str, Tensor], after: dict[str, Tensor]
) -> Tensor:
    """Return the weight that Adam's first step for a parameter gives, by the moments that it left."""
    mean = after[f"exp_avg/{key}"].double() / (1 - training.adam_beta1)
    square = after[f"exp_avg_sq/{key}"].double() / (1 - training.adam_beta2)
    is_norm = before[f"weight/{key}"].dim() == 1
    has_decay = not is_norm and (training.decay_embeddings or key != EMBEDDING)
    kept = 1 - rate * training.weight_decay if has_decay else 1.0
    return before[f"weight/{key}"].double() * kept - rate * mean / (square.sqrt() + training.adam_eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A run, and its state after each step, the first before any."""

    run: RunDirectory
    plan: TrainingPlan
    attempt: AttemptDirectory
    after: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def train_at(trainer: Trainer) -> Callable[[tuple[str, ...]], Trained]:
    """Train a run, once at each layout, whose embeddings and layers 0, 1 and 3 thaw after three steps."""

    @functools.cache
    def train_at(layout: tuple[str, ...]) -> Trained:
        run, plan = trainer.make_run(*layout, *EVERY_STEP, frozen("embeddings", "layers 0-1,3"), steps=STEPS)
        attempt = trainer.train(run, plan)
        return Trained(run=run, plan=plan, attempt=attempt, after=[states(run, step) for step in range(STEPS + 1)])

    return train_at


@pytest.fixture(params=[pytest.param(DP2, id="DP2-bf16"), pytest.param(TP2_PP2_TIED, id="TP2-PP2-VPP2-tied")])
def trained(request: pytest.FixtureRequest, train_at: Callable[[tuple[str, ...]], Trained]) -> Trained:
    return train_at(request.param)


def is_frozen(key: str) -> bool:
    return part_of_key(key) in ("embeddings", "layer 0", "layer 1", "layer 3")


def test_what_is_frozen_keeps_its_bits_and_is_trained_once_it_has_thawed(trained: Trained) -> None:
    after = trained.after
    for key in canonical_keys(trained.plan.settings.model):
        for step in range(1, STEPS + 1):
            has_moved = not torch.equal(after[step - 1][f"weight/{key}"], after[step][f"weight/{key}"])
            assert has_moved == (step > FROZEN or not is_frozen(key)), (key, step)
            for moment in ("exp_avg", "exp_avg_sq"):
                has_moment = bool(after[step][f"{moment}/{key}"].any())
                assert has_moment == (step > FROZEN or not is_frozen(key)), (key, step)


def test_adam_begins_with_a_parameter_when_it_thaws_and_only_matrices_decay(trained: Trained) -> None:
    after = trained.after
    for key in canonical_keys(trained.plan.settings.model):
        step = FROZEN + 1 if is_frozen(key) else 1
        rate = told(trained.attempt, step).learning_rate
        expected = first_adam_step(trained.plan.settings.training, rate, key, after[step - 1], after[step])
        difference = (after[step][f"weight/{key}"].double() - expected).abs().max()
        # fp32 rounds weights of up to 1 to 6e-8; of such a weight the decay is 3e-4, and the first step is the rate.
        assert float(difference) < 2e-7, key


@pytest.mark.parametrize("step", [FROZEN + 1, FROZEN - 1])  # in this order, each deletes the steps after its own
def test_a_resume_in_and_after_the_frozen_span_gives_the_same_bits(
    trainer: Trainer, trained: Trained, step: int
) -> None:
    run, first = trained.run, trained.attempt
    for path in run.checkpoints_folder.iterdir():
        if path.name > checkpoint_name(step, first.number):
            shutil.rmtree(path)
    again = trainer.train(run, trained.plan)
    assert losses(again) == losses(first)[step:]
    final, expected = states(run, STEPS), trained.after[STEPS]
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []


def test_one_rank_has_the_losses_and_norms_of_a_layout_that_splits_what_is_frozen(
    train_at: Callable[[tuple[str, ...]], Trained],
) -> None:
    split, alone = train_at(TP2_PP2_TIED), train_at(ONE_RANK_TIED)
    assert relative_difference(losses(split.attempt), losses(alone.attempt)) < 1e-6  # sums in another order
    for step in range(1, STEPS + 1):
        norms = [told(each.attempt, step).gradient_norm for each in (split, alone)]
        # Adam's first steps make much of the noise in small gradients: 6e-5 by step 6 with nothing frozen.
        assert norms[0] == pytest.approx(norms[1], rel=1e-6 if step <= FROZEN else 2e-4)


def test_a_frozen_gradient_counts_neither_for_the_norm_nor_decays_what_has_none(trainer: Trainer) -> None:
    """Squares of norms add up over parts; a word that no sample has gets no gradient, where the output is not tied."""
    untied = ("cluster.ranks_per_node=2", "model.tie_embeddings=false", *EVERY_STEP)
    norms, moved = {}, {}
    halves = (frozen("embeddings", "layers 0-1,3"), frozen("layers 2", "output", "final norm"))
    for name, given in (
        ("first", (halves[0],)),
        ("second", (halves[1], "training.decay_embeddings=false")),
        ("both", ()),
    ):
        run, plan = trainer.make_run(*untied, *given, steps=1)
        attempt = trainer.train(run, plan)
        norms[name] = told(attempt, 1).gradient_norm
        before, after = states(run, 0), states(run, 1)
        unseen = ~after[f"exp_avg_sq/{EMBEDDING}"].any(dim=1)
        assert 0 < int(unseen.sum()) < len(unseen) or name == "first"
        kept = 1 - told(attempt, 1).learning_rate * plan.settings.training.weight_decay
        weights = before[f"weight/{EMBEDDING}"][unseen], after[f"weight/{EMBEDDING}"][unseen]
        moved[name] = torch.equal(*weights), torch.equal(weights[0] * kept, weights[1])
    assert norms["both"] ** 2 == pytest.approx(norms["first"] ** 2 + norms["second"] ** 2, rel=1e-5)
    assert min(norms.values()) > 0.1 * norms["both"]
    assert moved == {"first": (True, False), "second": (True, False), "both": (False, True)}


def test_people_name_parts_by_words_and_layers_by_numbers() -> None:
    assert parts_of("layers 0-2,7, 9-9") == ["layer 0", "layer 1", "layer 2", "layer 7", "layer 9"]
    assert parts_of("final norm") == ["final norm"]
    assert spell_layers([0, 1, 2, 7, 9, 10]) == "layers 0-2,7,9-10"
    plan = compose("demo-base", ["model.tie_embeddings=false"])
    assert {part_of_key(key) for key in canonical_keys(plan.model)} == set(all_parts(plan.model))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (frozen("embedding"), "training.frozen[0].what: found 'embedding'; write `embeddings`, `output`, `final norm`"),
        (frozen("layers 3-1"), "training.frozen[0].what: found 3-1 in 'layers 3-1'; write the smaller layer first"),
        (frozen("final norm", "layers 2-8"), "training.frozen[1].what=layers 2-8: the model has layers 0 to 7"),
        (frozen("embeddings", steps=0), "training.frozen[0].steps should be at least 1, found 0"),
        (frozen("layers 0-7", "embeddings", "final norm"), "freezes every part of the model, so that nothing is tr"),
        (frozen("output"), "the model's output is tied to its embeddings; freeze `embeddings`"),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_what_would_do(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose("demo-base", ["model.tie_embeddings=true", override])
    assert problem in str(error.value)


def test_a_resume_may_thaw_earlier_or_later_but_not_what_has_thawed() -> None:
    def settings(*parts: str, steps: int) -> RunSettings:
        return compose("demo-base", [frozen(*parts, steps=steps)])

    before = settings("embeddings", "layers 1", steps=10)
    assert past_problems(before, settings("embeddings", "layers 1", steps=30), 8) == []
    assert past_problems(before, settings("embeddings", "layers 1", steps=8), 8) == []
    assert past_problems(before, before, 20) == []
    (thawed,) = past_problems(before, settings("embeddings", "layers 1", steps=30), 20)
    assert "embeddings, layer 1 were frozen for other steps" in thawed
    (earlier,) = past_problems(before, settings("embeddings", steps=10), 8)
    assert earlier.startswith("training.frozen: layer 1 were frozen")


@pytest.mark.parametrize(
    ("strategy", "base_layers", "depth", "old", "new"),
    [
        ("solar", 32, 48, "layers 0-23,40-47", "layers 24-39"),
        ("llama-pro", 32, 40, "layers 0-3,5-8,10-13,15-18,20-23,25-28,30-33,35-38", "layers 4,9,14,19,24,29,34,39"),
        ("stack", 4, 8, "layers 0-3", "layers 4-7"),
    ],
)
def test_old_and_new_layers_are_those_that_the_lineage_of_the_base_tells(
    tmp_path: Path, strategy: str, base_layers: int, depth: int, old: str, new: str
) -> None:
    rule = STRATEGIES[strategy]
    zeroed = sorted(rule.zeroed(base_layers, depth))
    lineage = {"layer_sources": rule.sources(base_layers, depth, ()), "zeroed_layers": zeroed}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    given = compose("demo-base", [f"base={tmp_path}", f"model.num_layers={depth}", frozen("old layers", "new layers")])
    assert [each.what for each in with_layers_named(given).training.frozen] == [old, new]
    (tmp_path / "lineage.json").unlink()
    with pytest.raises(ConfigError, match=r"has no lineage\.json that tells them"):
        with_layers_named(given)
