"""A real Slurm of many nodes on this machine, to rehearse a launch on, and what can be made to fail in it.

`sandbox_files.py` has what its daemons read, `sandbox_daemons.py` how they run: slurmctld, munged and a slurmd for
each node, with fake GPUs (links to /dev/null); on request slurmdbd with a database.
"""

import contextlib
import getpass
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from orchestrator.errors import SchedulerError
from orchestrator.files import read_json
from orchestrator.slurm import sandbox_daemons
from orchestrator.slurm.sandbox_daemons import (
    ACCOUNTING,
    CONTROLLER,
    RECORD,
    START_SECONDS,
    STOP_SECONDS,
    end,
    living_daemon,
    log_tail,
    node_daemon,
    start_daemons,
)
from orchestrator.slurm.sandbox_files import PARTITION, URGENT, Daemon, Sandbox, node_names, search_path, write_files
from orchestrator.values import from_plain

__all__ = [
    "PARTITION", "STOP_SECONDS", "URGENT", "Daemon", "Sandbox", "find", "folder_of", "found", "kill_node",
    "kill_slurmd", "node_names", "node_states", "start", "start_controller", "stop", "stop_accounting",
    "stop_controller",
]  # fmt: skip
DEFAULT_NAME = "sandbox"
LARGEST = 512
_PACKAGES = {
    **dict.fromkeys(("slurmctld", "slurmd", "sinfo", "squeue", "scancel", "sbatch", "srun"), "slurm-wlm"),
    "munged": "munge",
}
_ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd slurm-wlm-mysql-plugin",
    **dict.fromkeys(("mariadbd", "mariadb-install-db"), "mariadb-server"),
}
"""Programs that are needed, and the Debian packages that they are in."""


def start(
    name: str = DEFAULT_NAME,
    *,
    nodes: int = 32,
    gpus_per_node: int = 8,
    slurmd_timeout_seconds: int = 6,
    accounting: bool = False,
) -> Sandbox:
    """Start a Slurm of `nodes` nodes, or leave nothing.

    Args:
        slurmd_timeout_seconds: after which Slurm itself sees that a node is dead; sites have 300, its default.
        accounting: whether jobs are kept in a database for sacct, as sites have it; three seconds more.

    Raises:
        SchedulerError: the programs are not here, a sandbox of that name runs, or it did not come up.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]{1,32}", name):
        raise SchedulerError(f"a sandbox's name should be letters, digits and dashes, found {name!r}")
    if not 1 <= nodes <= LARGEST:
        raise SchedulerError(f"a sandbox has 1 to {LARGEST} nodes, found {nodes}")
    wanted = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    missing = [program for program in wanted if shutil.which(program, path=search_path()) is None]
    if missing:
        raise SchedulerError(
            f"a sandbox needs {', '.join(missing)}; on Debian or Ubuntu: "
            f"apt-get install --no-install-recommends {' '.join(dict.fromkeys(wanted.values()))}"
        )
    if find(name) is not None:
        raise SchedulerError(f"sandbox {name} runs already; stop it with `orchestrate sandbox stop --name {name}`")
    folder = folder_of(name)
    shutil.rmtree(folder, ignore_errors=True)  # what a reboot left
    folder.mkdir(mode=0o700)
    sandbox = Sandbox(
        name=name,
        folder=str(folder),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        slurmd_timeout_seconds=slurmd_timeout_seconds,
        own_namespaces=_can_isolate(),
        accounting=accounting,
        daemons=(),
    )
    try:
        write_files(sandbox)
        sandbox = start_daemons(sandbox)
        _wait_for_nodes(sandbox)
    except BaseException:
        end(find(name) or sandbox)
        raise
    return sandbox


def find(name: str = DEFAULT_NAME) -> Sandbox | None:
    """Return a running sandbox, or None."""
    path = folder_of(name) / RECORD
    if not path.exists():
        return None
    sandbox = from_plain(Sandbox, read_json(path), "", [])
    return sandbox if sandbox is not None and sandbox.is_alive else None


def found(name: str = DEFAULT_NAME) -> Sandbox:
    """Return a running sandbox.

    Raises:
        SchedulerError: there is none of that name.
    """
    sandbox = find(name)
    if sandbox is None:
        raise SchedulerError(f"no sandbox {name} runs here; start one with `orchestrate sandbox start --nodes 32`")
    return sandbox


def stop(name: str = DEFAULT_NAME, *, patience_seconds: float = STOP_SECONDS) -> None:
    """End a sandbox: its jobs, its daemons, its folder.

    Args:
        patience_seconds: how long its jobs have to end by themselves after they were cancelled.

    Raises:
        SchedulerError: there is none of that name.
    """
    sandbox = found(name)
    if living_daemon(sandbox, CONTROLLER) is not None:
        with contextlib.suppress(SchedulerError):
            sandbox.ask("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + patience_seconds
            while sandbox.ask("squeue", "--noheader").strip() and time.monotonic() < deadline:
                time.sleep(0.1)
    end(sandbox)


def folder_of(name: str) -> Path:
    """Return where a sandbox of this user lies; short, since a socket's path has 107 characters at most."""
    return Path(tempfile.gettempdir()) / f"orchestrate-slurm-{os.getuid()}-{name}"


