"""Train runs, each with another package called `apex` in sight; run as a process by test_apex.

    python -m tests.apex_trial FOLDER RUN ATTEMPT [FOLDER RUN ATTEMPT ...]

Imports torch once, and forks for each a process that sees FOLDER's packages before all others, and that is then a rank:
the worker, from its first line. Prints whose apex each found as a JSON list; a rank's failure is in its attempt.
"""

import json
import os
import sys
from pathlib import Path

# What megatron and Adam import of torch, once and before the forks, since it takes the longest.
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.tensor
import torch.utils.cpp_extension  # noqa: F401

from megatron_solar import worker
from orchestrator.gpu_libraries import apex_kind


def run_rank(packages: Path, run: str, attempt: str, log: Path) -> int:
    """Be the one rank of an attempt, its output in a log."""
    for target in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), target)
    sys.path.insert(0, str(packages))
    return worker.main([run, attempt, "--rank", "0", "--local-rank", "0"])


def main(arguments: list[str]) -> None:
    """Train all of them, two at a time."""
    trials = [tuple(arguments[index : index + 3]) for index in range(0, len(arguments), 3)]
    found = []
    waiting: list[int] = []
    for packages, run, attempt in trials:
        sys.path.insert(0, packages)
        found.append(apex_kind())
        sys.path.remove(packages)
        if len(waiting) == 2:
            os.waitpid(waiting.pop(0), 0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_rank(Path(packages), run, attempt, Path(run) / "rank.log")
            finally:
                os._exit(code)
        waiting.append(child)
    for child in waiting:
        os.waitpid(child, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
