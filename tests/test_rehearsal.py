"""A rehearsal: the real run's settings on CPU ranks, with data and a base that are made and trained on for real."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_solar.depth import depth_map
from megatron_solar.model_folder import ModelFolder
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.checks import build_layout, settings_problems
from orchestrator.config import compose
from orchestrator.errors import ConfigError, DataError
from orchestrator.events import (
    CheckpointEvent,
    EndEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
)
from orchestrator.files import JsonLines, write_json
from orchestrator.launch import check_inputs
from orchestrator.model_shape import TransformerShape
from orchestrator.pictures import draw_timeline
from orchestrator.plan import make_plan, write_plan
from orchestrator.rehearsal import differences, in_common, rehearsal_settings, toy_layers, unused_name
from orchestrator.rehearsal_inputs import make_inputs
from orchestrator.rehearsal_report import KilledNode, is_tracked, memory_bytes, rehearsal_of
from orchestrator.run_directory import RunDirectory, create_run
from orchestrator.settings import DataSettings, LayoutSettings, RunSettings, TrainingSettings
from orchestrator.tokenize.manifest import read_manifest
from tests.conftest import REPOSITORY, Trainer, events_of, losses

H100 = compose("solar-10.7b").cluster
SANDBOX = compose("demo-base", ["cluster=sandbox"]).cluster
LOCAL = compose("demo-base").cluster
at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def solar(*overrides: str) -> RunSettings:
    return compose("solar-10.7b", ["cluster.nodes=32", *overrides])


@pytest.mark.parametrize(
    ("overrides", "ranks_per_node", "grid", "micro_batches"),
    [
        (("layout.pipeline_parallel=4",), 1, (2, 4, 4), 4),
        (("layout.pipeline_parallel=4",), 8, (2, 4, 32), 4),
        ((), 8, (2, 1, 128), 2),
        ((), 1, (2, 1, 16), 2),
        # The toy has 4 layers, so that no 6 of them can be recomputed at once.
        (("layout.context_parallel=4", "layout.recompute=full", "layout.recompute_layers=6"), 8, (2, 1, 32), 2),
    ],
)
def test_solar_on_32_nodes_is_rehearsed_at_its_layout(
    overrides: tuple[str, ...], ranks_per_node: int, grid: tuple[int, int, int], micro_batches: int
) -> None:
    real = solar(*overrides)
    rehearsal = rehearsal_settings(real, cluster=SANDBOX, ranks_per_node=ranks_per_node, steps=10, spare_nodes=1)
    plan = make_plan(rehearsal)
    assert (plan.layout.tensor_parallel, plan.layout.pipeline_parallel, plan.layout.data_parallel) == grid
    assert plan.layout.world_size == 32 * ranks_per_node
    assert plan.layout.num_microbatches == micro_batches
    assert plan.layout.sequence_parallel
    assert plan.total_steps == 10
    assert plan.parameters < 3e6
    shape, cluster = rehearsal.model, rehearsal.cluster
    assert (shape.num_layers, shape.num_attention_heads, shape.num_query_groups) == (4, 8, 2)  # SOLAR: 32 in 8
    assert (cluster.name, cluster.device, cluster.nodes, cluster.spare_nodes) == ("sandbox", "cpu", 32, 1)
    assert (rehearsal.precision.dtype, rehearsal.training.learning_rate) == ("bf16", 3e-5)
    assert rehearsal.checkpoint.interval_steps == 5
    assert rehearsal.name == "solar-10.7b-rehearsal"


small = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def real_runs(draw: st.DrawFn) -> RunSettings:
    """Plans of any shape and layout; most can be run."""
    tensor, pipeline, virtual, data = draw(small), draw(small), draw(st.sampled_from([1, 1, 2, 3])), draw(small)
    groups = tensor * draw(small)
    heads = groups * draw(st.sampled_from([1, 2, 4, 5, 16, 71]))
    micro = draw(small)
    sequence = tensor * draw(st.sampled_from([1, 2, 16, 512]))
    batch = micro * data * pipeline * draw(small)
    ranks_per_node = draw(st.sampled_from([tensor, tensor * pipeline, tensor * data]))
    return RunSettings(
        name=draw(st.sampled_from(["a", "solar-10.7b", "x" * 100])),
        base="base",
        model=TransformerShape(
            num_layers=pipeline * virtual * draw(small),
            hidden_size=heads * 64,
            ffn_hidden_size=tensor * 1024,
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=tensor * 4000,
            max_position_embeddings=sequence,
        ),
        data=DataSettings(train=("data",), sequence_length=sequence),
        training=TrainingSettings(tokens=10**9),
        layout=LayoutSettings(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            virtual_pipeline_parallel=virtual,
            sequence_parallel=draw(st.booleans()),
            micro_batch_size=micro,
            global_batch_size=batch,
        ),
        cluster=dataclasses.replace(
            H100, nodes=tensor * pipeline * data // ranks_per_node or 1, ranks_per_node=ranks_per_node
        ),
    )


@at_any_speed
@given(real=real_runs(), ranks_per_node=small, steps=st.integers(1, 12))
def test_any_plan_that_can_be_run_can_be_rehearsed_where_the_ranks_divide(
    real: RunSettings, ranks_per_node: int, steps: int
) -> None:
    assume(not settings_problems(real))
    before = real.layout
    ranks = real.cluster.nodes * ranks_per_node
    if ranks % (before.tensor_parallel * before.pipeline_parallel):
        with pytest.raises(ConfigError, match="do not divide by") as error:
            rehearsal_settings(real, cluster=SANDBOX, ranks_per_node=ranks_per_node, steps=steps)
        ranks_per_node = int(str(error.value).partition("--ranks-per-node ")[2].split()[0])
    rehearsal = rehearsal_settings(real, cluster=SANDBOX, ranks_per_node=ranks_per_node, steps=steps)
    plan, shape, after = make_plan(rehearsal), rehearsal.model, rehearsal.layout
    assert settings_problems(rehearsal) == []
    assert dataclasses.replace(after, global_batch_size=before.global_batch_size) == before
    assert plan.layout.world_size == real.cluster.nodes * ranks_per_node
    assert plan.layout.num_microbatches >= after.pipeline_parallel
    assert plan.total_steps == steps
    assert 1 <= rehearsal.checkpoint.interval_steps <= steps
    fewer = round(shape.num_layers * 2 / 3)
    assert len(depth_map("solar", fewer, shape.num_layers).sources) == shape.num_layers > fewer
    ratio = real.model.num_attention_heads // real.model.num_query_groups
    if ratio <= 8:
        assert shape.num_attention_heads // shape.num_query_groups == ratio
    assert shape.parameters() < 2 * shape.vocab_size * 128 + shape.num_layers * 13 * 128**2  # of at most 64 heads


@pytest.mark.parametrize(("chunks", "layers"), [(1, 4), (2, 4), (3, 6), (4, 4), (5, 10), (6, 6), (8, 8), (12, 12)])
def test_the_toy_has_the_fewest_layers_that_divide_and_that_solar_makes_with_a_drop(chunks: int, layers: int) -> None:
    assert toy_layers(chunks) == layers
    possible = [n for n in range(chunks, layers + 1, chunks) if n % 2 == 0 and n >= 4]
    assert possible == [layers]


def test_what_was_given_on_the_command_line_stays() -> None:
    overrides = {
        "model.num_layers": "12",
        "model.num_attention_heads": "16",
        "data.sequence_length": "64",
        "layout.global_batch_size": "512",
        "checkpoint.interval_steps": "3",
        "training.validation_samples": "7",
        "precision": "fp32",
        "cluster.time_limit": "0:20:00",
        "cluster.environment.SEEN": "yes",
        "cluster.partition": "h100-long",
        "training.tokens": "1e9",
        "name": "wide",
    }
    real = solar(*(f"{field}={value}" for field, value in overrides.items()))
    rehearsal = rehearsal_settings(
        real, cluster=SANDBOX, ranks_per_node=1, steps=10, given=frozenset({*overrides, "cluster", "model"})
    )
    assert (rehearsal.model.num_layers, rehearsal.model.num_attention_heads, rehearsal.model.hidden_size) == (
        12,
        16,
        32,
    )
    assert rehearsal.data.sequence_length == 64
    assert rehearsal.layout.global_batch_size == 512
    assert rehearsal.checkpoint.interval_steps == 3
    assert rehearsal.training.validation_samples == 7
    assert rehearsal.precision.dtype == "fp32"
    assert rehearsal.cluster.time_limit == "0:20:00"
    assert rehearsal.cluster.environment == {**SANDBOX.environment, "SEEN": "yes"}
    # A partition of the real site is none of the sandbox; the steps and the name have words of their own.
    assert rehearsal.cluster.partition == SANDBOX.partition
    assert make_plan(rehearsal).total_steps == 10
    assert rehearsal.name == "wide-rehearsal"


def test_what_was_given_and_cannot_be_is_an_error_and_never_mended() -> None:
    real = solar("layout.pipeline_parallel=4")
    with pytest.raises(ConfigError, match=r"model.num_layers=6 cannot be split over layout.pipeline_parallel=4"):
        rehearsal_settings(
            dataclasses.replace(real, model=dataclasses.replace(real.model, num_layers=6)),
            cluster=SANDBOX,
            ranks_per_node=1,
            steps=10,
            given=frozenset({"model.num_layers"}),
        )


def test_on_a_real_cluster_it_keeps_the_site_and_asks_for_no_gpus() -> None:
    site = dataclasses.replace(
        H100,
        partition="cpu",
        account="research",
        price_per_gpu_hour=2.0,
        slurm=dataclasses.replace(H100.slurm, gpu_type="h100", qos="short", constraint="ib"),
        container=dataclasses.replace(H100.container, runtime="pyxis", image="/images/megatron.sqsh"),
        worker_python="/usr/bin/python3",
    )
    cluster = rehearsal_settings(solar(), cluster=site, ranks_per_node=2, steps=4).cluster
    assert (cluster.device, cluster.fork_ranks, cluster.slurm.gpus, cluster.slurm.gpu_type) == (
        "cpu",
        False,
        "none",
        None,
    )
    assert (cluster.partition, cluster.account, cluster.slurm.qos, cluster.slurm.constraint) == (
        "cpu",
        "research",
        "short",
        "ib",
    )
    assert (cluster.container, cluster.worker_python) == (site.container, site.worker_python)
    assert (cluster.price_per_gpu_hour, cluster.peak_tflops, cluster.gpu) == (None, None, "")


def test_it_says_what_differs_from_the_real_run_and_what_does_not() -> None:
    real = solar("layout.pipeline_parallel=4")
    rehearsal = rehearsal_settings(real, cluster=SANDBOX, ranks_per_node=8, steps=10)
    told = {name: (before, after) for name, before, after in differences(real, rehearsal)}
    assert told["layers"] == ("48", "4")
    assert told["steps"] == ("238,419 of 4.19 M tokens", "10 of 4.1 k tokens")
    assert told["machines"] == ("one a node", "this one alone")
    assert "NCCL" in told["device"][0]
    assert "nothing is learnt of" in told["device"][1]
    same = dict(in_common(real, rehearsal))
    assert same["ranks"] == "32 x 8 = 256"
    assert same["grid"] == "TP 2 × PP 4, sequence parallel"
    assert same["data parallel"] == "32"
    assert not told.keys() & same.keys()
    assert differences(real, real) == []


def test_a_taken_name_gets_a_number() -> None:
    taken = {"a-rehearsal", "a-rehearsal-2"}
    assert unused_name("a-rehearsal", taken.__contains__) == "a-rehearsal-3"
    assert unused_name("b-rehearsal", taken.__contains__) == "b-rehearsal"


# What it reads, and a run on it.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rehearsals of this module make what they read."""
    return tmp_path_factory.mktemp("inputs") / "rehearsals"


