"""The proof that FP8 runs: that it passes only where every trace is there, and that megatron's silent bf16 fails it.

The runs here are real: without Transformer Engine megatron-core trains with `fp8=hybrid` in bf16 and says nothing. What
a linear of Transformer Engine keeps is a stand-in of `tests/fp8_stand_ins.py`; the real one was never looked at.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_solar.fp8_proof import LINEARS, SHOWN_OF_A_RANK, Findings, _refusal, look
from orchestrator import exit_codes
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.events import EndEvent, Fp8GapEvent, Fp8ProofEvent, StepEvent
from orchestrator.exit_codes import CAUSE_OF_CODE, Cause
from orchestrator.files import read_json
from orchestrator.plan import make_plan, write_plan
from orchestrator.settings import PrecisionSettings
from orchestrator.slurm import ranks
from tests import numeric_faults
from tests.conftest import Trainer, events_of
from tests.fp8_stand_ins import Format, StandInLinear, StandInRecipe

LAYERS = 4
TENSORWISE = PrecisionSettings(fp8="tensorwise", first_bf16_layers=1, last_bf16_layers=1)
DELAYED = PrecisionSettings(fp8="delayed")


def layer_of(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return a layer with a module under each name of a linear."""
    layer = torch.nn.Module()
    for name in LINEARS:
        part, _, linear = name.partition(".")
        if not hasattr(layer, part):
            layer.add_module(part, torch.nn.Module())
        layer.get_submodule(part).add_module(linear, make())
    return layer


def model_of(precision: PrecisionSettings) -> list[tuple[int, Any]]:
    """Return stand-in layers as a training step in this precision leaves them."""
    in_fp8 = range(precision.first_bf16_layers, LAYERS - precision.last_bf16_layers)
    recipe = StandInRecipe(precision.fp8)
    return [(n, layer_of(lambda n=n: StandInLinear(recipe if n in in_fp8 else None))) for n in range(LAYERS)]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_stand_ins_with_every_trace_of_a_recipe_pass_and_are_counted(recipe: Any) -> None:
    edge = 0 if recipe == "delayed" else 1
    precision = PrecisionSettings(fp8=recipe, first_bf16_layers=edge, last_bf16_layers=edge)
    found = look(model_of(precision), precision, LAYERS)
    assert found.problems == () and found.missing == 0
    assert (found.fp8_linears, found.bf16_linears) == (4 * (LAYERS - 2 * edge), 4 * 2 * edge)
    assert found.recipes == ("StandInRecipe HYBRID",)


