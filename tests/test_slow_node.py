"""A node that is slow for real: its ranks measure it before training starts, and the run starts without it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.files import read_json
from orchestrator.reconcile import State
from orchestrator.slurm.sandbox import Sandbox
from tests.launched import wait_to_end
from tests.slurm_faults import slow_node
from tests.slurm_runs import launch_on, needs_root, needs_slurm

pytestmark = [needs_slurm, needs_root, pytest.mark.fault]


def test_a_node_that_is_slow_is_named_and_the_run_starts_on_the_spare(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, corpus: Path
) -> None:
    slurm = start_slurm(nodes=3)
    # Each rank a process of its own node; half of the median, since the other nodes share this machine's cores.
    options = ("cluster.fork_ranks=false", "cluster.checks.limits={matrix_speed: 0.5}", "training.tokens=1280")
    with slow_node(slurm, "n003", percent=10):
        run = launch_on(tmp_path / "runs", corpus, *options, "cluster.spare_nodes=1")
        status = wait_to_end(run)
    assert (status.state, status.attempts) == (State.FINISHED, 1)
    choice = read_json(run.attempt(1).checks / "choice.json")
    assert (choice["nodes"], choice["spares"]) == (["n001", "n002"], ["n003"])
    assert "matrix_speed" in choice["doubtful"]["n003"]
    assert read_json(run.attempt(1).outcome)["ranks_on"] == ["n001", "n002"]
