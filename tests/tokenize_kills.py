"""Kill a tokenization again and again, and compare what comes out: `python tests/tokenize_kills.py FOLDER KILLS`.

FOLDER has `corpus` and the undisturbed `expected` with `expected-validation`. A process of its own, so that runs can be
forked from it: a start then costs no import. Kills are told by what is seen on disk, a number of commits and up to some
milliseconds more, all drawn from a seed; a kill counts when it hit a run that had not ended.

    group        all processes of the run, as by a power cut
    coordinator  the one that was started; its workers must leave by themselves while the next run has begun
    worker       one worker; the run must end by itself with an error
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from orchestrator.errors import OrchestrateError
from orchestrator.tokenize.stage import tokenize_corpus
from tests.tokenize_corpora import SETTINGS, TOKENIZER, contents

DEADLINE_SECONDS = 60.0
SEED = 20


def start(folder: Path, workers: int) -> int:
    """Fork a run in a process group of its own; it exits with 0 when the data set is there, 1 after an error."""
    child = os.fork()
    if child:
        os.setpgid(child, child)  # as the child does: whoever is first
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        tokenize_corpus([folder / "corpus"], TOKENIZER, folder / "data", workers=workers, **SETTINGS)
        code = 0
    except OrchestrateError as error:
        print(f"  {type(error).__name__}: {error}", flush=True)
        code = 1
    finally:
        os._exit(code)


def commits(folder: Path) -> set[tuple[str, int]]:
    """What can be seen of commits: each replaces a record."""
    found = set()
    for path in (folder / "data.partial" / "units").glob("?????.json"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def ended(child: int) -> int | None:
    """Return the exit code of a run that has ended."""
    number, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def wait_for_commits(folder: Path, child: int, wanted: int) -> int | None:
    """Wait until so many commits were seen since the run began to work, or it has ended; return its exit code then."""
    until = time.monotonic() + DEADLINE_SECONDS
    before, seen = commits(folder), set()
    while time.monotonic() < until:
        code = ended(child)
        if code is not None:
            return code
        seen |= commits(folder) - before
        if (folder / "data.partial" / "lock").exists() and len(seen) >= wanted:
            return None
        time.sleep(0.002)
    raise TimeoutError(f"{len(seen)} of {wanted} commits in {DEADLINE_SECONDS} s")


def kill(child: int, mode: str, chance: random.Random) -> str:
    """Kill a run in one of the ways and return which; one that has not started its workers yet is killed whole."""
    workers = psutil.Process(child).children() if mode == "worker" else []
    if workers:
        chance.choice(workers).kill()
        return mode
    if mode == "coordinator":
        os.kill(child, signal.SIGKILL)
        return mode
    os.killpg(child, signal.SIGKILL)
    return "group"


def main(folder: Path, wanted_kills: int) -> None:
    """Kill so many times, let a last run finish, and compare each data set that came out."""
    chance = random.Random(SEED)
    expected = contents(folder, "expected")
    landed: dict[str, int] = dict.fromkeys(("group", "coordinator", "worker"), 0)
    resumed = finished = 0
    while sum(landed.values()) < wanted_kills:
        workers = chance.choice((1, 2))
        mode = chance.choice(("group", "coordinator") if workers == 1 else ("group", "coordinator", "worker", "worker"))
        resumed += bool(commits(folder))
        child = start(folder, workers)
        code = wait_for_commits(folder, child, chance.randint(0, 6))
        if code is None:
            time.sleep(chance.uniform(0, 0.02))
            mode = kill(child, mode, chance)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGKILL or (mode == "worker" and code == 1):
                landed[mode] += 1
        if code == 0:
            finished += 1
            compare(folder, expected)
        elif code not in (1, -signal.SIGKILL) or (code == 1 and mode != "worker"):
            raise SystemExit(f"a run ended with {code} after {landed}, mode {mode}")
    child = start(folder, 1)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the last run ended with {os.waitstatus_to_exitcode(status)}")
    compare(folder, expected)
    print(f"kills {landed}, {resumed} starts found commits of others, {finished + 1} data sets are equal")
    if resumed < wanted_kills // 2:
        raise SystemExit("most kills came before the first commit, so that little was tested")


def compare(folder: Path, expected: dict[str, bytes]) -> None:
    """Compare a data set with the undisturbed one, and remove it."""
    found = contents(folder, "data")
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    if different:
        raise SystemExit(f"not the bytes of an undisturbed run: {different}")
    left = [path.name for path in folder.iterdir() if "partial" in path.name]
    if left:
        raise SystemExit(f"left over: {left}")
    for name in ("data", "data-validation"):
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
