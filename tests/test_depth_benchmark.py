"""`benchmarks/depth_recovery.py` measures what it says: a Llama, runs of equal cost, tokens to regain."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import depth_report
from benchmarks.depth_cases import BASE, CASES, CONTINUED_STEPS, END, PEAK, REPLAY, new_layers
from benchmarks.depth_model import BATCH, SEQUENCE_LENGTH, SHAPE, Point, flops_per_token, logits
from benchmarks.depth_recovery import batches_of, setting_of
from benchmarks.depth_text import KINDS, Text, open_text
from megatron_solar.depth import STRATEGIES, depth_map
from tests.conftest import REPOSITORY

DEEPER = dataclasses.replace(SHAPE, num_layers=12)


def test_its_model_computes_the_logits_of_transformers() -> None:
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE.hidden_size,
            intermediate_size=SHAPE.ffn_hidden_size,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_attention_heads,
            num_key_value_heads=SHAPE.num_query_groups,
            vocab_size=SHAPE.vocab_size,
            rms_norm_eps=SHAPE.rms_norm_eps,
            initializer_range=0.1,
        )
    )
    ids = torch.randint(0, SHAPE.vocab_size, (2, SEQUENCE_LENGTH))
    with torch.inference_mode():
        difference = logits(dict(reference.named_parameters()), SHAPE, ids) - reference(ids).logits
    assert difference.abs().max() < 1e-4  # of logits around 1 in fp32


def test_models_have_at_most_a_million_parameters() -> None:
    assert max(case.shape.parameters() for case in CASES) <= 1_000_000


def test_flops_are_those_of_the_formula_and_fewer_where_layers_are_frozen() -> None:
    assert flops_per_token(DEEPER, None) == DEEPER.flops_per_token(SEQUENCE_LENGTH)
    lowest, highest = flops_per_token(DEEPER, {0}), flops_per_token(DEEPER, {11})
    assert DEEPER.flops_per_token(SEQUENCE_LENGTH) / 3 < highest < lowest < DEEPER.flops_per_token(SEQUENCE_LENGTH)


def test_whole_runs_without_a_deeper_model_cost_what_a_deeper_one_does() -> None:
    continued = CONTINUED_STEPS * flops_per_token(DEEPER, None)
    spent = {case.name: case.steps * flops_per_token(case.shape, None) for case in CASES}
    assert spent["base, trained on"] == pytest.approx(continued, rel=2e-3)
    assert spent["from scratch"] == pytest.approx(spent["base"] + continued, rel=2e-3)


def test_every_strategy_gives_the_depth_of_its_case_and_half_as_many_new_layers() -> None:
    for case in CASES:
        if case.start in STRATEGIES:
            found = depth_map(case.start, SHAPE.num_layers, case.layers, cosines=range(8))
            assert len(found.sources) == case.layers
            assert len(new_layers(found.sources)) == case.layers - SHAPE.num_layers
            assert found.zeroed <= new_layers(found.sources)


def test_rates_rise_and_end_where_they_should() -> None:
    rates = {case.rates: [case.rate(step) for step in range(case.steps)] for case in CASES if case.start == "solar"}
    for name, top in (("to the peak", PEAK), ("to a third", PEAK / 3)):
        assert max(rates[name]) == pytest.approx(top, rel=1e-3)
        assert rates[name].index(max(rates[name])) == pytest.approx(CONTINUED_STEPS / 20, abs=1)
        assert rates[name][-1] == pytest.approx(END, rel=2e-3)
    assert set(rates["constant"]) == {END}
    assert rates["falling"][0] == END == max(rates["falling"])
    assert rates["falling"][-1] == pytest.approx(END / 10, rel=2e-3)


def test_training_goes_on_where_the_bases_ended_and_replays_only_what_it_saw() -> None:
    ids = numpy.arange(SEQUENCE_LENGTH * BATCH * 3 * BASE.steps) // SEQUENCE_LENGTH  # a sequence is its own number
    text = Text(training={"English": ids, "Python": ids + len(ids)}, held_out={}, checksum="")

    def numbers(name: str, seed: int = 0) -> set[int]:
        (case,) = [case for case in CASES if case.name == name]
        return set(torch.cat(list(batches_of(text, seed, case)))[:, 0].tolist())

    base, python = numbers("base"), set((ids + len(ids)).tolist())
    assert len(base) == BASE.steps * BATCH
    assert not base & numbers("solar, all")
    assert numbers("solar, all") == numbers("stack, new") != numbers("solar, all", seed=1)
    assert numbers("from scratch") < base | numbers("base, trained on")
    assert numbers("solar, Python, constant") <= python
    replayed = numbers("solar, Python, constant, replay") - python
    assert replayed < base
    assert len(replayed) == pytest.approx(REPLAY * CONTINUED_STEPS * BATCH, rel=0.3)


def test_tokens_to_regain_lie_between_two_points() -> None:
    def run(*losses: float) -> depth_report.Run:
        points = [Point(tokens=100 * n, flops=0.0, losses={"English": loss}) for n, loss in enumerate(losses)]
        return depth_report.Run(case=CASES[2], seed=0, points=points, base_loss=4.0)

    assert run(5.0, 4.4, 3.9).regained() == pytest.approx(180)
    assert run(4.0, 3.9, 3.8).regained() == 0
    assert run(4.0, 4.2, 3.9, 3.8).regained() == pytest.approx(100 + 100 * 2 / 3)  # a rate that rises costs some again
    assert run(5.0, 4.4, 4.1).regained() is None


def test_every_run_is_judged_at_its_first_and_its_last_step() -> None:
    for case in CASES:
        assert {0, case.steps} <= case.evaluated_after
        assert max(case.evaluated_after) == case.steps


def test_a_command_started_again_knows_the_results_of_the_one_before(tmp_path: Path) -> None:
    ids = numpy.zeros(3, numpy.uint16)
    command = [sys.executable, REPOSITORY / "benchmarks" / "depth_recovery.py", "--output", tmp_path, "--seeds", "0"]
    (tmp_path / "text").mkdir()
    for kind, part in itertools.product(KINDS, ("training", "held_out")):
        numpy.save(tmp_path / "text" / f"{kind}-{part}.npy", ids)
    setting = setting_of(open_text(tmp_path / "text"))
    for known, code in ((setting, 0), ("another", 1)):
        (tmp_path / "results.jsonl").write_text(json.dumps({"seed": 0, "case": "base", "setting": known}) + "\n")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stderr
    assert "results.jsonl has runs of the setting another" in done.stderr
