"""A real Slurm of many nodes on this machine, to rehearse a launch on: slurmctld, slurmd and munged of our own.

Every node is a slurmd on 127.0.0.1 with fake GPUs (links to /dev/null). Where root allows, each has a
PID and host name space of its own, so that killing it takes its steps and ranks along, as a dead node
does. All of a sandbox lies in one folder that only its owner may enter, with a munge key and socket of
its own: who cannot read the key gets no job in. Measured recipes for Debian's slurm-wlm 22.05:
docs/log.md.
"""

import contextlib
import dataclasses
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from orchestrator.errors import SchedulerError
from orchestrator.files import read_json, write_atomic, write_json
from orchestrator.processes import living_process
from orchestrator.values import from_plain, to_plain

DEFAULT_NAME = "sandbox"
PARTITION = "gpu"
URGENT = "urgent"
PARTITIONS = ((PARTITION, "YES", 1, 0), ("graceful", "NO", 1, 30), (URGENT, "NO", 2, 0))
"""Name, whether it is the default, its tier, and the seconds that its jobs have left when one of a higher tier
preempts them."""
GPU = "h100"
START_SECONDS = 60.0
STOP_SECONDS = 15.0
LARGEST = 512
PORTS = (20_000, 32_000)
"""Below the range from which Linux takes ports by itself."""
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "squeue", "scancel", "sbatch", "srun")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Daemon:
    """A process of a sandbox."""

    name: str
    """`munged`, `slurmctld`, or a node's name."""
    process: int
    created: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A running Slurm of our own."""

    name: str
    folder: str
    nodes: int
    gpus_per_node: int
    slurmd_timeout_seconds: int
    own_namespaces: bool
    """Whether each node has its own PIDs and host name, and can really die."""
    daemons: tuple[Daemon, ...]

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF has to name for Slurm's commands to speak to this one."""
        return Path(self.folder) / "slurm.conf"

    @property
    def is_alive(self) -> bool:
        """Whether any of its processes runs; with its controller gone it can still be stopped."""
        return any(living_process(daemon.process, daemon.created) is not None for daemon in self.daemons)

    def environment(self) -> dict[str, str]:
        """Return this process's environment with Slurm's commands pointed here."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**inherited, "SLURM_CONF": str(self.slurm_conf), "PATH": _search_path()}

    def ask(self, *command: str, seconds: float = 20.0) -> str:
        """Run one of Slurm's commands against this sandbox and return what it prints.

        Raises:
            SchedulerError: it refused or did not answer.
        """
        try:
            result = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=seconds, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SchedulerError(f"`{' '.join(command)}` did not answer in sandbox {self.name}: {error}") from error
        if result.returncode:
            raise SchedulerError(f"`{' '.join(command)}` was refused in sandbox {self.name}: {result.stderr.strip()}")
        return result.stdout


def start(
    name: str = DEFAULT_NAME, *, nodes: int = 32, gpus_per_node: int = 8, slurmd_timeout_seconds: int = 6
) -> Sandbox:
    """Start a Slurm of `nodes` nodes, or leave nothing.

    Args:
        slurmd_timeout_seconds: after which Slurm itself sees that a node is dead; sites have 300, its default.

    Raises:
        SchedulerError: the programs are not here, a sandbox of that name runs, or it did not come up.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]{1,32}", name):
        raise SchedulerError(f"a sandbox's name should be letters, digits and dashes, found {name!r}")
    if not 1 <= nodes <= LARGEST:
        raise SchedulerError(f"a sandbox has 1 to {LARGEST} nodes, found {nodes}")
    missing = [program for program in _PROGRAMS if shutil.which(program, path=_search_path()) is None]
    if missing:
        raise SchedulerError(
            f"a sandbox needs {', '.join(missing)}; on Debian or Ubuntu: "
            "apt-get install --no-install-recommends slurm-wlm munge"
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
        daemons=(),
    )
    try:
        _write_files(sandbox, _free_ports(nodes + 1))
        sandbox = _start_daemons(sandbox)
        _wait_for_nodes(sandbox)
    except BaseException:
        _end(sandbox)
        raise
    return sandbox


