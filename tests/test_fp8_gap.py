"""The gap in the loop, what delayed scaling keeps around it, and what is said of it.

FP8 does not run here. The loop is real and is told to go on although the proof would stop it: megatron then computes in
the numbers of `precision.dtype`, so that the gap is zero and the losses are those of a run without FP8. Passes that
differ are measured by `tests/test_ffn_inputs.py`. Modules with histories are stand-ins of `tests/fp8_stand_ins.py`.
"""

import dataclasses
import json
from typing import Any

import pytest
import torch

from megatron_solar.fp8_gap import Fp8Gap
from megatron_solar.fp8_state import kept_scales, put_back, scales_of
from orchestrator.commands.logs import event_line
from orchestrator.doubts import alarms, fp8_in_words
from orchestrator.events import Event, Fp8GapEvent, Fp8ProofEvent, GuardEvent, StepEvent, ValidationEvent
from orchestrator.plan import make_plan, write_plan
from orchestrator.repeats import NOISE, noise
from orchestrator.settings import PrecisionSettings
from orchestrator.shipment import FP8_GAP, _values_of
from orchestrator.slurm import ranks
from orchestrator.status import read_status
from tests import numeric_faults
from tests.conftest import Trainer, events_of, losses
from tests.fp8_stand_ins import StandInLinear, StandInRecipe


def gap_of(step: int, difference: float, level: float = 0.01) -> Fp8GapEvent:
    return Fp8GapEvent(
        time=float(step), step=step, bf16_loss=2.0, fp8_loss=2.0 * (1 + difference), relative_difference=difference,
        alarm_level=level, is_alarm=difference > level, samples=4, seconds=0.1,
    )  # fmt: skip


