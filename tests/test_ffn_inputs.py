"""The largest inputs of second FFN matrices and the gap between two passes, measured by real ranks.

Inputs are compared with a hook on `down_proj` in the model of transformers, and the losses of the gap with that
model's: fp32 on the CPU, within what sums in another order make of them. FP8 itself does not run here.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_solar.ffn_inputs import FfnInputs
from megatron_solar.model_folder import ModelFolder
from orchestrator.doubts import alarms
from orchestrator.events import FfnInputsEvent, StepEvent
from orchestrator.plan import make_plan, write_plan
from orchestrator.shipment import LARGEST_FFN_INPUT, _values_of
from orchestrator.status import read_status
from tests.conftest import Trainer, events_of
from tests.precision_ranks import EVERY, FACTOR
from tests.random_base import write_random_base

BATCHES, LENGTH = 4, 32
TOLERANCE = 2e-5  # relative, of sums in another order
LAYOUTS = {
    "TP1": (),
    "TP2-PP2-SP": ("layout.tensor_parallel=2", "layout.pipeline_parallel=2", "layout.sequence_parallel=true",
                   "cluster.ranks_per_node=4"),
    "DP2 with overlap, recomputed": ("cluster.ranks_per_node=2", "layout.recompute=full",
                                     "layout.overlap_gradient_reduce=true", "layout.overlap_parameter_gather=true"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 96}
    return write_random_base(tmp_path_factory.mktemp("base") / "model", **sizes)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 32000, (BATCHES, 1, LENGTH + 1), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def found(request: pytest.FixtureRequest, trainer: Trainer, base: Path, tokens: Tensor) -> list[dict[str, Any]]:
    """What the ranks of a layout found, in their order."""
    run, plan = trainer.make_run(*LAYOUTS[request.param], "cluster.peak_tflops=1")
    plan = make_plan(dataclasses.replace(plan.settings, base=str(base), model=ModelFolder.open(base).shape))
    write_plan(run.launched_plan, plan)
    torch.save(tokens, run.path / "tokens.pt")
    return trainer.found_by_ranks(run, plan, "tests.precision_ranks", seconds=60)


@pytest.fixture(scope="module")
def reference(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def down_inputs(model: Any, tokens_MBS: Tensor) -> list[float]:
    """Return the largest magnitude that each layer's `down_proj` gets."""
    largest = [0.0] * len(model.model.layers)

    def keep(number: int) -> Any:
        return lambda _, inputs: largest.__setitem__(number, max(largest[number], float(inputs[0].abs().max())))

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(keep(n)) for n, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for tokens_BS in tokens_MBS:
            model(tokens_BS[:, :-1])
    for hook in hooks:
        hook.remove()
    return largest


def loss_of(model: Any, batch: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        logits_BSV = model(batch["tokens"]).logits
    return float(torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch["labels"].flatten()))


def test_the_largest_inputs_are_those_of_transformers_on_every_rank_of_every_layout(
    found: list[dict[str, Any]], reference: Any, tokens: Tensor
) -> None:
    expected = down_inputs(reference, tokens)
    for rank in found:
        *measured, _ = rank["ffn"]["events"]
        assert [event["step"] for event in measured] == [EVERY, 2 * EVERY]
        for event in measured:
            assert event["values"] == pytest.approx(expected, rel=TOLERANCE)
            assert event["largest"] == max(event["values"]) == event["values"][event["layer"]]
            assert event["is_alarm"] == (event["largest"] > event["alarm_level"]) and event["is_alarm"]
    # megatron's own hooks for gathering are there without ours: no more on any other step, and none is left.
    for rank in found:
        before, of_turn, again, _, after = rank["ffn"]["hooks"]
        assert of_turn > before == again == after


def test_an_input_that_is_no_number_is_larger_than_any(found: list[dict[str, Any]]) -> None:
    for rank in found:
        event = rank["ffn"]["events"][-1]
        assert event["values"] == (math.inf,) * 4 and event["layer"] == 0 and event["is_alarm"]


