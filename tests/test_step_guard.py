"""Numbers that are not as they should be, each caused for real in ranks that train: what is named, and what is trained.

The ranks are `tests/numeric_faults.py`, which puts the faults in. On the CPU two computations of a step are the same
bit for bit, so that every difference here is one.
"""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_solar.checkpoint_files import open_verified
from megatron_solar.evidence import Blame, RankEvidence, blame, is_same
from orchestrator import exit_codes
from orchestrator.checkpoints import choose_checkpoint
from orchestrator.events import GuardEvent, RepeatEvent, StepEvent
from orchestrator.files import read_json, write_json
from orchestrator.layout import ParallelLayout
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm import ranks
from tests import numeric_faults
from tests.conftest import Trainer, events_of, losses

STEPS = 14
BATCH = 4
DP2 = ("cluster.ranks_per_node=2", "numerics.window=16", "checkpoint.interval_steps=3", "checkpoint.keep_last=9")
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def faulty_ranks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", numeric_faults.__name__)
        yield


Start = Callable[..., tuple[RunDirectory, AttemptDirectory, list[int]]]


@pytest.fixture(scope="module")
def train(trainer: Trainer) -> Start:
    def train(
        *faults: dict[str, Any],
        more: tuple[str, ...] = (),
        steps: int = STEPS,
        end_after: int = 0,
        end: Callable[[AttemptDirectory, ranks.Ranks], None] = lambda *_: None,
    ) -> tuple[RunDirectory, AttemptDirectory, list[int]]:
        """Train one attempt with faults, and another one where it is to end after a step; return the newest."""
        run, plan = trainer.make_run(*DP2, *more, steps=steps)
        (run.path / numeric_faults.FILE).write_text(json.dumps(faults))
        for _ in range(2 if end_after else 1):
            attempt, started = trainer.start(run, plan)
            deadline = time.monotonic() + 120
            while len(started.ended()) < started.count and time.monotonic() < deadline:
                time.sleep(0.1)
                trainer.keep(run, attempt)  # a rollback waits for the marker of the newest checkpoint
                told = [event.step for event in events_of(attempt) if isinstance(event, StepEvent)]
                if end_after and attempt.number == 1 and told and told[-1] >= end_after:
                    end(attempt, started)
            codes = trainer.wait(run, attempt, started)
        return run, attempt, codes

    return train


def guards(*attempts: AttemptDirectory) -> list[GuardEvent]:
    return [event for attempt in attempts for event in events_of(attempt) if isinstance(event, GuardEvent)]


def tensors(run: RunDirectory, step: int) -> dict[str, torch.Tensor]:
    opened = open_verified(choose_checkpoint(run, step))
    return {name: opened.whole(name) for name in opened.names()}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def all_losses(run: RunDirectory) -> dict[int, tuple[float, bool]]:
    """Return loss (as text, since NaN is not itself) and skip of each step, as the newest attempt did it."""
    found = {e.step: e for attempt in run.attempts() for e in events_of(attempt) if isinstance(e, StepEvent)}
    return {step: (repr(event.loss), event.is_skipped) for step, event in sorted(found.items())}