def local_rehearsal(tmp_path: Path, *overrides: str, nodes: int = 1, steps: int = 4) -> RunSettings:
    real = compose("solar-10.7b", [f"paths.runs={tmp_path / 'runs'}", f"base={tmp_path / 'missing'}",
                                   f"data.train={tmp_path / 'none'}", *overrides])  # fmt: skip
    return rehearsal_settings(
        dataclasses.replace(real, cluster=dataclasses.replace(real.cluster, nodes=nodes)),
        cluster=LOCAL,
        ranks_per_node=build_layout(real).tensor_parallel * build_layout(real).pipeline_parallel,
        steps=steps,
    )


def test_data_sets_and_an_upscaled_base_are_made_once_and_small(tmp_path: Path, inputs: Path) -> None:
    asked = local_rehearsal(tmp_path)
    began = time.monotonic()
    made = make_inputs(inputs, asked)
    seconds = time.monotonic() - began
    held = sum(path.stat().st_size for path in inputs.rglob("*") if path.is_file())
    print(f"made in {seconds:.1f} s, {held / 1e6:.1f} MB")
    assert held < 50e6
    assert [manifest.fingerprint for manifest in check_inputs(make_plan(made))] == [
        read_manifest(inputs / "train").fingerprint
    ]
    lineage = json.loads((Path(made.base) / "lineage.json").read_text())
    assert (lineage["strategy"], lineage["drop"], lineage["layer_sources"]) == ("solar", 1, [0, 1, 1, 2])
    assert ModelFolder.open(Path(made.base)).shape == made.model
    assert (Path(made.base) / "tokenizer.model").exists()
    stamps = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    assert make_inputs(inputs, asked) == made
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == stamps