def find(name: str = DEFAULT_NAME) -> Sandbox | None:
    """Return a running sandbox, or None."""
    path = folder_of(name) / "sandbox.json"
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
    with contextlib.suppress(SchedulerError):
        sandbox.ask("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + patience_seconds
        while sandbox.ask("squeue", "--noheader").strip() and time.monotonic() < deadline:
            time.sleep(0.1)
    _end(sandbox)


def folder_of(name: str) -> Path:
    """Return where a sandbox of this user lies; short, since a socket's path has 107 characters at most."""
    return Path(tempfile.gettempdir()) / f"orchestrate-slurm-{os.getuid()}-{name}"


def node_names(nodes: int) -> list[str]:
    """Return n001, n002, ..."""
    return [f"n{number:03d}" for number in range(1, nodes + 1)]


def node_states(sandbox: Sandbox) -> dict[str, str]:
    """Return the state of every node, as sinfo names it.

    Raises:
        SchedulerError: the controller does not answer.
    """
    lines = sandbox.ask("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
    return dict(line.split() for line in lines)


def kill_node(sandbox: Sandbox, node: str) -> None:
    """Have a node die, with all that runs on it where it has a PID space of its own.

    Raises:
        SchedulerError: there is no such node, or it is dead already.
    """
    daemon = next((daemon for daemon in sandbox.daemons if daemon.name == node), None)
    process = living_process(daemon.process, daemon.created) if daemon is not None else None
    if process is None:
        raise SchedulerError(f"sandbox {sandbox.name} has no living node {node}; it has {sandbox.nodes} nodes")
    process.kill()


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])


def _can_isolate() -> bool:
    """Whether this user may give each node its own PIDs, host name and view of /etc/hosts."""
    if os.geteuid():
        return False
    return subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip


def _free_ports(count: int) -> int:
    """Return the first of so many ports in a row that are free on the loopback interface.

    Raises:
        SchedulerError: none was found in a hundred tries.
    """
    for _ in range(100):
        first = random.randrange(PORTS[0], PORTS[1] - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise SchedulerError(f"no {count} free ports in a row from {PORTS[0]} to {PORTS[1]}; end what holds them")


def _write_files(sandbox: Sandbox, first_port: int) -> None:
    folder = Path(sandbox.folder)
    for part in ("state", "spool", "log", "gpus"):
        (folder / part).mkdir()
    write_atomic(folder / "munge.key", secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    for number in range(sandbox.gpus_per_node):
        (folder / "gpus" / f"gpu{number}").symlink_to(os.devnull)
    names = node_names(sandbox.nodes)
    write_atomic(folder / "hosts", f"127.0.0.1 localhost {socket.gethostname()} {' '.join(names)}\n")
    gpus = f"{folder}/gpus/gpu[0-{sandbox.gpus_per_node - 1}]"
    write_atomic(folder / "gres.conf", f"NodeName={_range(names)} Name=gpu Type={GPU} File={gpus}\n")
    write_atomic(folder / "topology.conf", topology_conf(sandbox.nodes))
    write_atomic(sandbox.slurm_conf, slurm_conf(sandbox, first_port, socket.gethostname(), getpass.getuser()))


def slurm_conf(sandbox: Sandbox, first_port: int, host: str, user: str) -> str:
    """Return slurm.conf. An empty value or an unknown key in it would stop every command."""
    folder, names = sandbox.folder, node_names(sandbox.nodes)
    settings = {
        "ClusterName": sandbox.name,
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": first_port,
        "SlurmUser": user,
        "SlurmdUser": user,
        # Only who can read this sandbox's key; auth/none would believe any process of the machine.
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",  # a requeued job starts after 5 s, not 120
        "CredType": "cred/munge",
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",  # the loopback interface and no other
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
        "MailProg": "/bin/true",
        # Signals reach the main process of a step and none that it started in a group of its own, as with cgroups.
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "SlurmdTimeout": sandbox.slurmd_timeout_seconds,
        "KillWait": 5,
        "MinJobAge": 600,
        "JobRequeue": 1,
        "SchedulerParameters": "sched_interval=1,bf_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "TopologyPlugin": "topology/tree",
        "SlurmdParameters": "config_overrides",  # a small machine claims big nodes
    }
    ports = f"[{first_port + 1}-{first_port + sandbox.nodes}]" if sandbox.nodes > 1 else str(first_port + 1)
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines.append(
        f"NodeName={_range(names)} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=64 RealMemory=1000000 "
        f"Gres=gpu:{GPU}:{sandbox.gpus_per_node}"
    )
    for partition, default, tier, grace_seconds in PARTITIONS:
        lines.append(
            f"PartitionName={partition} Nodes=ALL Default={default} PriorityTier={tier} GraceTime={grace_seconds} "
            "MaxTime=INFINITE State=UP"
        )
    return "\n".join(lines) + "\n"


def topology_conf(nodes: int) -> str:
    """Return topology.conf: two leaf switches with every other node each, so that names do not tell the switch."""
    names = node_names(nodes)
    leaves = [leaf for leaf in (names[::2], names[1::2]) if leaf]
    lines = [f"SwitchName=leaf{number} Nodes={','.join(leaf)}" for number, leaf in enumerate(leaves)]
    return "\n".join([*lines, "SwitchName=spine Switches=" + ",".join(f"leaf{n}" for n in range(len(leaves)))]) + "\n"


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"n[{names[0][1:]}-{names[-1][1:]}]"


def _start_daemons(sandbox: Sandbox) -> Sandbox:
    folder = Path(sandbox.folder)
    daemons = [
        _spawn(sandbox, "munged", [
            "munged", "--foreground", "--force", "--num-threads=10", f"--socket={folder}/munge.sock",
            f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/log/munged.log",
        ])
    ]  # fmt: skip
    sandbox = _record(sandbox, daemons)
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "munge.sock").exists():
        if time.monotonic() > deadline or living_process(daemons[0].process, daemons[0].created) is None:
            raise SchedulerError(f"munged did not start:\n{_tail(folder / 'log' / 'munged.out')}")
        time.sleep(0.01)
    daemons.append(_spawn(sandbox, "slurmctld", ["slurmctld", "-D"]))
    sandbox = _record(sandbox, daemons)
    for node in node_names(sandbox.nodes):
        command = ["slurmd", "-D", "-N", node]
        if sandbox.own_namespaces:
            # The shell is the node's init: it reaps what others leave, else Slurm waits for the dead to end.
            script = 'mount --bind "$1/hosts" /etc/hosts && hostname "$2" && slurmd -D -N "$2" & wait'
            command = [
                "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts",
                "sh", "-c", script, "sh", str(folder), node,
            ]  # fmt: skip
        daemons.append(_spawn(sandbox, node, command))
        sandbox = _record(sandbox, daemons)
    return sandbox


def _spawn(sandbox: Sandbox, name: str, command: Sequence[str]) -> Daemon:
    """Start a process that is nobody's child here, so that nobody has to wait for its end."""
    log = Path(sandbox.folder) / "log" / f"{name}.out"
    started = subprocess.run(
        ["sh", "-c", '"$@" < /dev/null >> "$0" 2>&1 & echo $!', str(log), *command],
        env=sandbox.environment(),
        cwd="/",
        start_new_session=True,
        capture_output=True,
        text=True,
        check=True,
    )
    number = int(started.stdout)
    return Daemon(name=name, process=number, created=psutil.Process(number).create_time())


def _record(sandbox: Sandbox, daemons: Sequence[Daemon]) -> Sandbox:
    """Write down what runs, before more is started, so that `stop` finds it whatever happens."""
    recorded = dataclasses.replace(sandbox, daemons=tuple(daemons))
    write_json(Path(sandbox.folder) / "sandbox.json", to_plain(recorded))
    return recorded


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
    log = Path(sandbox.folder) / "log" / f"{missing[0] if states else 'slurmctld'}.out"
    raise SchedulerError(
        f"{len(missing)} of {sandbox.nodes} nodes did not come up in {START_SECONDS:.0f} s:\n{_tail(log)}"
    )


def _end(sandbox: Sandbox) -> None:
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


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:].strip() if path.exists() else ""
