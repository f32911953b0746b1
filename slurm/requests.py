"""Whether this site can carry out a launch, asked of the machine and of Slurm before anything is written.

What Slurm would accept and leave pending for ever, or what would fail on the nodes an hour later, is an
error now: what was wanted, what was found, what to do.
"""

import dataclasses
import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from orchestrator.checks import time_limit_seconds
from orchestrator.errors import ConfigError, SchedulerError
from orchestrator.plan import TrainingPlan
from orchestrator.settings import RANDOM_BASE, ClusterSettings
from orchestrator.slurm.scheduler import ANSWER_SECONDS, without_job

OF_ONE_MACHINE = (
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "ramfs",
    "rootfs",
    "squashfs",
    "tmpfs",
    "xfs",
    "zfs",
)
"""Types of file systems that no other machine sees unless they are exported."""
EXPORTS = ("/etc/exports", "/etc/exports.d/*.exports", "/proc/fs/nfsd/exports")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Nodes of one kind in a partition, as sinfo tells of them."""

    name: str
    is_default: bool
    nodes: int
    processors: int
    gpus: int
    """Of a node; 0 where the site counts none."""
    longest_seconds: int | None
    """A job may run; None is without end."""


def check_folders(plan: TrainingPlan) -> None:
    """Refuse a folder of runs that cannot be written, and folders that the other nodes would not see.

    Raises:
        ConfigError: all of them at once.
    """
    settings = plan.settings
    cluster = settings.cluster
    runs = _nearest(Path(settings.paths.runs))
    problems = []
    if not (runs.is_dir() and os.access(runs, os.W_OK | os.X_OK)):
        problems.append(
            f"paths.runs={settings.paths.runs} should be a folder to write to, and {runs} is none for "
            f"{getpass.getuser()}; set paths.runs to a folder of yours"
        )
    if cluster.scheduler == "slurm" and cluster.nodes > 1 and not cluster.one_machine:
        named = [("paths.runs", settings.paths.runs)]
        named += [("data.train", path) for path in settings.data.training_folders]
        named += [("data.validation", path) for path in settings.data.validation]
        named += [("data.index", settings.data.index)] if settings.data.index else []
        named += [("base", settings.base)] if settings.base != RANDOM_BASE else []
        for field, path in named:
            kind = seen_here_alone(Path(path))
            if kind:
                problems.append(
                    f"{field}={path} lies on a disk of this machine alone ({kind}), and {cluster.nodes} nodes need to "
                    "see it; choose a folder of the shared disk, or set cluster.one_machine=true where all nodes are "
                    "this machine"
                )
    if problems:
        raise ConfigError(f"run {settings.name!r} cannot lie there:", problems)


def seen_here_alone(path: Path) -> str:
    """Return the type of the file system that a path lies on, or will, where no other machine sees it, or nothing."""
    place = _nearest(path)
    kind = file_system(place, Path("/proc/self/mountinfo").read_text())
    exports = "\n".join(_text(table) for pattern in EXPORTS for table in Path("/").glob(pattern.lstrip("/")))
    return kind if kind in OF_ONE_MACHINE and not is_exported(place, exports) else ""


def check_request(plan: TrainingPlan, script: str) -> None:
    """Refuse what this site's Slurm could never start.

    Args:
        script: what would be given to sbatch.

    Raises:
        ConfigError: a container runtime that is not here, an account that the user has not.
        SchedulerError: the controller does not answer, or Slurm says no.
    """
    cluster = plan.settings.cluster
    check_controller()
    problems = [*_container_problems(cluster), *account_problems(cluster)]
    if problems:
        raise ConfigError(f"run {plan.settings.name!r} cannot start on cluster {cluster.name!r}:", problems)
    is_accepted, said = ask_site(["sbatch", "--test-only"], script)
    partitions = known_partitions()
    if not is_accepted:
        raise SchedulerError(refusal(cluster, in_one_line(said), partitions))
    late = time_problem(cluster, partitions)
    if late:
        raise SchedulerError(late)


def check_controller() -> None:
    """Refuse to submit where nobody answers.

    Raises:
        SchedulerError: the controller does not answer.
    """
    answers, said = ask_site(["scontrol", "ping"])
    if not answers:
        raise SchedulerError(
            f"Slurm's controller does not answer ({in_one_line(said) or 'no reason given'}); nothing was submitted; "
            "try again when `scontrol ping` says UP, or ask the cluster's administrators"
        )


def refusal(cluster: ClusterSettings, said: str, partitions: Sequence[Partition]) -> str:
    """Return what was wanted, what there is, and what to do, where Slurm has said no."""
    whole = "" if cluster.device == "cpu" or cluster.slurm.gpus == "none" else f" with {cluster.ranks_per_node} GPUs"
    wanted = f"Slurm could not run this on {cluster.nodes} nodes{whole} of partition {partition_name(cluster)}: {said}"
    here = of_request(cluster, partitions)
    if not here:
        names = ", ".join(dict.fromkeys(partition.name for partition in partitions))
        return f"{wanted}; " + (
            f"the partitions here are {names}; set cluster.partition to one of them" if names else "see `sinfo`"
        )
    nodes, gpus = sum(part.nodes for part in here), max(part.gpus for part in here)
    processors = max(part.processors for part in here)
    found = f"it has {nodes} nodes of {processors} processors and {gpus} GPUs"
    needed = cluster.ranks_per_node * (cluster.slurm.cpus_per_rank or 1)
    remedies = []
    if cluster.nodes > nodes:
        remedies.append(f"set cluster.nodes to at most {nodes}")
    if whole and cluster.ranks_per_node > gpus:
        remedies.append(f"set cluster.ranks_per_node to at most {gpus}" if gpus else "take a partition with GPUs")
    if needed > processors:
        remedies.append(
            f"ask for at most {processors} processors a node, not {needed} "
            "(cluster.ranks_per_node, cluster.slurm.cpus_per_rank)"
        )
    return f"{wanted}; {found}; {', '.join(remedies) or 'compare cluster.slurm with `scontrol show node`'}"


def time_problem(cluster: ClusterSettings, partitions: Sequence[Partition]) -> str:
    """Return why a job's time would never be given, or nothing; a QOS may allow what its partition does not."""
    most = longest_seconds(cluster, partitions)
    if most is None:
        return ""
    hours, rest = divmod(most, 3600)
    return (
        f"Slurm would leave this pending for ever: cluster.time_limit={cluster.time_limit} is more than a job of "
        f"partition {partition_name(cluster)} may have; set it to at most {hours}:{rest // 60:02d}:{rest % 60:02d}, "
        "the run goes on in the next job by itself"
    )