BROKEN: dict[str, tuple[PrecisionSettings, Callable[[Any], Any], str]] = {
    "it did not run in FP8": (TENSORWISE, lambda m: vars(m).update(fp8=False), "found fp8=False"),
    "it was turned off again": (
        TENSORWISE, lambda m: vars(m).update(fp8_initialized=False), "fp8_initialized=False"),
    "another recipe": (
        TENSORWISE, lambda m: m.fp8_meta.update(recipe=StandInRecipe("delayed")), "recipe tensorwise hybrid"),
    "another format": (
        TENSORWISE, lambda m: m.fp8_meta.update(recipe=StandInRecipe("tensorwise", Format.E4M3)), "E4M3"),
    "no quantizers": (TENSORWISE, lambda m: m.quantizers.update(scaling_bwd=[]), "quantizers for scaling_bwd"),
    "no weight in FP8": (TENSORWISE, lambda m: m._fp8_workspaces.clear(), "keep its weight in FP8, found NoneType"),
    "a weight in bf16": (
        TENSORWISE, lambda m: m._fp8_workspaces.update(weight=torch.zeros(4, dtype=torch.bfloat16)), "found Tensor"),
    "a shorter history": (
        DELAYED, lambda m: setattr(m.fp8_meta["recipe"], "amax_history_len", 1), "delayed hybrid with max of 1024"),
    "the newest value alone": (
        DELAYED, lambda m: setattr(m.fp8_meta["recipe"], "amax_compute_algo", "most_recent"), "with max of 1024"),
    "an input that was never seen": (
        DELAYED, lambda m: m.fp8_meta["scaling_fwd"].amax_history[:, 0].zero_(), "an input above zero, found 0.0"),
    "an infinite gradient": (
        DELAYED, lambda m: m.fp8_meta["scaling_bwd"].amax_history[-1].fill_(torch.inf), "found inf"),
    "a scale that is no number": (
        DELAYED, lambda m: m.fp8_meta["scaling_fwd"].scale.fill_(torch.nan), "finite largest values in scaling_fwd"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_one_stand_in_without_a_trace_is_named_with_what_was_wanted_and_found(what: str) -> None:
    precision, spoil, words = BROKEN[what]
    layers = model_of(precision)
    linear = layers[2][1].mlp.linear_fc2
    if hasattr(linear, "fp8_meta"):  # recipes are shared otherwise
        linear.fp8_meta["recipe"] = StandInRecipe(precision.fp8)
    spoil(linear)
    found = look(layers, precision, LAYERS)
    assert found.missing == 1 and len(found.problems) == 1
    assert found.problems[0].startswith("layer 2, mlp.linear_fc2: should ") and words in found.problems[0]


def test_zeros_that_are_right_pass() -> None:
    layers = model_of(DELAYED)
    meta = layers[1][1].self_attention.linear_proj.fp8_meta
    meta["scaling_fwd"].amax_history[:, 1] = 0  # the weight of a layer that up-scaling zeroed
    meta["scaling_bwd"].amax_history.zero_()  # and what comes back through it
    one_row = layers[2][1].mlp.linear_fc1.fp8_meta["scaling_fwd"]
    one_row.amax_history = torch.zeros(1, 3)  # the update clears the only row, and has scaled by it
    assert look(layers, DELAYED, LAYERS).problems == ()
    one_row.scale.fill_(1)
    assert look(layers, DELAYED, LAYERS).missing == 1


def test_a_layer_that_should_be_in_bf16_and_ran_in_fp8_is_named() -> None:
    layers = model_of(TENSORWISE)
    layers[0][1].mlp.linear_fc1.fp8 = True
    found = look(layers, TENSORWISE, LAYERS)
    assert found.missing == 1 and "layer 0, mlp.linear_fc1: should have stayed in bf16" in found.problems[0]


def test_megatrons_own_linears_are_no_proof() -> None:
    layers = [(n, layer_of(lambda: torch.nn.Linear(2, 2))) for n in range(LAYERS)]
    found = look(layers, DELAYED, LAYERS)
    assert found.missing == 4 * LAYERS and len(found.problems) == SHOWN_OF_A_RANK
    assert "should be Transformer Engine's, found torch.nn.modules.linear.Linear, which has no FP8" in found.problems[0]


def test_the_error_counts_all_ranks_and_names_those_that_differ() -> None:
    good = Findings(fp8_linears=8)
    bad = Findings(fp8_linears=7, missing=1, problems=("layer 2, mlp.linear_fc2: should have run in FP8",))
    error = _refusal(DELAYED, [good, bad, good], [1], ["n1", "n1", "n2"])
    assert "fp8-delayed was asked for, and 1 of 24 linear parts on 1 of 3 ranks" in str(error)
    assert error.problems == ("rank 1 on n1: layer 2, mlp.linear_fc2: should have run in FP8",)
    assert "precision=bf16" in str(error)


def test_a_run_that_megatron_would_train_in_bf16_without_a_word_stops_after_its_first_step(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run on two ranks; only the check of the libraries before it is left out."""
    monkeypatch.setattr(ranks, "WORKER", numeric_faults.__name__)
    run, plan = trainer.make_run("cluster.ranks_per_node=2", "layout.pipeline_parallel=2", steps=4)
    settings = dataclasses.replace(plan.settings, precision=DELAYED)
    plan = make_plan(settings)
    write_plan(run.launched_plan, plan)
    (run.path / numeric_faults.FILE).write_text(json.dumps([{"kind": "unchecked_libraries"}]))
    attempt, started = trainer.start(run, plan)
    codes = trainer.wait(run, attempt, started)
    assert codes == [exit_codes.PRECISION] * 2, attempt.rank_log(0).read_text()[-3000:]
    assert CAUSE_OF_CODE[codes[0]] == Cause.PRECISION
    for rank in range(2):
        record = read_json(attempt.rank_failure(rank))
        assert record["error"] == "PrecisionError"
        assert "fp8-delayed was asked for, and 16 of 16 linear parts on 2 of 2 ranks" in record["message"]
        for other in range(2):  # the first layer of either stage
            assert f"rank {other} on " in record["message"]
            assert f"layer {2 * other}, self_attention.linear_qkv: should be Transformer Engine's" in record["message"]
        assert "megatron.core.tensor_parallel.layers.ColumnParallelLinear" in record["message"]
    kinds = [type(event) for event in events_of(attempt)]
    assert kinds.count(StepEvent) == 1 and EndEvent not in kinds and Fp8ProofEvent not in kinds
    assert Fp8GapEvent not in kinds
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [0]  # what the base is, and no step
