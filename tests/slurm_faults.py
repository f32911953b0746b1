"""Faults of a sandbox that several tests cause: who runs where on a node, and how to make it slow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.slurm.sandbox import Sandbox


def processes_on(slurm: Sandbox, node: str) -> list[psutil.Process]:
    """Return what lives in a node's PID space, with the numbers that it has outside of it."""
    daemon = next(daemon for daemon in slurm.daemons if daemon.name == node)
    return psutil.Process(daemon.process).children(recursive=True)


def supervisor_on(slurm: Sandbox, node: str) -> psutil.Process:
    """Return the supervisor that runs on a node; the run knows its number in the node's PID space alone."""
    return next(p for p in processes_on(slurm, node) if "orchestrator.slurm.supervisor" in p.cmdline())


def cgroups(controller: str) -> tuple[Path, bool]:
    """Return the folder of a controller's groups, and whether it is the unified one of all controllers."""
    root = Path("/sys/fs/cgroup")
    is_unified = (root / "cgroup.controllers").exists()
    return (root if is_unified else root / controller), is_unified


def little_memory_group(name: str) -> Path:
    """Make a cgroup whose processes may have a megabyte more than they came with, and are killed beyond that."""
    root, is_unified = cgroups("memory")
    group = root / name
    group.mkdir()
    (group / ("memory.max" if is_unified else "memory.limit_in_bytes")).write_text(str(1 << 20))
    return group


@contextlib.contextmanager
def slow_node(slurm: Sandbox, node: str, percent: int) -> Iterator[None]:
    """Leave a node so much of one core, in slices of a millisecond; needs root and the CPU cgroup, as in CI."""
    if not slurm.own_namespaces:
        pytest.skip("a CPU cgroup needs root")
    root, is_unified = cgroups("cpu")
    group = root / f"orchestrate-{slurm.name}-{node}"
    group.mkdir()
    quota, period = 1_000, 100_000 // percent
    if is_unified:
        (group / "cpu.max").write_text(f"{quota} {period}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(period))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    init = psutil.Process(next(daemon for daemon in slurm.daemons if daemon.name == node).process)
    try:
        for process in (init, *processes_on(slurm, node)):
            (group / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        while left := (group / "cgroup.procs").read_text().split():
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    (root / "cgroup.procs").write_text(number)
        group.rmdir()