def test_a_run_for_fp8_measures_after_its_first_step_and_at_its_turns_and_trains_as_if_it_did_not(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ("cluster.ranks_per_node=2", "layout.pipeline_parallel=2", "training.validation_interval_steps=3")
    plain = trainer.train(*trainer.make_run(*layout, steps=4))
    monkeypatch.setattr(ranks, "WORKER", numeric_faults.__name__)
    run, plan = trainer.make_run(*layout, steps=4)
    precision = PrecisionSettings(dtype="fp32", fp8="delayed", gap_check_steps=2, ffn_input_steps=0)
    plan = make_plan(dataclasses.replace(plan.settings, precision=precision))
    write_plan(run.launched_plan, plan)
    (run.path / numeric_faults.FILE).write_text(json.dumps([{"kind": "unproven_fp8"}]))
    attempt = trainer.train(run, plan)
    found = [event for event in events_of(attempt) if isinstance(event, Fp8GapEvent)]
    assert [event.step for event in found] == [1, 2, 4]
    assert all(event.relative_difference == 0 and event.bf16_loss == event.fp8_loss > 5 for event in found)
    assert losses(attempt) == losses(plain)  # the step that only fills histories is dropped
    told, others = ([e.loss for e in events_of(each) if isinstance(e, ValidationEvent)] for each in (attempt, plain))
    assert told == others and len(told) == 3
    assert not any(isinstance(event, Fp8GapEvent | Fp8ProofEvent) for event in events_of(plain))
    assert _values_of(found[0]) == {FP8_GAP: 0.0}
    assert "after step 4 the same batch has loss" in read_status(run).fp8


def test_the_gap_has_its_turns_in_fp8_alone(trainer: Trainer) -> None:
    _, plan = trainer.make_run()
    nothing: Any = None

    def turns(**precision: Any) -> list[int]:
        settings = dataclasses.replace(plan.settings, precision=PrecisionSettings(**precision))
        gap = Fp8Gap(dataclasses.replace(plan, settings=settings), nothing, nothing, nothing)
        return [step for step in range(7, 1501) if gap.is_due(step, is_first=step == 7)]

    assert turns(fp8="tensorwise") == [7, 500, 1000, 1500]
    assert turns(fp8="blockwise", gap_check_steps=700) == [7, 700, 1400]
    assert turns(fp8="tensorwise", gap_check_steps=0) == []
    assert turns() == []


def test_a_step_in_doubt_is_computed_again_with_the_histories_that_it_began_with(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise delayed scaling would give other numbers the second time, and a sound node would be to blame."""
    monkeypatch.setattr(ranks, "WORKER", numeric_faults.__name__)
    small = ("layout.global_batch_size=1", f"training.tokens={11 * 32}", "numerics.spike_score=100")
    run, plan = trainer.make_run("numerics.window=16", *small)
    precision = PrecisionSettings(dtype="fp32", fp8="delayed", gap_check_steps=0)
    plan = make_plan(dataclasses.replace(plan.settings, precision=precision))
    write_plan(run.launched_plan, plan)
    faults = [{"kind": "moving_scales"}, {"kind": "bad_sample", "sample": 9, "factor": 60.0}]
    (run.path / numeric_faults.FILE).write_text(json.dumps(faults))
    events = events_of(trainer.train(run, plan))
    (guard,) = [event for event in events if isinstance(event, GuardEvent)]
    assert (guard.step, guard.doubt, guard.origin, guard.action) == (10, "loss_spike", "data", "skip")
    assert guard.loss == guard.again_loss and guard.gradient_norm == guard.again_norm
    found = [event.loss for event in events if isinstance(event, StepEvent)]
    # The first step is the second that the history sees; new weights know nothing.
    assert found[0] == pytest.approx(torch.tensor(32000.0).log().item() * 1.02, rel=4e-3)


def test_delayed_scaling_alone_repeats_no_step_bit_for_bit_since_its_histories_are_filled_anew(
    trainer: Trainer,
) -> None:
    _, plan = trainer.make_run()

    def noise_of(precision: PrecisionSettings) -> float | None:
        changed = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, precision=precision))
        return noise(changed, changed)

    assert noise_of(PrecisionSettings(fp8="tensorwise")) == 0
    assert noise_of(PrecisionSettings(fp8="delayed")) == NOISE["bf16"]


def test_histories_and_scales_of_stand_ins_are_put_back_in_place() -> None:
    chunk = torch.nn.ModuleList(
        [StandInLinear(StandInRecipe("delayed")), StandInLinear(StandInRecipe("tensorwise")), StandInLinear(None)]
    )
    meta: Any = chunk[0].fp8_meta
    held = [getattr(meta[key], name) for key in ("scaling_fwd", "scaling_bwd") for name in ("amax_history", "scale")]
    before = [tensor.clone() for tensor in held]
    first_row = held[0][0]  # a view, such as quantizers have
    assert [live is mine for (live, _), mine in zip(scales_of([chunk]), held, strict=True)] == [True] * 4
    with pytest.raises(ZeroDivisionError), kept_scales([chunk]):
        for tensor in held:
            tensor.add_(1)
        raise ZeroDivisionError
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(held, before, strict=True))
    first_row.fill_(9)
    assert held[0][0].tolist() == [9.0] * 3
    put_back([])  # of other recipes nothing is kept


def test_alarms_are_told_once_with_their_number_and_the_state_of_fp8_in_a_line() -> None:
    proof = Fp8ProofEvent(
        time=1.0, step=1, precision="fp8-tensorwise", recipes=("Float8CurrentScaling HYBRID",), fp8_linears=184,
        bf16_linears=8, ranks=8, seconds=0.1,
    )  # fmt: skip
    events: list[Event] = [proof, gap_of(1, 1e-4), gap_of(500, 0.02), gap_of(1000, 0.03), gap_of(1500, 0.002)]
    (warning,) = alarms(events)
    assert warning == (
        "after step 1,000 the same batch has loss 2.06000 in FP8 and 2.00000 in bf16: 3.0e-02 apart, alarm at 1.0e-02; "
        "passed in 2 of 4 samples, first in step 500"
    )
    line = fp8_in_words(events)
    assert line.startswith("184 linear parts on 8 ranks ran in FP8 in step 1 (Float8CurrentScaling HYBRID), 8 stayed")
    assert "after step 1,500" in line
    assert [event_line(event).partition("  ")[2] for event in (proof, gap_of(1500, 0.002))] == line.split("; ")
    assert alarms(events[:2]) == [] and fp8_in_words([]) == ""