def longest_seconds(cluster: ClusterSettings, partitions: Sequence[Partition]) -> int | None:
    """Return how long a job may run if its limit is more, else None; a QOS may allow what a partition does not."""
    limit = time_limit_seconds(cluster.time_limit)
    longest = [part.longest_seconds for part in of_request(cluster, partitions)]
    given = [seconds for seconds in longest if seconds is not None]
    if limit is None or cluster.slurm.qos is not None or len(given) < len(longest) or not given or limit <= max(given):
        return None
    return max(given)


def known_partitions() -> list[Partition]:
    """Return what sinfo tells of; nothing where it does not answer."""
    known, listed = ask_site(["sinfo", "--noheader", "--format=%P|%D|%c|%G|%l"])
    return parse_partitions(listed) if known else []


def parse_partitions(listed: str) -> list[Partition]:
    """Return what `sinfo --format=%P|%D|%c|%G|%l` tells of."""
    found = []
    for line in listed.splitlines():
        name, nodes, processors, resources, longest = line.strip().split("|")
        if not nodes.isdecimal():  # such as 1K
            continue
        gpus = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources)
        found.append(
            Partition(
                name=name.rstrip("*"),
                is_default=name.endswith("*"),
                nodes=int(nodes),
                processors=int(processors.rstrip("+")),
                gpus=sum(map(int, gpus)),
                longest_seconds=partition_seconds(longest),
            )
        )
    return found


