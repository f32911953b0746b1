"""What a sandbox is and what its daemons read: its record, and the configuration of Slurm and of its accounting.

All of it lies in one folder that only its owner may enter, with a munge key and socket of its own: who cannot
read the key gets no job in. Measured recipes for Debian's slurm-wlm 22.05: docs/log.md.
"""

import contextlib
import dataclasses
import getpass
import os
import random
import secrets
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import SchedulerError
from orchestrator.files import write_atomic
from orchestrator.processes import living_process

PARTITION = "gpu"
URGENT = "urgent"
PARTITIONS = ((PARTITION, "YES", 1, 0), ("graceful", "NO", 1, 30), (URGENT, "NO", 2, 0))
"""Name, whether it is the default, its tier, and the seconds that its jobs have left when one of a higher tier
preempts them."""
GPU = "h100"
PORTS = (20_000, 32_000)
"""Below the range from which Linux takes ports by itself."""
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
DATABASE_SOCKET = "mariadb.sock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Daemon:
    """A process of a sandbox."""

    name: str
    """`munged`, `mariadbd`, `slurmdbd`, `slurmctld`, or a node's name."""
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
    accounting: bool = False
    """Whether its jobs are kept in a database of its own, for sacct."""
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
        return {**inherited, "SLURM_CONF": str(self.slurm_conf), "PATH": search_path()}

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


def search_path() -> str:
    """Return where programs are looked for: daemons lie where a person's PATH may not lead."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])


def node_names(nodes: int) -> list[str]:
    """Return n001, n002, ..."""
    return [f"n{number:03d}" for number in range(1, nodes + 1)]


def write_files(sandbox: Sandbox) -> None:
    """Write all that the daemons of a sandbox read into its folder.

    Raises:
        SchedulerError: there are not enough free ports.
    """
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
    first_port = _free_ports(sandbox.nodes + 2)
    if sandbox.accounting:
        write_atomic(folder / "slurmdbd.conf", slurmdbd_conf(sandbox, first_port + 1, getpass.getuser()))
        (folder / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists on it
    write_atomic(sandbox.slurm_conf, slurm_conf(sandbox, first_port, socket.gethostname(), getpass.getuser()))


def slurm_conf(sandbox: Sandbox, first_port: int, host: str, user: str) -> str:
    """Return slurm.conf. An empty value or an unknown key in it would stop every command.

    Args:
        first_port: slurmctld's; slurmdbd has the next, and the nodes those after it.
    """
    folder, names = sandbox.folder, node_names(sandbox.nodes)
    settings: dict[str, str | int] = {
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
    if sandbox.accounting:
        settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": first_port + 1,
            "AccountingStoragePass": f"{folder}/munge.sock",
        }
    ports = f"[{first_port + 2}-{first_port + sandbox.nodes + 1}]" if sandbox.nodes > 1 else str(first_port + 2)
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


def slurmdbd_conf(sandbox: Sandbox, port: int, user: str) -> str:
    """Return slurmdbd.conf; its database knows the caller by the socket, without a password."""
    folder = sandbox.folder
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock",
        "CommunicationParameters": "NoInAddrAny",  # the loopback interface and no other
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": user,
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": user,
        "StorageLoc": "accounting",
        "PidFile": f"{folder}/slurmdbd.pid",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def topology_conf(nodes: int) -> str:
    """Return topology.conf: two leaf switches with every other node each, so that names do not tell the switch."""
    names = node_names(nodes)
    leaves = [leaf for leaf in (names[::2], names[1::2]) if leaf]
    lines = [f"SwitchName=leaf{number} Nodes={','.join(leaf)}" for number, leaf in enumerate(leaves)]
    return "\n".join([*lines, "SwitchName=spine Switches=" + ",".join(f"leaf{n}" for n in range(len(leaves)))]) + "\n"


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"n[{names[0][1:]}-{names[-1][1:]}]"


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
