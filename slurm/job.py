"""The Slurm job that the supervisor is: its nodes in the order of ranks, and what Slurm thinks of it.

The variables of the job are read here and nowhere else in the supervisor. Slurm's answers are facts or
None: an error, an empty answer and silence all mean "unknown", never "gone". What is said of 22.05 was
measured (docs/log.md).
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence

from orchestrator.errors import SchedulerError
from orchestrator.exit_codes import Cause
from orchestrator.slurm.scheduler import run_command

UNKNOWN_KILL_WAIT_SECONDS = 30.0
"""Slurm's default for what it leaves between TERM and KILL."""
RETRY_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnJob:
    """What the environment says of the job that this process is in."""

    job_id: str
    restarts: int
    """How often Slurm had started the job again when this start of it began."""
    nodes: tuple[str, ...]
    """In Slurm's order; the first one is where the supervisor runs."""
    node_list: str
    """The same as Slurm writes it: n[001-033]."""

    @property
    def host(self) -> str:
        """Where the supervisor runs."""
        return self.nodes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What slurmctld says of a job."""

    state: str
    restarts: int
    may_requeue: bool
    is_preempted: bool
    """It runs in the grace that a preemption leaves."""
    is_over_time: bool = False
    partition: str = ""
    excluded: str = ""
    """The nodes that it must not get, as Slurm writes them."""


def own_job() -> OwnJob | None:
    """Return the job that this process is in, or None outside of Slurm."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    node_list = os.environ["SLURM_JOB_NODELIST"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return OwnJob(job_id=job_id, restarts=restarts, nodes=expand(node_list), node_list=node_list)


def expand(nodes: str) -> tuple[str, ...]:
    """Return the names in a list such as n[001-003]; scontrol does that alone, without slurmctld."""
    return tuple(run_command(["scontrol", "show", "hostnames", nodes]).split())


def job_facts(job_id: str) -> JobFacts | None:
    """Ask slurmctld about a job; None where it does not answer."""
    return facts_in(_shown(job_id))


def _shown(job_id: str) -> str:
    """Return what `scontrol show job` prints; nothing where slurmctld does not answer or knows no such job."""
    try:
        return run_command(["scontrol", "show", "job", "--oneliner", job_id])
    except SchedulerError:
        return ""


