"""How a run goes on in another job, and without the nodes that were bad in this one, or computed wrongly in it."""

import logging
import time
from collections.abc import Iterable

from orchestrator.errors import SchedulerError
from orchestrator.events import GuardEvent, ReplicaEvent, read_events
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.history import excluded_nodes
from orchestrator.slurm.job import OwnJob, exclude_nodes, job_facts, nodes_of_partition, requeue
from orchestrator.slurm.stop_requests import StopRequests
from orchestrator.slurm.submission import submit

REQUEUE_SECONDS = 600.0
"""How long a slurmctld that does not answer is asked again to start the job anew."""
RETRY_SECONDS = 10.0
TERM_SECONDS = 5.0
"""How long the TERM of a requeue may take."""
EXCLUDE_SECONDS = 20.0
"""How long Slurm is asked to exclude nodes; it kills us before, where its KillWait is shorter."""

log = logging.getLogger("supervisor")


def nodes_that_computed_wrongly(attempt: AttemptDirectory) -> dict[str, str]:
    """Return the nodes whose ranks an attempt's ranks found to compute wrongly, each with why."""
    found: dict[str, str] = {}
    for _, event in read_events(attempt.events):
        if isinstance(event, GuardEvent) and event.origin == "hardware":
            why = f"it computed step {event.step} wrongly (rank {', '.join(map(str, event.ranks))}: {event.differs})"
        elif isinstance(event, ReplicaEvent) and event.is_majority:
            why = f"its weights were not those of the other replicas after step {event.step}: {event.parameters[0]}"
        else:
            continue
        found |= dict.fromkeys(event.hosts, why)
    return found


def nodes_to_leave(
    run: RunDirectory, plan: TrainingPlan, job: OwnJob | None, bad: Iterable[str], *, is_hurried: bool = False
) -> tuple[list[str], str]:
    """Return the nodes that the next job must not get, those of earlier jobs included.

    Args:
        is_hurried: whether Slurm's KILL is near, so that nobody is asked how many others there are.

    Returns:
        none where too few others are in the partition, with why in the second place.
    """
    wanted = list(dict.fromkeys([*excluded_nodes(run), *bad]))
    if not wanted or job is None:
        return [], ""
    if is_hurried:
        return wanted, ""
    cluster = plan.settings.cluster
    try:
        facts = job_facts(job.job_id)
        if facts is None:
            return wanted, ""
        everywhere = nodes_of_partition(facts.partition)
    except SchedulerError:
        return wanted, ""
    if len(set(everywhere) - {*wanted, *cluster.slurm.exclude}) < cluster.nodes:
        return [], f"{', '.join(wanted)} cannot be left out: partition {facts.partition} has too few other nodes"
    return wanted, ""


def go_on_in_another_job(
    run: RunDirectory, job: OwnJob | None, stops: StopRequests, *, for_bad_nodes: bool = False
) -> None:
    """Have this job started again, or a successor where that is not allowed; slurmctld is asked for some minutes.

    Args:
        for_bad_nodes: whether nodes of the job are the reason. Slurm starts a job with a dead node again only once it
            has seen the death itself, after SlurmdTimeout, by default 300 s; a successor starts at once, and is never
            given those nodes.

    Raises:
        SchedulerError: it did not answer, or refused.
    """
    until = time.monotonic() + REQUEUE_SECONDS
    while True:
        try:
            if job is not None and not for_bad_nodes and requeue(job):
                log.info("job %s is started again by Slurm", job.job_id)
                _exclude(run, job)
                stops.wait_for_term(TERM_SECONDS)  # a job that ends before it is one that has completed
            else:
                successor = submit(run, by="supervisor")
                facts = job_facts(successor) if job is not None else None
                without = f", without {facts.excluded}" if facts is not None and facts.excluded else ""
                log.info("goes on as job %s%s", successor, without)
            return
        except SchedulerError as error:  # a successor that came to be nevertheless leaves for a newer one
            if time.monotonic() > until or run.cancel_mark.exists():
                raise
            log.warning("asks again in %.0f s: %s", RETRY_SECONDS, error)
            time.sleep(RETRY_SECONDS)


def _exclude(run: RunDirectory, job: OwnJob) -> None:
    """Keep the requeued job off the nodes that were bad; Slurm gives us until its KILL for that."""
    nodes = excluded_nodes(run)
    if nodes:
        try:
            log.info("Slurm will not give it %s", ", ".join(exclude_nodes(job, nodes, EXCLUDE_SECONDS)))
        except SchedulerError as error:  # the next supervisor avoids them where it can
            log.warning("%s", error)
