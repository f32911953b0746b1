"""How long `orchestrate launch` takes beside a bare `sbatch`, both on one Slurm of our own in the same run.

    python benchmarks/launch.py [--rounds 5]

For each: the wall time of the command as a person waits for it, and the time from its beginning until the job's main
process runs. The launch checks data, disk and site, makes the run's folder with a copy of the code, and submits; sbatch
submits an empty script. A launch is cancelled as soon as its supervisor runs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.demo import find_vocabulary
from orchestrator.slurm import sandbox
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.tokenize.stage import tokenize_corpus

DEADLINE_SECONDS = 60.0


def main() -> None:
    """Measure, and print a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    slurm = sandbox.start(f"benchmark-{os.getpid()}", nodes=2)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-launch-"))
    os.environ.update(slurm.environment() | {"HOME": str(folder)})
    try:
        source = Path(os.__file__).parent / "email"
        tokenize_corpus([source], find_vocabulary(), folder / "train", progress=False)
        measured: dict[str, list[tuple[float, float]]] = {"sbatch": [], "orchestrate launch": []}
        for number in range(rounds):
            measured["sbatch"].append(bare(slurm, folder, number))
            measured["orchestrate launch"].append(launched(slurm, folder, number))
    finally:
        sandbox.stop(slurm.name, patience_seconds=1)
        shutil.rmtree(folder, ignore_errors=True)
    base = [statistics.median(column) for column in zip(*measured["sbatch"], strict=True)]
    print(f"{'':20}{'command':>10}{'ratio':>8}{'main runs':>12}{'ratio':>8}   (seconds, medians of {rounds})")
    for name, times in measured.items():
        command, runs = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:20}{command:>10.2f}{command / base[0]:>8.1f}{runs:>12.2f}{runs / base[1]:>8.1f}")


def bare(slurm: Sandbox, folder: Path, number: int) -> tuple[float, float]:
    """Return the seconds that sbatch took, and those until its script ran."""
    mark = folder / f"bare-{number}"
    command = ["sbatch", "--nodes=2", "--output=/dev/null", "--wrap", f"touch {mark}"]
    return timed(command, mark.exists, folder)


def launched(slurm: Sandbox, folder: Path, number: int) -> tuple[float, float]:
    """Return the seconds that the launch took, and those until its supervisor had begun an attempt."""
    runs = folder / "orchestrate" / "runs"
    command = [
        sys.executable, "-m", "orchestrator.commands.main", "launch", "demo-base", "cluster=sandbox", "--nodes", "2",
        f"name=run-{number}", f"data.train={folder / 'train'}", "data.validation=[]", "--yes",
        "layout.global_batch_size=16",
    ]  # fmt: skip
    seconds = timed(command, (runs / f"run-{number}" / "attempts" / "0001" / "job.json").exists, folder)
    slurm.ask("scancel", "--user", "root" if os.geteuid() == 0 else os.environ["USER"])
    deadline = time.monotonic() + DEADLINE_SECONDS
    while slurm.ask("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.1)
    return seconds


def timed(command: list[str], runs: Callable[[], bool], folder: Path) -> tuple[float, float]:
    """Return the seconds of a command, and those from its beginning until something is so."""
    began = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    command_seconds = time.monotonic() - began
    while not runs():
        if time.monotonic() - began > DEADLINE_SECONDS:
            raise TimeoutError(f"{command[0]} started nothing within {DEADLINE_SECONDS:.0f} s")
        time.sleep(0.01)
    return command_seconds, time.monotonic() - began


if __name__ == "__main__":
    main()
