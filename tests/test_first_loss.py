"""A start from an evaluated base: its own loss on the recorded tokens, or no step at all.

Faults are made in the base's files as they happen to people; the ranks are real.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from megatron_solar.depth import solar_depth_map
from megatron_solar.evaluate import evaluate
from megatron_solar.first_loss import TOKEN_FACTOR
from megatron_solar.model_folder import ModelFolder
from megatron_solar.upscale import plan_upscale, write_upscaled
from orchestrator import exit_codes
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.commands.launch import command as launch
from orchestrator.commands.logs import event_line
from orchestrator.commands.why import show_run
from orchestrator.events import FirstLossEvent, StartEvent, StepEvent
from orchestrator.exit_codes import Cause
from orchestrator.plan import TrainingPlan
from orchestrator.reconcile import State
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.why import explain_run
from tests.conftest import SMALL, Trainer, events_of
from tests.launched import wait_to_end
from tests.random_base import write_random_base

# Of the up-scaled model; heads, layers and rope make a difference in a model that is wide enough and has large weights.
SHAPE = (
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.rope_theta=100.0",
)
TP2_PP2 = ("layout.tensor_parallel=2", "layout.pipeline_parallel=2", "cluster.ranks_per_node=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 layers."""
    folder = tmp_path_factory.mktemp("first-loss") / "base"
    shape = {"vocab_size": 32000, "num_hidden_layers": 3, "rope_theta": 100.0, "initializer_range": 0.1}
    return write_random_base(folder, seed=5, **shape)


@pytest.fixture
def upscaled(base: Path, tmp_path: Path) -> Path:
    """Of 4 layers, evaluated on 3 sequences that are longer than the run's."""
    return write_evaluated(base, tmp_path / "upscaled", sequences=3, length=48)


def write_evaluated(base: Path, output: Path, *, sequences: int, length: int) -> Path:
    folder = ModelFolder.open(base)
    plan = plan_upscale(folder, solar_depth_map(3, 1))
    tokens = numpy.random.default_rng(1).integers(0, 32000, (sequences, length + 1), dtype=numpy.int32)
    evaluation = evaluate(folder, plan.layers, plan.dtype, tokens)
    write_upscaled(folder, plan, output, evaluation=evaluation, text="random ids")
    return output


def checks_of(attempt: AttemptDirectory) -> list[FirstLossEvent]:
    return [event for event in events_of(attempt) if isinstance(event, FirstLossEvent)]


def make_run(trainer: Trainer, base: Path, *overrides: str) -> tuple[RunDirectory, TrainingPlan]:
    return trainer.make_run(*SHAPE, f"base={base}", *overrides, steps=1)


@pytest.mark.parametrize(
    ("overrides", "sequences"),
    [
        pytest.param((), [0, 1, 2], id="one-rank"),
        pytest.param(TP2_PP2, [0, 1, 2], id="TP2-PP2"),
        pytest.param(
            ("layout.tensor_parallel=2", "layout.sequence_parallel=true", "cluster.ranks_per_node=2"),
            [0, 1, 2],
            id="TP2-SP",
        ),
        pytest.param(
            ("layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2", "cluster.ranks_per_node=2"),
            [0, 1, 2, 0],
            id="PP2-VPP2",
        ),
        pytest.param(
            ("cluster.ranks_per_node=2", "layout.micro_batch_size=2"), [0, 1, 2, 0], id="more-places-than-sequences"
        ),
        pytest.param(("layout.tensor_parallel=2", "cluster.ranks_per_node=2", "precision=bf16"), [0, 1, 2], id="bf16"),
    ],
)
def test_a_start_computes_the_recorded_loss_at_any_layout(
    trainer: Trainer, upscaled: Path, overrides: tuple[str, ...], sequences: list[int]
) -> None:
    run, plan = make_run(trainer, upscaled, *overrides)
    attempt = trainer.train(run, plan)
    (check,) = checks_of(attempt)
    print(f"{plan.layout.describe()}: mean {check.relative_difference:.1e}, tokens {check.token_difference:.1e}")
    recorded = load_file(upscaled / "evaluation.safetensors")["result_losses"][sequences, :32].double()
    assert check.recorded_loss == pytest.approx(float(recorded.mean()), rel=1e-12)
    assert check.tokens == recorded.numel()
    # Far within the tolerance, so that no start is stopped by luck.
    assert check.relative_difference < check.tolerance / 10
    assert check.token_difference < TOKEN_FACTOR * check.tolerance / 5
    kinds = [type(event) for event in events_of(attempt)]
    assert kinds.index(FirstLossEvent) < kinds.index(StartEvent) < kinds.index(StepEvent)
    assert f"first loss {check.loss:.5f}" in event_line(check)


def test_sequences_shorter_than_the_runs_are_taken_as_they_are(trainer: Trainer, base: Path, tmp_path: Path) -> None:
    run, plan = make_run(trainer, write_evaluated(base, tmp_path / "short", sequences=2, length=20))
    (check,) = checks_of(trainer.train(run, plan))
    assert check.tokens == 40


