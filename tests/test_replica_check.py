"""Replicas that should hold the same weights: what the sums of bits see, who is outvoted, and a bit that is flipped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_solar import replica_check
from megatron_solar.replica_check import bit_sum, odd_replicas
from orchestrator import exit_codes
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.events import ReplicaEvent, StepEvent
from orchestrator.exit_codes import Cause
from orchestrator.files import read_json
from orchestrator.slurm import ranks
from orchestrator.slurm.endings import explain_ending
from orchestrator.slurm.leaving import nodes_that_computed_wrongly
from orchestrator.slurm.sandbox import Sandbox
from tests import numeric_faults
from tests.conftest import Trainer, events_of
from tests.launched import wait_for
from tests.slurm_runs import begun, launch_on, needs_root, needs_slurm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_sees_any_bit_and_any_swap_and_no_layout(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(37, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = bit_sum(values)
    assert bit_sum(values.clone()) == whole == bit_sum(values.t().contiguous().t())
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    for bit in range(8 * values.element_size() - 1):
        flipped = values.clone()
        flipped.view(-1).view(integers)[202] ^= 1 << bit
        assert bit_sum(flipped) != whole
    swapped = values.clone()
    swapped[3, 4], swapped[30, 9] = values[30, 9], values[3, 4]
    assert bit_sum(swapped) != whole
    monkeypatch.setitem(replica_check.PART_ELEMENTS, "cpu", 100)
    assert bit_sum(values) == whole  # also in parts


def test_not_a_number_is_compared_by_its_bits() -> None:
    assert bit_sum(torch.tensor([float("nan"), 1.0])) == bit_sum(torch.tensor([float("nan"), 1.0]))


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([[1, 2, 3]] * 4, ([], [], True)),
        ([[1, 2, 3], [1, 2, 3], [1, 9, 3]], ([2], [1], True)),
        ([[7, 2, 3], [1, 2, 3], [1, 9, 3]], ([0, 2], [0, 1], True)),
        ([[1, 2], [1, 3]], ([0, 1], [1], False)),
        ([[1], [1], [2], [2]], ([0, 1, 2, 3], [0], False)),
    ],
)
def test_the_majority_says_which_replica_is_odd(
    sums: list[list[int]], expected: tuple[list[int], list[int], bool]
) -> None:
    assert odd_replicas(sums) == expected


def test_a_flipped_bit_of_one_replica_is_named_before_anything_of_it_is_saved(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "WORKER", numeric_faults.__name__)
    run, plan = trainer.make_run(
        "cluster.ranks_per_node=3", "layout.global_batch_size=3", "checkpoint.interval_steps=4", steps=12
    )
    (run.path / numeric_faults.FILE).write_text(json.dumps([{"kind": "flipped_weight", "rank": 2, "step": 8}]))
    attempt, started = trainer.start(run, plan)
    assert trainer.wait(run, attempt, started) == [exit_codes.HARDWARE] * 3
    (event,) = [event for event in events_of(attempt) if isinstance(event, ReplicaEvent)]
    assert (event.step, event.ranks, event.is_majority) == (8, [2], True)
    assert event.parameters == ["embedding.word_embeddings.weight"]
    assert [each.step for each in complete_checkpoints(run)] == [0, 4]
    assert max(each.step for each in events_of(attempt) if isinstance(each, StepEvent)) == 8

    # What the supervisor makes of it: the node that is outvoted is blamed, and left.
    records = [read_json(attempt.rank_failure(rank)) for rank in range(3)]
    ending = explain_ending(records, {}, dict.fromkeys(range(3), exit_codes.HARDWARE), asked=None, host="here")
    assert (ending.cause, ending.rank, ending.host) == (Cause.HARDWARE, 2, event.hosts[0])
    assert "embedding.word_embeddings.weight is another one on rank 2" in ending.message
    assert list(nodes_that_computed_wrongly(attempt)) == [event.hosts[0]]


@needs_slurm
@needs_root
@pytest.mark.fault
def test_the_node_of_a_rank_that_computed_wrongly_is_left_and_a_spare_takes_its_place(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=4)
    run = launch_on(
        tmp_path / "runs", corpus, "cluster.nodes=3", "cluster.spare_nodes=1", "layout.global_batch_size=3",
        "checkpoint.interval_steps=4", "cluster.checks.enabled=false", "cluster.slurm.sbatch_lines=[--hold]",
    )  # fmt: skip
    # The run's own copy of the code gets the faults, before anything has imported it.
    shutil.copy(numeric_faults.__file__, run.code / "megatron_solar" / "numeric_faults.py")
    starts = run.code / "orchestrator" / "slurm" / "ranks.py"
    starts.write_text(starts.read_text().replace('"megatron_solar.worker"', '"megatron_solar.numeric_faults"'))
    fault = {"kind": "flipped_weight", "rank": 2, "step": 8, "attempt": 1}
    (run.path / numeric_faults.FILE).write_text(json.dumps([fault]))
    slurm.ask("scontrol", "release", str(run.submissions()[-1]["job_id"]))
    wait_for("the second attempt's steps", begun(run, 2), run)

    outcome = read_json(run.attempt(1).outcome)
    nodes = [read_json(run.attempt(number).checks / "choice.json")["nodes"] for number in (1, 2)]
    assert (outcome["cause"], outcome["action"], outcome["rank"]) == ("hardware", "restart", 2)
    assert outcome["host"] == nodes[0][2]
    assert outcome["excluded"] == [nodes[0][2]]
    assert outcome["saved_step"] == 4
    assert nodes[0][2] not in nodes[1] and len(nodes[1]) == 3
