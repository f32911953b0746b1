"""A tokenization's units as a Slurm job array: what is asked of Slurm, and what its answers mean. Pure.

Task K of T sees to the units u with u % T == K (tokenize/worker.py), and any number of tasks gives the same bytes. What
was seen with Slurm 22.05: a task that is preempted, or whose node fails, is requeued, and works on through a
preemption's grace, since the batch step is told at its end only; one that fails or is over its time is not.
"""

import dataclasses
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.checks import time_limit_seconds
from orchestrator.errors import ConfigError, OrchestrateError
from orchestrator.settings import ClusterSettings
from orchestrator.slurm.scheduler import SLURM_LIVING
from orchestrator.slurm.site_profile import site_lines
from orchestrator.slurm.submission import ArrayScript
from orchestrator.tokenize.work_folder import WorkFolder

TASKS = 64
WORKERS = 16
WORKER_GIGABYTES = 1
"""Memory to ask for; a worker has at most half of it (docs/log.md)."""
TOLD = 3
UNKNOWN_END = "Slurm has no record of it, so it was cancelled before it began, or ended long ago"
"""Slurm 22.05 keeps nothing of a task of an array that was cancelled while it waited, in its accounting neither."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRequest:
    """What a person asks for."""

    cluster: ClusterSettings
    tasks: int = TASKS
    workers: int = WORKERS
    """Processes of a task, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """Units that are left, divided among tasks."""

    tasks: int
    """T; not all of its tasks need to have units left."""
    numbers: tuple[int, ...]
    """Of the tasks that have."""
    workers: int
    """Processes that the fullest task keeps busy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmittedArray:
    """What array.json has: an intent first, and then its job."""

    job_name: str
    """Of no other job."""
    job_id: str | None
    cluster: str
    tasks: int
    array: str
    """The tasks that were submitted, as sbatch takes them."""
    workers: int
    command: str
    """Of each task."""
    time: float
    host: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskAnswer:
    """What squeue says of a task."""

    job_id: str
    task: int
    state: str
    reason: str

    @property
    def is_living(self) -> bool:
        """Whether it works, or will by itself."""
        return self.state in SLURM_LIVING


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEnd:
    """How a task ended, by Slurm's records."""

    state: str
    exit_code: str
    """As Slurm writes it: `1:0`, the second a signal."""
    node: str

    def describe(self) -> str:
        """Return it for a message: `FAILED, exit code 1, on n002`."""
        code, _, number = self.exit_code.partition(":")
        by = f", signal {number}" if number.strip("0") else f", exit code {code}" if code.strip("0") else ""
        return f"{self.state}{by}" + (f", on {self.node}" if self.node else "")


def divide(left: Sequence[int], request: ArrayRequest) -> Division:
    """Divide units among at most so many tasks, so that the fullest has as few as can be, and by as few tasks."""
    loads = {tasks: Counter(unit % tasks for unit in left) for tasks in range(1, min(request.tasks, max(left) + 1) + 1)}
    tasks, load = min(loads.items(), key=lambda item: (max(item[1].values()), item[0]))
    return Division(tasks=tasks, numbers=tuple(sorted(load)), workers=min(request.workers, max(load.values())))