def test_data_sets_and_a_base_that_are_there_and_fit_are_taken(tmp_path: Path, inputs: Path, corpus: Path) -> None:
    data = (f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}")
    first = make_inputs(inputs, local_rehearsal(tmp_path, *data))
    assert first.data.train == (str(corpus / "train"),)
    again = dataclasses.replace(local_rehearsal(tmp_path, *data), base=first.base)
    assert make_inputs(tmp_path / "untouched", again) == again
    assert not (tmp_path / "untouched").exists()
    wider = dataclasses.replace(again, model=dataclasses.replace(again.model, ffn_hidden_size=64))
    assert make_inputs(tmp_path / "other", wider).base.startswith(str(tmp_path / "other"))
    random = dataclasses.replace(again, base="random")
    assert make_inputs(tmp_path / "untouched", random) == random


def test_the_vocabulary_is_that_of_the_data_that_were_made(tmp_path: Path, inputs: Path) -> None:
    asked = dataclasses.replace(local_rehearsal(tmp_path), base="random")
    large = dataclasses.replace(asked, model=dataclasses.replace(asked.model, vocab_size=128256))
    assert make_inputs(inputs, large).model.vocab_size == 32000
    assert make_inputs(inputs, large, given=frozenset({"model.vocab_size"})).model.vocab_size == 128256


