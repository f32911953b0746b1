"""What `orchestrate data ledger` says of a run: while it goes on, after a failure, with a step that was skipped.

The samples themselves, phase by phase, are compared in tests/test_phases.py.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.sample_order import SamplePlaces
from megatron_solar.sample_request import request_of
from orchestrator.checkpoints import checkpoint_name, complete_checkpoints
from orchestrator.commands.main import group
from orchestrator.data_ledger import data_ledger
from orchestrator.errors import DataError
from orchestrator.files import write_json
from orchestrator.plan import read_plan, write_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm import ranks
from orchestrator.status import read_status
from orchestrator.values import to_plain
from tests import numeric_faults
from tests.conftest import Trainer, events_of, validation_losses

STEPS, BATCH, LENGTH = 10, 4, 32
SKIPPED = 3
TOKENS = BATCH * LENGTH


@pytest.fixture(scope="module", autouse=True)
def megatron_on_cpu() -> Iterator[None]:
    """Megatron is imported inside, as in every CPU worker."""
    with cuda_calls_on_cpu():
        yield


@pytest.fixture(scope="module")
def run(trainer: Trainer, corpus: Path) -> Iterator[RunDirectory]:
    """A run through two phases, with a batch that gives NaN; it has checkpoints of steps 0, 8 and 10."""
    train, other = corpus / "train", corpus / "validation"
    phases = f"[{{from_tokens: {6 * TOKENS}, train: [{other}, {train}], weights: [1, 2]}}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", numeric_faults.__name__)
        run, plan = trainer.make_run(
            f"data.train=[{train},{other}]", "data.weights=[3,1]", f"data.phases={phases}",
            "checkpoint.interval_steps=8", steps=STEPS,
        )  # fmt: skip
        fault = {"kind": "bad_sample", "sample": (SKIPPED - 1) * BATCH + 1, "factor": float("nan")}
        (run.path / numeric_faults.FILE).write_text(json.dumps([fault]))
        trainer.train(run, plan)
    yield run


def counts_in(run: RunDirectory, first: int, end: int) -> Counter[str]:
    """Count the data sets of samples one by one."""
    request = request_of(read_plan(run.plan))
    places = SamplePlaces(request.train, run.data_index / "train")
    return Counter(Path(request.train.prefixes[places.place(n)[0]]).parent.name for n in range(first, end))


def test_the_ledger_counts_each_phase_and_the_skipped_step_apart(run: RunDirectory) -> None:
    ledger = data_ledger(run)
    assert (ledger.step, ledger.samples, ledger.tokens) == (STEPS, STEPS * BATCH, STEPS * TOKENS)
    assert (ledger.planned_samples, ledger.skipped_steps) == (STEPS * BATCH, 1)
    assert [(phase.first_step, phase.first_sample, phase.end_sample) for phase in ledger.phases] == [
        (1, 0, 24), (7, 24, 40),
    ]  # fmt: skip
    assert [(e.phase, e.data_set) for e in ledger.entries] == [
        (0, "train"), (0, "validation"), (1, "validation"), (1, "train"),
    ]  # fmt: skip
    for entry in ledger.entries:
        phase = ledger.phases[entry.phase]
        assert entry.samples == counts_in(run, phase.first_sample, phase.end_sample)[entry.data_set]
        assert entry.tokens == entry.samples * LENGTH
    assert [round(entry.share_asked, 3) for entry in ledger.entries] == [0.75, 0.25, 0.333, 0.667]
    skipped = {entry.data_set: entry.skipped_samples for entry in ledger.entries if entry.phase == 0}
    assert skipped == counts_in(run, (SKIPPED - 1) * BATCH, SKIPPED * BATCH)
    assert [entry.skipped_samples for entry in ledger.entries if entry.phase == 1] == [0, 0]


def test_what_is_not_saved_counts_while_the_attempt_goes_on_and_no_more_when_it_has_ended(
    run: RunDirectory, tmp_path: Path
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / run.name, symlinks=True)))
    shutil.rmtree(copy.checkpoint_path(checkpoint_name(STEPS, 1)))
    assert complete_checkpoints(copy)[-1].step == 8
    going = data_ledger(copy)
    assert (going.step, going.is_saved) == (STEPS, False)
    write_json(copy.attempt(1).outcome, {"cause": "exception", "action": "stop"})
    ended = data_ledger(copy)
    assert (ended.step, ended.is_saved, ended.samples, ended.skipped_steps) == (8, True, 8 * BATCH, 1)
    left = {entry.data_set: entry.planned_samples for entry in ended.entries if entry.phase == 1}
    assert left == counts_in(run, 8 * BATCH, STEPS * BATCH)
    shutil.rmtree(copy.data_index)
    with pytest.raises(DataError, match="no sample index of the attempt's samples is there any more"):
        data_ledger(copy)


def test_before_the_first_step_nothing_is_read_and_nothing_indexed(trainer: Trainer) -> None:
    run, plan = trainer.make_run(steps=5)
    write_plan(run.launched_plan, plan)
    ledger = data_ledger(run)
    assert (ledger.step, ledger.samples, ledger.epochs) == (0, 0, {"train": 0.0})
    (entry,) = ledger.entries
    assert (entry.samples, entry.share, entry.share_asked, entry.planned_samples) == (0, None, 1.0, None)


def test_the_screen_and_the_json_say_the_same(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    group(["data", "ledger", str(run.path), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(to_plain(data_ledger(run))))
    group(["data", "ledger", str(run.path)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == f"data of run {run.name}"
    assert any(line.startswith("skipped") and "1 step, 4 of these samples" in line for line in lines)
    assert any(line.startswith("phase 1") and "from step 7 on, samples 24 to below 40" in line for line in lines)
    table = lines.index("") + 2
    assert [line.split()[:3] for line in lines[table : table + 4]] == [
        [str(entry.phase), entry.data_set, str(entry.samples)] for entry in data_ledger(run).entries
    ]
    assert lines[-1] == f"next: orchestrate data show {run.name} --step {STEPS}"


def test_each_held_out_data_set_has_a_loss_of_its_own(trainer: Trainer, corpus: Path) -> None:
    sets = (corpus / "validation", corpus / "train")
    both, plan = trainer.make_run(f"data.validation=[{sets[0]},{sets[1]}]", steps=2)
    attempt = trainer.train(both, plan)
    alone = []
    for folder in sets:
        run, plan = trainer.make_run(f"data.validation={folder}", steps=2)
        alone.append(validation_losses(trainer.train(run, plan)))
    told = [event for event in events_of(attempt) if hasattr(event, "losses")]
    assert [event.losses for event in told] == [
        {"validation": first, "train": second} for first, second in zip(*alone, strict=True)
    ]
    assert [event.loss for event in told] == [sum(pair) / 2 for pair in zip(*alone, strict=True)]
    assert [event.samples for event in told] == [16, 16]
    assert read_status(both).validation_losses == told[-1].losses