def array_script(folder: WorkFolder, request: ArrayRequest, division: Division, job_name: str) -> ArrayScript:
    """Return what is submitted.

    Raises:
        ConfigError: the profile's time limit is none.
    """
    cluster, slurm = request.cluster, request.cluster.slurm
    options: dict[str, object] = {
        "job_name": job_name,
        "array": ranges(division.numbers),
        "nodes": 1,
        "ntasks": 1,
        "cpus_per_task": division.workers,
        "mem": f"{division.workers * WORKER_GIGABYTES}G",
        "time": _minutes(cluster),
        "requeue" if slurm.requeue else "no_requeue": True,
        "output": f"{str(folder.logs).replace('%', '%%')}/%A_%a.log",
        # Submitit always asks for a signal; this one does nothing.
        "signal": "CONT@60",
    }
    if_set = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "exclude": ",".join(slurm.exclude),
    }
    options |= {name: value for name, value in if_set.items() if value}
    words = [sys.executable, "-P", "-m", "orchestrator.tokenize.worker", str(folder.path)]
    numbers = ["--tasks", str(division.tasks), "--workers", str(division.workers)]
    return ArrayScript(
        folder=str(folder.logs),
        options=options,
        setup=site_lines(slurm),
        command=f'exec {shlex.join([*words, *numbers])} --task "$SLURM_ARRAY_TASK_ID"',
    )


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as `--array` takes them: `0-5,7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


def job_name(output_name: str, token: str) -> str:
    """Return a name that no other job has, without what squeue would take for a list."""
    return f"orchestrate-tokenize-{re.sub(r'[^A-Za-z0-9._-]', '-', output_name)}-{token}"


def parse_squeue(listed: str) -> list[TaskAnswer]:
    """Return what `squeue --array --format=%F|%K|%T|%r` tells of."""
    rows = (line.strip().split("|", 3) for line in listed.splitlines())
    return [
        TaskAnswer(job_id=job, task=int(task), state=state, reason=reason)
        for job, task, state, reason in rows
        if task.isdecimal()
    ]


def parse_scontrol(shown: str) -> dict[int, TaskEnd]:
    """Return what `scontrol --oneliner show job` tells of each task of an array."""
    found = {}
    for line in shown.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))
        if fields.get("ArrayTaskId", "").isdecimal():
            node = fields.get("NodeList", "").replace("(null)", "")
            end = TaskEnd(state=fields.get("JobState", ""), exit_code=fields.get("ExitCode", ""), node=node)
            found[int(fields["ArrayTaskId"])] = end
    return found


def parse_sacct(listed: str) -> dict[int, TaskEnd]:
    """Return what `sacct --parsable2 --format=JobID,State,ExitCode,NodeList` tells of each task of an array."""
    found = {}
    for line in listed.splitlines():
        job, state, exit_code, node = line.split("|")
        task = job.partition("_")[2]
        if task.isdecimal():  # not 17_[2-3], which never started
            end = TaskEnd(state=state, exit_code=exit_code, node=node.replace("None assigned", ""))
            found[int(task)] = end
    return found


def failure(
    folder: WorkFolder,
    array: SubmittedArray,
    left: Sequence[int],
    ends: Mapping[int, TaskEnd],
    said: Mapping[int, Sequence[str]],
) -> OrchestrateError:
    """Return the error of an array of which no task lives, though units are left.

    Args:
        ends: how tasks ended, of those of which it is known.
        said: the last lines of tasks' logs.
    """
    failed = sorted({unit % array.tasks for unit in left})
    problems = []
    for task in failed[:TOLD]:
        how = ends[task].describe() if task in ends else UNKNOWN_END
        lines = "".join(f"\n      {line}" for line in said.get(task, ()))
        log = f"{folder.logs}/{array.job_id}_{task}.log"
        problems.append(f"task {task}: {how}; " + (f"{log} ends:{lines}" if lines else f"it has said nothing in {log}"))
    if len(failed) > TOLD:
        problems.append(f"and {len(failed) - TOLD} more, see {folder.logs}")
    tasks, units = ("s" if len(found) > 1 else "" for found in (failed, left))
    return OrchestrateError(
        f"job {array.job_id} has ended, and {len(left)} unit{units} of {len(failed)} of its task{tasks} "
        f"{'are' if units else 'is'} not done; what is done is kept in {folder.path}, and the same command submits "
        "what is left:",
        problems,
    )


def _minutes(cluster: ClusterSettings) -> int:
    seconds = time_limit_seconds(cluster.time_limit)
    if seconds is None or seconds < 60:
        raise ConfigError(
            f"the time limit {cluster.time_limit!r} of cluster {cluster.name!r} should be [days-]hours:minutes:seconds "
            "and at least a minute; give --time 4:00:00"
        )
    return seconds // 60