def kept(outputs: list[float], gradients: float = 1.0, chunks: int = 1) -> RankEvidence:
    """Return what a rank keeps of micro-batches with these norms, chunk after chunk."""
    places = [(number // chunks, number % chunks) for number in range(len(outputs))]
    return RankEvidence(
        outputs=tuple((batch, chunk, norm) for (batch, chunk), norm in zip(places, outputs, strict=True)),
        gradients=(gradients,),
    )


@pytest.mark.parametrize(
    ("sizes", "changed", "expected"),
    [
        pytest.param({"data": 4}, {2: kept([1.0, NAN])}, ((2,), "output"), id="one of four replicas"),
        pytest.param({"data": 4}, {2: kept([1.0, 1.0], NAN)}, ((2,), "gradients"), id="gradients alone"),
        pytest.param({"data": 4}, {}, ((), ""), id="nobody, so that it was on the way"),
        # Ranks 0 and 1 are the first stage of two replicas, 2 and 3 the last one.
        pytest.param({"data": 2, "pipeline": 2}, {1: kept([1, 9]), 3: kept([1, 9], 9)}, ((1,), "output"), id="stage 0"),
        pytest.param(
            {"data": 2, "pipeline": 2}, {1: kept([1, 1], 9), 3: kept([1, 1], 9)}, ((3,), "gradients"), id="stage 1"
        ),
        pytest.param(
            {"tensor": 2, "pipeline": 2},
            {0: kept([9, 1]), 1: kept([9, 1]), 2: kept([9, 1]), 3: kept([9, 1])},
            ((0, 1), "output"),
            id="a tensor-parallel group as a whole",
        ),
        # Chunks alternate: rank 0 has the first and third part of the model, rank 1 the second and fourth.
        pytest.param(
            {"pipeline": 2, "virtual": 2},
            {0: kept([1, 9], 9, chunks=2), 1: kept([9, 9], 9, chunks=2)},
            ((1,), "output"),
            id="interleaved",
        ),
    ],
)
def test_the_rank_to_blame_is_where_a_difference_begins(
    sizes: dict[str, int], changed: dict[int, RankEvidence], expected: tuple[tuple[int, ...], str]
) -> None:
    layout = ParallelLayout(
        tensor_parallel=sizes.get("tensor", 1),
        pipeline_parallel=sizes.get("pipeline", 1),
        virtual_pipeline_parallel=sizes.get("virtual", 1),
        data_parallel=sizes.get("data", 1),
        global_batch_size=4,
    )
    before = [kept([1.0, 1.0], chunks=sizes.get("virtual", 1)) for _ in range(layout.world_size)]
    after = [changed.get(rank, alike) for rank, alike in enumerate(before)]
    assert (
        blame(before, after, layout, 0.0)
        == blame(after, before, layout, 0.0)
        == Blame(ranks=expected[0], differs=expected[1])
    )


def test_results_that_differ_by_less_than_the_noise_are_one() -> None:
    assert is_same(1.0, 1.0 + 1e-6, 1e-5) and not is_same(1.0, 1.0 + 1e-4, 1e-5)
    assert is_same(NAN, math.inf, 0.0) and not is_same(NAN, 1.0, 1.0) and not is_same(1.0, math.nextafter(1, 2), 0.0)


@pytest.fixture(scope="module")
def undisturbed(train: Start) -> RunDirectory:
    run, attempt, codes = train()
    assert set(codes) == {0}, attempt.rank_log(0).read_text()[-3000:]
    assert guards(attempt) == []
    return run


def test_a_rank_that_computes_wrongly_once_is_named_and_the_trajectory_is_the_undisturbed_one_bit_for_bit(
    train: Start, undisturbed: RunDirectory
) -> None:
    run, attempt, codes = train(
        {"kind": "wrong_output", "rank": 1, "step": 4, "factor": NAN},
        {"kind": "wrong_gradient", "rank": 0, "step": 6, "factor": NAN},
        {"kind": "wrong_output", "rank": 1, "step": 12, "factor": 60.0},
        # The undisturbed run overlaps nothing: neither does that change a bit, nor does it hide who was wrong.
        more=(
            "numerics.max_hardware_events=9",
            "layout.overlap_gradient_reduce=true",
            "layout.overlap_parameter_gather=true",
        ),
    )
    assert set(codes) == {0}, attempt.rank_log(0).read_text()[-3000:]
    found = [(e.step, e.doubt, e.origin, e.action, e.ranks, e.differs) for e in guards(attempt)]
    assert found == [
        (4, "loss_not_finite", "hardware", "repeat", [1], "output"),
        (6, "norm_not_finite", "hardware", "repeat", [0], "gradients"),
        (12, "loss_spike", "hardware", "repeat", [1], "output"),
    ]
    assert all(event.hosts for event in guards(attempt))
    assert losses(attempt) == losses(*undisturbed.attempts())
    assert differing(tensors(run, STEPS), tensors(undisturbed, STEPS)) == []


def test_a_gradient_norm_that_is_not_finite_beside_a_finite_loss_changes_no_weight(train: Start) -> None:
    run, attempt, codes = train(
        {"kind": "bad_sample", "sample": 5 * BATCH + 1, "factor": NAN, "gradients_alone": True},
        more=("checkpoint.interval_steps=1",),
        steps=7,
    )
    assert set(codes) == {0}, attempt.rank_log(0).read_text()[-3000:]
    (event,) = guards(attempt)
    assert (event.step, event.doubt, event.origin, event.action) == (6, "norm_not_finite", "data", "skip")
    assert math.isfinite(event.loss) and math.isnan(event.gradient_norm)
    assert (event.first_sample, event.samples, event.skipped) == (5 * BATCH, BATCH, [6, 6])
    assert differing(tensors(run, 5), tensors(run, 6)) == []
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run, 7).values())
    assert differing(tensors(run, 6), tensors(run, 7)) != []