def test_without_data_and_without_a_vocabulary_both_remedies_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)  # as where it is not installed
    with pytest.raises(DataError, match=r"pip install 'orchestrate\[demo\]'.*data.train=FOLDER"):
        make_inputs(tmp_path / "made", local_rehearsal(tmp_path))
    assert not (tmp_path / "made").exists()


def test_layers_that_solar_cannot_make_are_refused(tmp_path: Path, inputs: Path) -> None:
    asked = local_rehearsal(tmp_path)
    odd = dataclasses.replace(asked, model=dataclasses.replace(asked.model, num_layers=5))
    with pytest.raises(ConfigError, match="layers=5 cannot be made"):
        make_inputs(inputs, odd)


def run_of(settings: RunSettings) -> RunDirectory:
    run = create_run(Path(settings.paths.runs), settings.name)
    run.code.symlink_to(REPOSITORY)
    write_plan(run.launched_plan, make_plan(settings))
    return run


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("layout.tensor_parallel=1", "layout.sequence_parallel=false"), id="one rank"),
        pytest.param(("layout.pipeline_parallel=2",), id="TP2-PP2-SP"),
    ],
)
def test_ranks_train_on_what_was_made_from_the_upscaled_base(
    tmp_path: Path, inputs: Path, trainer: Trainer, overrides: tuple[str, ...]
) -> None:
    settings = make_inputs(inputs, local_rehearsal(tmp_path, *overrides, "data.validation=[]"))
    run = run_of(settings)
    attempt = trainer.train(run, make_plan(settings))
    events = events_of(attempt)
    (start,) = [event for event in events if isinstance(event, StartEvent)]
    assert start.loaded_from == settings.base
    assert len(losses(attempt)) == 4
    assert losses(attempt)[0] == pytest.approx(math.log(32000), rel=0.01)  # the base is of new weights
    assert [event.step for event in events if isinstance(event, ValidationEvent)] == [0, 4]
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [0, 2, 4]


# What it did.

DONE: dict[str, Any] = {"gradient_norm": 1.0, "learning_rate": 1e-3, "consumed_samples": 1, "consumed_tokens": 32,
        "data_seconds": 0.0, "tokens_per_second": 1.0, "tokens_per_second_per_gpu": 1.0, "tflops_per_gpu": 0.0,
        "mfu": 0.0}  # fmt: skip


def started(moment: float, step: int) -> StartEvent:
    return StartEvent(
        time=moment, step=step, world_size=32, layout="TP 2 × PP 4 × DP 4", device="cpu", loaded_from="base",
        ancestry=(), parameters=1, flops_per_token=1.0, flops_convention="causal_half", peak_tflops=1.0,
        peak_source="", start_seconds=3.0,
    )  # fmt: skip


