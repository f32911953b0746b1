"""Ranks that write down which training samples they read, and may be slow to read them: a worker of the tests of data.

Each rank appends to `seen/ATTEMPT.RANK.jsonl` of the run's folder a line a step: its data-parallel rank and a hash of
each sample's tokens. What `slow.json` of the run's folder says is waited for before a step's samples are read.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from megatron_solar import compat, data, worker
from orchestrator.files import JsonLines

SEEN = "seen"
SLOW = "slow.json"


def main(arguments: list[str]) -> int:
    """Be a rank that writes down what it reads."""
    run, rank = Path(arguments[0]), int(arguments[arguments.index("--rank") + 1])
    (run / SEEN).mkdir(exist_ok=True)
    lines = JsonLines(run / SEEN / f"{arguments[1]}.{rank}.jsonl")
    slow = json.loads((run / SLOW).read_text()) if (run / SLOW).exists() else {}
    read = data.Samples.micro_batches
    steps = 0

    def micro_batches(self: data.Samples, split: Any, *given: Any, **options: Any) -> Any:
        nonlocal steps
        if split is not self.train:
            return read(self, split, *given, **options)
        steps += 1
        if slow.get("rank") == rank and steps in slow["steps"]:
            time.sleep(slow["seconds"])
        batches = read(self, split, *given, **options)
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for batch in batches for row in batch["tokens"]]
        lines.append({"data_rank": compat.data_rank(), "hashes": hashes})
        return batches

    data.Samples.micro_batches = micro_batches  # type: ignore[method-assign]
    return worker.main(arguments)