def _fields(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", text))


def facts_in(text: str) -> JobFacts | None:
    """Read what `scontrol show job` prints."""
    found = _fields(text)
    if "JobState" not in found:
        return None
    return JobFacts(
        state=found["JobState"],
        restarts=int(found.get("Restarts", "0")),
        may_requeue=found.get("Requeue") == "1",
        is_preempted=found.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
        is_over_time=found["JobState"] == "TIMEOUT" or found.get("Reason") == "TimeLimit",
        partition=found.get("Partition", ""),
        excluded=found.get("ExcNodeList", "").replace("(null)", ""),
    )


def why_terminated(job: OwnJob, facts: JobFacts | None) -> Cause:
    """Say what a SIGTERM of Slurm means: a cancellation and a requeue look alike to who gets it.

    Slurm counts a requeue, by an administrator or for a preemption, before it sends the signal. Where it
    cannot be asked the answer is a cancellation, since nobody wants a cancelled run to come back.
    """
    if facts is None:
        return Cause.CANCELLED
    if facts.restarts > job.restarts or facts.state == "PREEMPTED":
        return Cause.PREEMPTED
    if facts.state == "RUNNING" and facts.is_preempted:
        return Cause.PREEMPTED
    if facts.is_over_time:
        return Cause.TIME_LIMIT  # the ranks were slower than the warning
    return Cause.CANCELLED


def kill_wait_seconds() -> float:
    """Return how long Slurm waits between TERM and KILL."""
    try:
        found = re.search(r"^KillWait\s*=\s*([0-9]+)", run_command(["scontrol", "show", "config"]), re.MULTILINE)
    except SchedulerError:
        found = None
    return float(found.group(1)) if found is not None else UNKNOWN_KILL_WAIT_SECONDS


def switches() -> dict[str, str]:
    """Return the leaf switch of each node as Slurm's topology has it; empty where it has none."""
    try:
        text = run_command(["scontrol", "show", "topology"])
    except SchedulerError:
        return {}
    found: dict[str, str] = {}
    for name, nodes in re.findall(r"SwitchName=(\S+) Level=0\b.*?\bNodes=(\S+)", text):
        found |= dict.fromkeys(expand(nodes), name)
    return found


def by_switch(nodes: Sequence[str], leaf: Mapping[str, str]) -> tuple[str, ...]:
    """Return nodes in the order of ranks: those of one switch side by side, otherwise as Slurm lists them.

    Neighbours in rank are neighbours in data or pipeline parallelism. The node that is first stays first,
    so that rank 0 is beside the supervisor.
    """
    first_seen: dict[str, int] = {}
    for node in nodes:
        first_seen.setdefault(leaf.get(node, ""), len(first_seen))
    return tuple(sorted(nodes, key=lambda node: first_seen[leaf.get(node, "")]))


def requeue(job: OwnJob) -> bool:
    """Have Slurm start this job again; False where the site does not let it.

    Raises:
        SchedulerError: slurmctld did not answer, so that nothing is known.
    """
    facts = job_facts(job.job_id)
    if facts is None:
        raise SchedulerError(f"slurmctld does not answer, and job {job.job_id} has to be requeued")
    if facts.restarts > job.restarts:
        return True  # it is being started again already
    if not facts.may_requeue:
        return False
    try:
        run_command(["scontrol", "requeue", job.job_id])
    except SchedulerError:
        # Was it refused, or done: its TERM reaches everything that the job's main process has started, scontrol too.
        facts = job_facts(job.job_id) or job_facts(job.job_id)
        if facts is None:
            raise
        return facts.restarts > job.restarts
    return True


def exclude_nodes(job: OwnJob, nodes: Sequence[str], seconds: float) -> tuple[str, ...]:
    """Keep a job that is being requeued off these nodes, beside those that it must not get already.

    Slurm changes the list of a pending job only, so that it is asked again while the job completes.

    Returns:
        all nodes that it must not get, as Slurm has them then.

    Raises:
        SchedulerError: it was not done within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        refusal = "it does not answer"
        try:
            # The TERM of the requeue may end any of these commands; the next try finds what was done.
            facts = job_facts(job.job_id)
            if facts is not None:
                excluded = expand(facts.excluded) if facts.excluded else ()
                if set(nodes) <= set(excluded):
                    return excluded
                everything = ",".join(sorted({*excluded, *nodes}))
                run_command(["scontrol", "update", f"jobid={job.job_id}", f"ExcNodeList={everything}"])
        except SchedulerError as error:
            refusal = str(error)
        if time.monotonic() > deadline:
            raise SchedulerError(f"Slurm does not exclude {', '.join(nodes)} from job {job.job_id}: {refusal}")
        time.sleep(RETRY_SECONDS)


def nodes_of_partition(partition: str) -> tuple[str, ...]:
    """Return all nodes of a partition, also those that are down.

    Raises:
        SchedulerError: slurmctld did not answer.
    """
    command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]
    return tuple(dict.fromkeys(run_command(command).split()))


def record_of(job_id: str) -> str:
    """Return what Slurm's record says of a job's end, for people; nothing where it does not say."""
    found = _fields(_shown(job_id))
    names = ("JobState", "Reason", "Restarts", "ExitCode", "EndTime")
    return f"job {job_id}: " + " ".join(f"{name}={found[name]}" for name in names if name in found) if found else ""


def record_of_node(node: str) -> tuple[bool, str]:
    """Return whether Slurm has lost a node, and what it says of it, for people; nothing where it does not say."""
    try:
        text = run_command(["scontrol", "show", "node", "--oneliner", node])
    except SchedulerError:
        return False, ""
    state = re.search(r"\bState=(\S+)", text)
    reason = re.search(r"\bReason=(.+?)\s*$", text)
    if state is None:
        return False, ""
    is_lost = re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", state[1]) is not None
    return is_lost, f"node {node}: State={state[1]}" + (f" Reason={reason[1]}" if reason else "")


def end_step(job: OwnJob, name: str) -> None:
    """Have slurmctld kill a step of this job, and again until it is gone; nothing where it does not answer."""
    with contextlib.suppress(SchedulerError):
        listed = run_command(["squeue", "--steps", "--noheader", f"--jobs={job.job_id}", "--format=%i %j"])
        steps = [line.split()[0] for line in listed.splitlines() if line.split()[1:] == [name]]
        if steps:
            run_command(["scancel", "--signal=KILL", *steps])


def end_job(job: OwnJob) -> None:
    """Cancel this job, so that Slurm says CANCELLED and starts what is left of it in no case again."""
    with contextlib.suppress(SchedulerError):
        run_command(["scancel", job.job_id])