def ask_to_stop(attempt: AttemptDirectory, _: ranks.Ranks) -> None:
    write_json(attempt.stop_request, {"reason": "time_limit"})


def kill(_: AttemptDirectory, started: ranks.Ranks) -> None:
    started.kill()


# A batch that gives NaN is skipped, then a spike of the gradients recorded only; and a rollback at a spike of the loss.
POLICIES = {
    "skip": (
        (
            {"kind": "bad_sample", "sample": 5 * BATCH + 2, "factor": NAN},
            {"kind": "bad_sample", "sample": 10 * BATCH, "factor": 300.0, "gradients_alone": True},
        ),
        ("numerics.on_spike=record",),
        [(6, "loss_not_finite", "skip", [6, 6]), (11, "norm_spike", "record", None)],
        ask_to_stop,
    ),
    "rollback": (
        ({"kind": "bad_sample", "sample": 10 * BATCH + 3, "factor": 60.0},),
        ("numerics.on_spike=rollback",),
        [(11, "loss_spike", "rollback", [10, 11])],
        kill,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_interrupted_beside_a_bad_batch_equals_the_one_that_was_not_bit_for_bit(
    train: Start, policy: str
) -> None:
    faults, more, expected, end = POLICIES[policy]
    run, attempt, codes = train(*faults, more=more)
    assert set(codes) == {0}, attempt.rank_log(0).read_text()[-3000:]
    assert [(e.step, e.doubt, e.action, e.skipped) for e in guards(attempt)] == expected
    assert {event.origin for event in guards(attempt)} == {"data"}
    spans = [skipped for _, _, _, skipped in expected if skipped is not None]
    assert [list(span) for span in choose_checkpoint(run, STEPS).facts.skipped] == spans

    interrupted, last, codes = train(*faults, more=more, end_after=11, end=end)
    assert set(codes) == {0}, last.rank_log(0).read_text()[-3000:]
    assert len(interrupted.attempts()) == 2
    repeated = [event for event in events_of(last) if isinstance(event, RepeatEvent)]
    assert len(repeated) == (end is kill) and not any(event.is_beyond_noise for event in repeated)
    assert all_losses(interrupted) == all_losses(run)
    assert differing(tensors(interrupted, STEPS), tensors(run, STEPS)) == []
    left, right = (choose_checkpoint(each, STEPS).facts for each in (interrupted, run))
    assert (left.skipped, left.recent_losses, left.recent_norms) == (
        right.skipped,
        right.recent_losses,
        right.recent_norms,
    )


@pytest.mark.parametrize(
    ("faults", "more", "code", "words"),
    [
        pytest.param(
            [{"kind": "bad_sample", "sample": 3 * BATCH, "factor": NAN}],
            ("numerics.on_not_finite=stop",),
            exit_codes.NOT_FINITE,
            "loss not finite at step 4",
            id="not finite",
        ),
        pytest.param(
            [{"kind": "bad_sample", "sample": 9 * BATCH, "factor": 60.0}],
            ("numerics.on_spike=stop",),
            exit_codes.SPIKE,
            "loss spike at step 10",
            id="spike",
        ),
        pytest.param(
            [{"kind": "bad_sample", "sample": number * BATCH, "factor": NAN} for number in (2, 4)],
            ("numerics.max_skipped_steps=1",),
            exit_codes.NOT_FINITE,
            "1 skips or rollbacks",
            id="too many skips",
        ),
        pytest.param(
            [{"kind": "wrong_output", "rank": 0, "step": 3, "factor": NAN}],
            ("layout.pipeline_parallel=2", "numerics.max_hardware_events=1"),
            exit_codes.HARDWARE,
            "to blame: rank 0 on",
            id="hardware, the first pipeline stage",
        ),
    ],
)  # fmt: skip
def test_a_run_stops_where_it_should_with_the_evidence(
    train: Start, faults: list[dict[str, Any]], more: tuple[str, ...], code: int, words: str
) -> None:
    _, attempt, codes = train(*faults, more=more, steps=12)
    assert set(codes) == {code}, attempt.rank_log(0).read_text()[-3000:]
    assert guards(attempt)[-1].action == "stop"
    record = read_json(attempt.rank_failure(1))
    assert words in record["message"]
    if code == exit_codes.HARDWARE:
        assert record["blamed"]["ranks"] == [0] and len(record["blamed"]["hosts"]) == 1
