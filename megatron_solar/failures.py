"""What a rank writes down before it ends badly: a record in the attempt's folder, and its traceback in its log."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping

from orchestrator.files import write_json
from orchestrator.run_directory import AttemptDirectory


def record_failure(
    attempt: AttemptDirectory,
    rank: int,
    *,
    step: int | None,
    exit_code: int,
    error: str,
    message: str,
    traceback: str,
    more: Mapping[str, object] | None = None,
) -> None:
    """Write a rank's record, if the disk takes it; otherwise the exit code says what happened.

    Args:
        step: the last one that is done; None before the first.
        error: name of the exception.
        more: further entries.
    """
    record = {
        "rank": rank,
        "host": node_name(),
        "time": time.time(),
        "step": step,
        "exit_code": exit_code,
        "error": error,
        "message": message,
        "traceback": traceback,
        **(more or {}),
    }
    with contextlib.suppress(OSError, MemoryError):
        print(traceback, end="", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, MemoryError):
        write_json(attempt.rank_failure(rank), record)


def node_name() -> str:
    """Return Slurm's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