@pytest.fixture
def struck_run(tmp_path: Path) -> RunDirectory:
    """A run of ten steps, a second each; its node died after step 7, its save of step 5 was whole."""
    run = create_run(tmp_path, "solar-rehearsal")
    run.add_submission({"time": 1000.0, "scheduler": "slurm", "job_id": "1", "by": "person"})
    for number, begun, first, steps in ((1, 1002.0, 1010.0, range(1, 8)), (2, 1025.0, 1030.0, range(6, 11))):
        attempt = run.new_attempt()
        write_json(attempt.job, {"started": begun, "job_id": "1", "nodes": "n[001-033]"})
        told, noted = JsonLines(attempt.events), JsonLines(attempt.supervisor_events)
        told.append(event_record(started(first, steps[0] - 1)))
        for place, step in enumerate(steps, start=1):
            told.append(event_record(StepEvent(time=first + place, step=step, loss=10.0, step_seconds=1.0, **DONE)))
        saved, last = (5, first + 6.5) if number == 1 else (10, first + 6)
        noted.append(event_record(CheckpointEvent(time=last, step=saved, name=f"step_{saved:07d}", bytes=1,
                                                  seconds=1.5, write_seconds=1.0, hash_seconds=0.1)))  # fmt: skip
        if number == 2:
            told.append(event_record(EndEvent(time=first + 6, step=10, reason="finished")))
        told.close()
        noted.close()
        write_json(
            attempt.outcome,
            {
                "cause": "finished" if number == 2 else "node_failure",
                "ended": first + (7 if number == 2 else 15),
                "ledger": {"seconds": {"checking": 2.0}},
            },
        )
    return run


def test_it_reports_the_phases_and_how_the_loss_of_a_node_was_met(struck_run: RunDirectory) -> None:
    told = rehearsal_of(
        struck_run, inputs_seconds=5.0, peak_memory_bytes=2**30, killed=KilledNode(node="n007", time=1017.5)
    )
    assert [(phase.attempt, phase.name, phase.seconds) for phase in told.phases] == [
        (1, "queued", 2.0),
        (1, "nodes checked", 2.0),
        (1, "ranks launched", 3.0),
        (1, "ranks started", 3.0),
        (1, "trained and saved", 7.0),
        (1, "end noticed", 8.0),
        (2, "queued", 0.0),
        (2, "nodes checked", 2.0),
        (2, "ranks launched", 0.0),
        (2, "ranks started", 3.0),
        (2, "trained and saved", 6.0),
        (2, "end noticed", 1.0),
    ]
    loss = told.node_loss
    assert loss is not None
    assert (loss.node, loss.after_step, loss.noticed_seconds, loss.restart_seconds, loss.steps_lost) == (
        "n007",
        7,
        7.5,
        6.0,
        2,
    )
    assert (told.attempts, told.last_step, told.saves, told.save_seconds) == (2, 10, 2, 1.5)
    assert (told.seconds, told.step_seconds, told.ranks) == (37.0, 1.0, 32)
    assert told.is_finished
    assert not told.is_tracked


def test_a_kill_that_ended_no_attempt_is_reported_as_not_noticed(struck_run: RunDirectory) -> None:
    late = KilledNode(node="n007", time=1036.5)
    loss = rehearsal_of(struck_run, inputs_seconds=0.0, peak_memory_bytes=0, killed=late).node_loss
    assert loss is not None
    assert (loss.after_step, loss.noticed_seconds, loss.restart_seconds, loss.steps_lost) == (10, None, None, None)


def test_it_is_tracked_once_every_byte_of_every_attempt_was_shipped(struck_run: RunDirectory) -> None:
    files = [path for attempt in struck_run.attempts() for path in (attempt.events, attempt.supervisor_events)]
    offsets = {f"{path.parent.name}/{path.name}": path.stat().st_size for path in files}
    write_json(struck_run.mlflow, {"offsets": offsets})
    assert is_tracked(struck_run)
    write_json(struck_run.mlflow, {"offsets": {**offsets, "0002/events.jsonl": offsets["0002/events.jsonl"] - 1}})
    assert not is_tracked(struck_run)


def test_the_timeline_is_a_picture(struck_run: RunDirectory, tmp_path: Path) -> None:
    told = rehearsal_of(struck_run, inputs_seconds=0.0, peak_memory_bytes=0)
    draw_timeline(tmp_path / "timeline.png", "solar-rehearsal", told.phases, {"node n007 killed": 1017.5})
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_memory_of_processes_counts_what_forked_ones_share_once() -> None:
    program = (
        "import os, sys\n"
        "held = b'x' * 50_000_000\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        sys.stdin.read()\n"
        "        os._exit(0)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "ready\n"
        family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children()]
        together = memory_bytes(family)
        print(f"five processes, 50 MB shared: {together / 1e6:.0f} MB together")
        assert len(family) == 5
        assert 50e6 < together < 100e6
        parent.stdin.close()
    psutil.wait_procs(family, timeout=30)
    assert memory_bytes(family) == 0  # those that have ended count nothing