def test_two_passes_that_are_alike_have_no_gap(found: list[dict[str, Any]]) -> None:
    for rank in found:
        alike, _, switched = rank["gap"]["events"]
        for event in (alike, switched):  # megatron's switch changes nothing where FP8 is off
            assert event["relative_difference"] == 0.0 and event["bf16_loss"] == event["fp8_loss"]
            assert not event["is_alarm"]


def test_the_gap_is_that_of_transformers_with_the_same_change_and_the_same_on_all_ranks(
    found: list[dict[str, Any]], base: Path, reference: Any
) -> None:
    changed = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.post_attention_layernorm.weight.mul_(FACTOR)
    unique = {tuple(rank["held_out"]["tokens"].flatten().tolist()): rank["held_out"] for rank in found}.values()
    plain, other = (sum(loss_of(model, batch) for batch in unique) / len(unique) for model in (reference, changed))
    assert abs(plain - other) > 1000 * TOLERANCE
    for rank in found:
        event = rank["gap"]["events"][1]
        assert event["fp8_loss"] == pytest.approx(plain, rel=TOLERANCE)
        assert event["bf16_loss"] == pytest.approx(other, rel=TOLERANCE)
        assert event["relative_difference"] == abs(event["fp8_loss"] - event["bf16_loss"]) / event["bf16_loss"]
        assert event["is_alarm"] == (event["relative_difference"] > event["alarm_level"])
        assert event["samples"] == len(unique)
        others = [each["gap"]["events"][1] for each in found]
        assert {(each["fp8_loss"], each["bf16_loss"]) for each in others} == {(event["fp8_loss"], event["bf16_loss"])}


def test_a_measured_gap_leaves_weights_gradients_optimizer_random_state_and_later_losses_as_they_were(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert len(rank["gap"]["same"]) > 20 and all(rank["gap"]["same"]) and rank["gap"]["is_training"]
        left, right = rank["losses"]
        assert len(left) == 3
        assert left == right or all(math.isnan(loss) for loss in [*left, *right])  # of a stage without the output
    assert any(rank["losses"][0][0] > rank["losses"][0][2] > 0 for rank in found)  # they are of a training


def test_megatrons_switch_reaches_every_module_and_is_put_back(found: list[dict[str, Any]]) -> None:
    for rank in found:
        within, after = rank["switch"]["within"], rank["switch"]["after"]
        assert len(within) > 10 and set(within) == {None}
        assert set(after) == {"hybrid"}


def test_a_run_tells_its_largest_inputs_and_warns_of_them(trainer: Trainer) -> None:
    run, plan = trainer.make_run("precision.ffn_input_steps=4", "precision.ffn_input_alarm=1e-9", steps=9)
    attempt = trainer.train(run, plan)
    events = [event for event in events_of(attempt) if isinstance(event, FfnInputsEvent)]
    assert [event.step for event in events] == [4, 8]
    assert len([event for event in events_of(attempt) if isinstance(event, StepEvent)]) == 9
    assert _values_of(events[1]) == {LARGEST_FFN_INPUT: events[1].largest}
    (warning,) = [text for text in read_status(run).warnings if "second FFN matrix" in text]
    assert f"step 8: the largest input of a second FFN matrix was {events[1].largest:,.4g}" in warning
    assert f"in layer {events[1].layer}" in warning and "2 of 2 samples, first in step 4" in warning
    assert alarms([dataclasses.replace(event, is_alarm=False) for event in events]) == []


def test_inputs_are_watched_by_default_and_zero_looks_at_no_layer(trainer: Trainer) -> None:
    assert trainer.make_run()[1].settings.precision.ffn_input_steps == 100
    _, plan = trainer.make_run("precision.ffn_input_steps=0")
    told: list[Any] = []
    replica: Any = None  # whose chunks would be asked for on a step that is measured
    with FfnInputs(plan, replica, told.append).measuring(100):
        pass
    assert told == []