def swap_two_layers_values(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    first, last = (f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 3))
    weights[first], weights[last] = weights[last], weights[first]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def permute_query_and_key_heads(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        # Pairs of neighbours instead of halves, as other conventions of rotary positions have them.
        weights[name] = weights[name].view(-1, 2, 8, 64).transpose(1, 2).reshape(-1, 64).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_the_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 10000.0
    (folder / "config.json").write_text(json.dumps(config))


def record_another_loss(folder: Path) -> None:
    """Stands for a kernel that computes otherwise: all files are as they were written."""
    tensors = load_file(folder / "evaluation.safetensors")
    tensors["result_losses"] += 0.01
    save_file(tensors, folder / "evaluation.safetensors")
    lineage = json.loads((folder / "lineage.json").read_text())
    digest = hashlib.sha256((folder / "evaluation.safetensors").read_bytes()).hexdigest()
    lineage["result"]["files"]["evaluation.safetensors"] = digest
    (folder / "lineage.json").write_text(json.dumps(lineage))


@pytest.mark.parametrize(
    ("damage", "overrides", "cause"),
    [
        pytest.param(swap_two_layers_values, (), "model.safetensors is not what it was", id="weights-swapped"),
        pytest.param(permute_query_and_key_heads, TP2_PP2, "model.safetensors is not what it was", id="heads-permuted"),
        pytest.param(change_the_rope, ("model.rope_theta=10000.0",), "config.json is not what it was", id="rope"),
        pytest.param(record_another_loss, (), "every file of the base is what it was", id="computed-otherwise"),
    ],
)
def test_a_start_that_computes_another_loss_stops_before_any_step_and_says_why(
    trainer: Trainer, upscaled: Path, damage: Callable[[Path], None], overrides: tuple[str, ...], cause: str
) -> None:
    damage(upscaled)
    run, plan = make_run(trainer, upscaled, *overrides)
    attempt, ranks = trainer.start(run, plan)
    codes = trainer.wait(run, attempt, ranks)
    assert codes == [exit_codes.BAD_CONFIG] * plan.layout.world_size
    (check,) = checks_of(attempt)
    assert check.relative_difference > check.tolerance or check.token_difference > TOKEN_FACTOR * check.tolerance
    assert [event for event in events_of(attempt) if isinstance(event, StepEvent | StartEvent)] == []
    assert complete_checkpoints(run) == []
    for rank in range(plan.layout.world_size):
        message = json.loads(attempt.rank_failure(rank).read_text())["message"]
        assert f"should have a loss of {check.recorded_loss:.5f}" in message
        assert f"found {check.loss:.5f}" in message
        assert cause in message
    print(message)


def test_a_faulty_start_is_explained_and_not_tried_again(
    start: Callable[..., RunDirectory], upscaled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swap_two_layers_values(upscaled)
    run = start(*SHAPE, f"base={upscaled}")
    status = wait_to_end(run)
    assert (status.state, status.attempts) == (State.FAILED, 1)
    explained = explain_run(run)
    assert explained.attempts[0].status.cause == Cause.BAD_CONFIG
    show_run(explained)
    said = " ".join(capsys.readouterr().out.split())
    assert "should have a loss of" in said
    assert "model.safetensors is not what it was when the loss was recorded" in said


def test_a_resume_from_a_checkpoint_does_not_check_again(trainer: Trainer, upscaled: Path) -> None:
    run, plan = make_run(trainer, upscaled)
    assert len(checks_of(trainer.train(run, plan))) == 1
    swap_two_layers_values(upscaled)
    assert checks_of(trainer.train(run, plan)) == []


def test_a_launch_from_a_base_without_a_record_says_how_to_get_one(corpus: Path, base: Path, upscaled: Path) -> None:
    said = {}
    for folder, layers in ((base, 3), (upscaled, 4)):
        data = (f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}", "training.tokens=1280")
        words = [*SMALL, *SHAPE, *data, f"model.num_layers={layers}", f"base={folder}", "--dry-run"]
        result = CliRunner().invoke(launch, ["demo-base", *words])
        assert result.exit_code == 0, (result.output, result.exception)
        said[folder] = result.stderr
    assert "no recorded loss to compare the first one with; `orchestrate upscale --evaluate TEXT`" in said[base]
    assert "recorded loss" not in said[upscaled]


def test_a_check_that_is_not_wanted_or_has_nothing_to_compare_with_is_none(
    trainer: Trainer, base: Path, upscaled: Path
) -> None:
    swap_two_layers_values(upscaled)
    run, plan = make_run(trainer, upscaled, "training.check_first_loss=false")
    assert checks_of(trainer.train(run, plan)) == []
    run, plan = make_run(trainer, base, "model.num_layers=3")
    assert checks_of(trainer.train(run, plan)) == []
