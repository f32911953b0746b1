"""Whether a kernel has killed processes for memory: without cgroups nobody else tells, and the job even "completes"."""

import socket
from collections.abc import Mapping

from orchestrator.slurm import node_agent


def killed_since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, str]:
    """Return the nodes whose count of kills has risen, in words."""
    return {
        node: f"{count - before[node]} processes were killed for memory on {node} meanwhile (oom_kill of /proc/vmstat)"
        for node, count in now.items()
        if count > before.get(node, count)
    }


class OwnMemory:
    """This machine's, for ranks that run here; `Allocation` has the same for a job's nodes."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def count_oom_kills(self) -> None:
        """Note how many there were so far."""
        self._before = self._counts()

    def killed_for_memory(self) -> dict[str, str]:
        """Return this host, in words, if it has killed for memory since then."""
        return killed_since(self._before, self._counts())

    @staticmethod
    def _counts() -> dict[str, int]:
        count = node_agent.oom_kills()
        return {} if count is None else {socket.gethostname(): count}