def node_states(sandbox: Sandbox) -> dict[str, str]:
    """Return the state of every node, as sinfo names it.

    Raises:
        SchedulerError: the controller does not answer.
    """
    lines = sandbox.ask("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
    return dict(line.split() for line in lines)


# What can fail.


def kill_node(sandbox: Sandbox, node: str) -> None:
    """Have a node die, with all that runs on it where it has a PID space of its own.

    Raises:
        SchedulerError: there is no such node, or it is dead already.
    """
    process = living_daemon(sandbox, node)
    if process is None:
        raise SchedulerError(f"sandbox {sandbox.name} has no living node {node}; it has {sandbox.nodes} nodes")
    process.kill()


def kill_slurmd(sandbox: Sandbox, node: str) -> None:
    """Have a node's slurmd die alone; what it has started lives on, and Slurm takes the node for dead.

    Raises:
        SchedulerError: there is no such node, or its slurmd is dead already.
    """
    process = node_daemon(sandbox, node)
    if process is None:
        raise SchedulerError(f"sandbox {sandbox.name} has no living slurmd on {node}; it has {sandbox.nodes} nodes")
    process.kill()


def stop_controller(sandbox: Sandbox) -> None:
    """Have slurmctld die; all else runs on without it.

    Raises:
        SchedulerError: it is dead already.
    """
    _kill(sandbox, CONTROLLER)


def start_controller(sandbox: Sandbox) -> Sandbox:
    """Start slurmctld again where the one before died, and wait until it answers.

    Raises:
        SchedulerError: it runs, or did not come up.
    """
    sandbox = found(sandbox.name)
    if living_daemon(sandbox, CONTROLLER) is not None:
        raise SchedulerError(f"slurmctld of sandbox {sandbox.name} runs already")
    sandbox = sandbox_daemons.start_controller(sandbox)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            node_states(sandbox)
        except SchedulerError as error:
            if time.monotonic() > deadline:
                raise SchedulerError(f"slurmctld did not start:\n{log_tail(sandbox, CONTROLLER)}") from error
            time.sleep(0.05)
        else:
            return sandbox


def stop_accounting(sandbox: Sandbox) -> None:
    """Have slurmdbd die; sacct fails from then on, and what slurmctld would tell it waits.

    Raises:
        SchedulerError: it is dead already, or there is none.
    """
    _kill(sandbox, ACCOUNTING)


def _kill(sandbox: Sandbox, name: str) -> None:
    process = living_daemon(found(sandbox.name), name)
    if process is None:
        raise SchedulerError(f"sandbox {sandbox.name} has no living {name}")
    process.kill()
    process.wait()


def _can_isolate() -> bool:
    """Whether this user may give each node its own PIDs, host name and view of /etc/hosts."""
    if os.geteuid():
        return False
    return subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip


def _wait_for_nodes(sandbox: Sandbox) -> None:
    deadline = time.monotonic() + START_SECONDS
    states: dict[str, str] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(SchedulerError):
            states = node_states(sandbox)
            if len(states) == sandbox.nodes and set(states.values()) == {"idle"}:
                return
        time.sleep(0.05)
    missing = [node for node in node_names(sandbox.nodes) if states.get(node) != "idle"]
    tail = log_tail(sandbox, missing[0] if states else CONTROLLER)
    raise SchedulerError(f"{len(missing)} of {sandbox.nodes} nodes did not come up in {START_SECONDS:.0f} s:\n{tail}")
