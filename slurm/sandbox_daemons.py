"""The processes of a sandbox: how each daemon is started, found again, and ended.

Every node is a slurmd on 127.0.0.1. Where root allows it has a PID and host name space of its own, whose init is
a shell that outlives slurmd: killing the node takes its steps and ranks along, as a dead node does, and killing
slurmd alone leaves them.
"""

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator.errors import SchedulerError
from orchestrator.files import write_json
from orchestrator.processes import living_process
from orchestrator.slurm.sandbox_files import DATABASE_SOCKET, Daemon, Sandbox, node_names
from orchestrator.values import to_plain

START_SECONDS = 60.0
STOP_SECONDS = 15.0
RECORD = "sandbox.json"
MUNGED, DATABASE, ACCOUNTING, CONTROLLER = "munged", "mariadbd", "slurmdbd", "slurmctld"
# It knows its nodes by name: 24.11 looks up where an srun is whose node has failed, and answers nobody while it does.
_CONTROLLER = 'mount --bind "$1/hosts" /etc/hosts && exec slurmctld -D'
# The shell is the node's init and ends with the node alone; while it waits for sleep it reaps all that others leave,
# else Slurm waits for the dead to end.
_NODE = 'mount --bind "$1/hosts" /etc/hosts && hostname "$2" && { slurmd -D -N "$2" & while :; do sleep 86400; done; }'


def start_daemons(sandbox: Sandbox) -> Sandbox:
    """Start all of a sandbox's daemons, each recorded before the next one is started.

    Raises:
        SchedulerError: one did not come up; the end of its log is in the message.
    """
    folder = Path(sandbox.folder)
    sandbox = _start(sandbox, MUNGED, [
        "munged", "--foreground", "--force", "--num-threads=10", f"--socket={folder}/munge.sock",
        f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
        f"--log-file={folder}/log/munged.log",
    ])  # fmt: skip
    _wait_for(sandbox, MUNGED, (folder / "munge.sock").exists)
    if sandbox.accounting:
        sandbox = _start_accounting(sandbox)
    sandbox = start_controller(sandbox)
    for node in node_names(sandbox.nodes):
        command = ["slurmd", "-D", "-N", node]
        if sandbox.own_namespaces:
            command = [
                "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts",
                "sh", "-c", _NODE, "sh", str(folder), node,
            ]  # fmt: skip
        sandbox = _start(sandbox, node, command)
    return sandbox


def start_controller(sandbox: Sandbox) -> Sandbox:
    """Start slurmctld, which goes on from the state that the one before has saved; it need not answer yet."""
    command = ["slurmctld", "-D"]
    if sandbox.own_namespaces:
        command = ["unshare", "--mount", "sh", "-c", _CONTROLLER, "sh", sandbox.folder]
    return _start(sandbox, CONTROLLER, command)


def _start_accounting(sandbox: Sandbox) -> Sandbox:
    """Start slurmdbd with a database of its own, which listens on no port; about three seconds."""
    folder = Path(sandbox.folder)
    who = ["--no-defaults", f"--datadir={folder}/database", f"--user={getpass.getuser()}"]
    small = ["--innodb-log-file-size=8M", "--skip-name-resolve"]
    made = subprocess.run(
        [
            "mariadb-install-db", *who, *small, "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={getpass.getuser()}", "--skip-test-db",
        ],
        env=sandbox.environment(), cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise SchedulerError(f"the accounting's database could not be made:\n{made.stderr[-2000:].strip()}")
    database = folder / DATABASE_SOCKET
    sandbox = _start(sandbox, DATABASE, [
        "mariadbd", *who, *small, f"--socket={database}", f"--pid-file={folder}/mariadbd.pid", "--skip-networking",
        "--innodb-flush-log-at-trx-commit=0",
    ])  # fmt: skip
    _wait_for(sandbox, DATABASE, database.exists)
    sandbox = _start(sandbox, ACCOUNTING, ["slurmdbd", "-D"], {"MYSQL_UNIX_PORT": str(database)})
    # Before that slurmctld would start without knowing its cluster, and say so for a minute.
    _wait_for(sandbox, ACCOUNTING, lambda: _is_refused_no_more(sandbox))
    return sandbox


def _is_refused_no_more(sandbox: Sandbox) -> bool:
    with contextlib.suppress(SchedulerError):
        sandbox.ask("sacctmgr", "--noheader", "show", "cluster")
        return True
    return False


def living_daemon(sandbox: Sandbox, name: str) -> psutil.Process | None:
    """Return the process of a daemon or node, or None where it has ended or there is none of that name."""
    found = next((daemon for daemon in sandbox.daemons if daemon.name == name), None)
    return None if found is None else living_process(found.process, found.created)


def node_daemon(sandbox: Sandbox, node: str) -> psutil.Process | None:
    """Return a node's slurmd, or None where it has ended."""
    process = living_daemon(sandbox, node)
    if process is None or not sandbox.own_namespaces:
        return process
    with contextlib.suppress(psutil.NoSuchProcess):
        for init in process.children():
            return next((child for child in init.children() if child.name() == "slurmd"), None)
    return None


def end(sandbox: Sandbox) -> None:
    """Kill every process of a sandbox and remove its folder."""
    living = [living_process(daemon.process, daemon.created) for daemon in reversed(sandbox.daemons)]
    processes = [process for process in living if process is not None]
    with contextlib.suppress(psutil.Error):
        processes += [child for process in processes for child in process.children(recursive=True)]
    processes += _with_configuration(sandbox)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=STOP_SECONDS)
    shutil.rmtree(sandbox.folder, ignore_errors=True)


def log_tail(sandbox: Sandbox, name: str) -> str:
    """Return the end of what a daemon has printed."""
    path = Path(sandbox.folder) / "log" / f"{name}.out"
    return path.read_text(errors="replace")[-2000:].strip() if path.exists() else ""


def _start(sandbox: Sandbox, name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> Sandbox:
    """Start a process that is nobody's child here, so that nobody has to wait for its end, and write it down.

    Each is written down before more is started, so that `stop` finds it whatever happens.
    """
    log = Path(sandbox.folder) / "log" / f"{name}.out"
    started = subprocess.run(
        ["sh", "-c", '"$@" < /dev/null >> "$0" 2>&1 & echo $!', str(log), *command],
        env={**sandbox.environment(), **(variables or {})},
        cwd="/",
        start_new_session=True,
        capture_output=True,
        text=True,
        check=True,
    )
    number = int(started.stdout)
    daemon = Daemon(name=name, process=number, created=psutil.Process(number).create_time())
    others = tuple(other for other in sandbox.daemons if other.name != name)
    sandbox = dataclasses.replace(sandbox, daemons=(*others, daemon))
    write_json(Path(sandbox.folder) / RECORD, to_plain(sandbox))
    return sandbox


def _wait_for(sandbox: Sandbox, name: str, is_up: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_up():
        if time.monotonic() > deadline or living_daemon(sandbox, name) is None:
            raise SchedulerError(f"{name} did not start:\n{log_tail(sandbox, name)}")
        time.sleep(0.01)


def _with_configuration(sandbox: Sandbox) -> list[psutil.Process]:
    """Return our processes that were started under this sandbox's configuration, such as steps that were left."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_inside = process.environ().get("SLURM_CONF") == str(sandbox.slurm_conf)
            is_job = is_inside and ("SLURM_JOB_ID" in process.environ() or process.name().startswith("slurm"))
            if is_job and process.pid != os.getpid():
                found.append(process)
    return found