def partition_seconds(text: str) -> int | None:
    """Return the seconds of [days-][[hours:]minutes:]seconds, as sinfo writes a limit; None is without end."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def account_problem(account: str, own: Sequence[str]) -> str:
    """Return what is wrong with an account for who has these, or nothing; without any it cannot be known."""
    if not own or account.lower() in own:  # Slurm keeps the names of accounts in small letters
        return ""
    return (
        f"cluster.account={account} is none of the accounts of {getpass.getuser()}; set it to one of {', '.join(own)}"
    )


def file_system(path: Path, mountinfo: str) -> str:
    """Return the type of the file system that an absolute path lies on, from /proc/self/mountinfo."""
    best, kind = Path("/"), ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_unescaped(before.split()[4]))
        # The last line of a mount point is the one on top.
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split()[0]
    return kind


def is_exported(path: Path, exports: str) -> bool:
    """Return whether a path lies under one that this machine gives to others by NFS, from the text of its tables."""
    lines = [line.strip() for line in exports.splitlines()]
    shared = [_unescaped(line.split()[0].strip('"')) for line in lines if line and not line.startswith("#")]
    return any(path.is_relative_to(folder) for folder in shared)


def _container_problems(cluster: ClusterSettings) -> list[str]:
    container = cluster.container
    found = []
    if container.runtime == "pyxis" and "--container-image" not in ask_site(["srun", "--help"])[1]:
        found.append(
            "cluster.container.runtime=pyxis needs pyxis, and this site's srun knows no --container-image; ask the "
            "administrators for it, or use apptainer or none"
        )
    # Elsewhere a module may bring it on the nodes, and the login node proves nothing: see docs/clusters.md.
    if container.runtime == "apptainer" and cluster.one_machine and shutil.which("apptainer") is None:
        found.append(
            "cluster.container.runtime=apptainer needs `apptainer`, and it is not on this machine; install it, or set "
            "cluster.container.runtime=none"
        )
    image = Path(container.image)
    # Where its folder is not here either it may be on the nodes' own disks.
    if container.runtime != "none" and image.is_absolute() and image.parent.is_dir() and not image.exists():
        found.append(f"cluster.container.image={image} is not there; make the image, or name another")
    return found


def account_problems(cluster: ClusterSettings) -> list[str]:
    """Return what is wrong with the account, as far as Slurm's accounting can be asked."""
    if cluster.account is None:
        return []
    known, config = ask_site(["scontrol", "show", "config"])
    if not known or not re.search(r"^AccountingStorageType\s*=\s*accounting_storage/(?!none)", config, re.MULTILINE):
        return []
    known, listed = ask_site(
        ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}", "format=account"]
    )
    problem = account_problem(cluster.account, sorted(set(listed.split()))) if known else ""
    return [problem] if problem else []


def of_request(cluster: ClusterSettings, partitions: Sequence[Partition]) -> list[Partition]:
    """Return the kinds of nodes of the partitions that are asked for; several may be named with commas."""
    if cluster.partition is None:
        return [part for part in partitions if part.is_default]
    return [part for part in partitions if part.name in cluster.partition.split(",")]


def partition_name(cluster: ClusterSettings) -> str:
    """Return the partition as messages name it."""
    return cluster.partition or "(the default)"


def ask_site(command: Sequence[str], given: str | None = None) -> tuple[bool, str]:
    """Run one of Slurm's commands; return whether it succeeded, with its output, or with what it says is wrong."""
    try:
        result = subprocess.run(
            command,
            input=given,
            env=without_job(os.environ),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer to `{' '.join(command)}` within {ANSWER_SECONDS:.0f} s"
    except OSError as error:
        return False, str(error)
    return not result.returncode, result.stdout if not result.returncode else result.stderr or result.stdout


def in_one_line(text: str) -> str:
    """Return what Slurm says without its line breaks and without a site's banner."""
    return " ".join(re.sub(r"\*{2,}.*\*{2,}", "", text, flags=re.DOTALL).split())


def _nearest(path: Path) -> Path:
    """Return a path, or of the folders above it the first that is there, without links."""
    return next(candidate for candidate in (path, *path.parents) if _is_there(candidate)).resolve()


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # in a folder that may not be entered
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # kept for root, or gone
        return ""


def _unescaped(text: str) -> str:
    r"""Return \040 as a space, as these tables write one."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
