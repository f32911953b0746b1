"""Faults of a sandbox that several tests cause: who runs where on a node, and how to make it slow."""

import psutil

from orchestrator.slurm.sandbox import Sandbox


def processes_on(slurm: Sandbox, node: str) -> list[psutil.Process]:
    """Return what lives in a node's PID space, with the numbers that it has outside of it."""
    daemon = next(daemon for daemon in slurm.daemons if daemon.name == node)
    return psutil.Process(daemon.process).children(recursive=True)


def supervisor_on(slurm: Sandbox, node: str) -> psutil.Process:
    """Return the supervisor that runs on a node; the run knows its number in the node's PID space alone."""
    return next(p for p in processes_on(slurm, node) if "orchestrator.slurm.supervisor" in p.cmdline())
