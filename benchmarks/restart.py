"""What a restart in the allocation costs beyond the ranks' own start, both measured in one run.

    python benchmarks/restart.py [--rounds 5]

A run with two ranks on a Slurm of our own, each on a node, and as many spare nodes as there are rounds. In every
round a rank is killed, then a node with a rank. For each, in seconds: from the kill until the attempt has ended, from
there until the next one is begun, until its nodes are chosen, until a rank's first line, and the ranks' own start, to
their first step; then from the kill to that first step, to the first one that nobody had done before, and what the
former is beyond the ranks' own start. Killing nodes needs root.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.demo import find_vocabulary
from orchestrator.events import StartEvent, StepEvent, read_events
from orchestrator.files import read_json
from orchestrator.run_directory import AttemptDirectory
from orchestrator.slurm import sandbox
from orchestrator.tokenize.stage import tokenize_corpus
from tests.launched import wait_for
from tests.slurm_runs import launch_on
from tests.soak_faults import Scene

INTERVAL_STEPS = 4
COLUMNS = ("ended", "next", "nodes", "spawned", "own start", "first step", "new step", "beyond", "ratio")
WIDTH = 11


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    name, folder = f"benchmark-{os.getpid()}", Path(tempfile.mkdtemp(prefix="benchmark-restart-"))
    measured: dict[str, list[tuple[float, ...]]] = {"rank killed": [], "node killed": []}
    try:
        slurm = sandbox.start(name, nodes=2 + rounds)
        os.environ.update(slurm.environment())
        source = Path(os.__file__).parent / "email"
        tokenize_corpus([source], find_vocabulary(), folder / "train", progress=False)
        run = launch_on(
            folder / "runs", folder, "data.validation=[]", f"cluster.spare_nodes={rounds}",
            f"checkpoint.interval_steps={INTERVAL_STEPS}",
        )  # fmt: skip
        scene = Scene(name=name, run=run, interval_steps=INTERVAL_STEPS, random=random.Random(0))
        for _ in range(rounds):
            measured["rank killed"].append(restart(scene, lambda: scene.ranks()[1].kill()))
            measured["node killed"].append(restart(scene, lambda: sandbox.kill_node(scene.slurm, scene.nodes()[1])))
    finally:
        if sandbox.find(name) is not None:
            sandbox.stop(name, patience_seconds=2)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'':14}" + "".join(f"{name:>{WIDTH}}" for name in COLUMNS) + f"   (seconds, medians of {rounds})")
    for fault, times in measured.items():
        print(
            f"{fault:14}" + "".join(f"{statistics.median(column):>{WIDTH}.1f}" for column in zip(*times, strict=True))
        )


def restart(scene: Scene, kill: Callable[[], object]) -> tuple[float, ...]:
    """Kill something when the newest attempt has saved, and return the columns of the table."""
    run = scene.run
    wait_for("an attempt", lambda: bool(run.attempts()), run)
    number = scene.attempt.number
    wait_for("a checkpoint", lambda: any(c.facts.attempt == number for c in complete_checkpoints(run)[1:]), run)
    killed = time.time()
    kill()
    wait_for("the next attempt", lambda: run.attempt(number + 1).path.exists(), run)
    before, following = run.attempt(number), run.attempt(number + 1)
    done = max(steps(before))
    wait_for("a new step", lambda: max(steps(following), default=0) > done, run)
    (start,) = (event for _, event in read_events(following.events) if isinstance(event, StartEvent))
    told = steps(following)
    first, new = told[start.step + 1], min(at for step, at in told.items() if step > done)
    own = start.start_seconds + first - start.time
    ended, began = read_json(before.outcome)["ended"], read_json(following.job)["started"]
    chosen = read_json(following.checks / "choice.json")["checking"][1]
    return (
        ended - killed, began - ended, chosen - began, first - own - chosen, own,
        first - killed, new - killed, first - killed - own, (first - killed) / own,
    )  # fmt: skip


def steps(attempt: AttemptDirectory) -> dict[int, float]:
    """Return when each step of an attempt was told, Unix time."""
    return {event.step: event.time for _, event in read_events(attempt.events) if isinstance(event, StepEvent)}


if __name__ == "__main__":
    main()
