"""What an attempt's folder says of its job and of its hours: the supervisor writes it into the outcome,
and `orchestrate status` reckons it anew for an attempt that has none yet.
"""

import contextlib
from typing import Any

from orchestrator.errors import OrchestrateError
from orchestrator.events import read_events
from orchestrator.ledger import ledger_of
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.values import to_plain


def attempt_record(
    run: RunDirectory,
    attempt: AttemptDirectory,
    *,
    saved_step: int,
    ended: float,
    checking: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return job, nodes and ledger of an attempt, as they stand in its outcome.json; nothing before it has a job.json.

    Args:
        saved_step: step of the newest complete checkpoint.
        ended: the outcome's own time.
        checking: when node checks began and ended, if there were any.
    """
    job = attempt.read_job()
    if job is None:
        return {}
    plan = plan_of(run, attempt)
    nodes = plan.settings.cluster.nodes
    spare_nodes = max(0, int(job.get("node_count", nodes)) - nodes)
    ledger = ledger_of(
        since=_since(run, attempt, job),
        is_queued=not _is_same_process(run.attempt(attempt.number - 1).read_job(), job),
        started=float(job["started"]),
        checking=checking,
        events=[event for _, event in read_events(attempt.events)],
        saved_step=saved_step,
        consumed_tokens=plan.consumed_tokens,
        gpus=plan.layout.world_size,
        spare_gpus=spare_nodes * plan.settings.cluster.ranks_per_node,
        ended=ended,
    )
    return {
        "job_id": job["job_id"],
        "restart_count": job.get("restart_count", 0),
        "nodes": job["nodes"],
        "spare_nodes": spare_nodes,
        "ledger": to_plain(ledger),
    }


def plan_of(run: RunDirectory, attempt: AttemptDirectory) -> TrainingPlan:
    """Return the plan that an attempt runs with; the run's, where it has none yet or another version wrote it."""
    if attempt.plan.exists():
        with contextlib.suppress(OrchestrateError):
            return read_plan(attempt.plan)
    return read_plan(run.plan)


def last_heard(attempt: AttemptDirectory) -> float | None:
    """Return when an attempt ended; of one whose supervisor was lost, when it was heard last."""
    outcome, job = attempt.read_outcome(), attempt.read_job()
    if outcome is not None:
        return float(outcome["ended"])
    told = [event.time for _, event in read_events(attempt.events)]
    return told[-1] if told else float(job["started"]) if job is not None else None


def _since(run: RunDirectory, attempt: AttemptDirectory, job: dict[str, Any]) -> float:
    """Return when an attempt's time began: its job was submitted, or the attempt before ended, whichever was later."""
    known = max(1, int(job.get("submissions", 1)))  # to the supervisor then; the newest was its own
    times = [float(record["time"]) for record in run.submissions()[:known][-1:]]
    before = last_heard(run.attempt(attempt.number - 1))
    return max([*times, *([before] if before is not None else [])], default=float(job["started"]))


def _is_same_process(before: dict[str, Any] | None, job: dict[str, Any]) -> bool:
    """Return whether one supervisor ran both attempts, and so in one allocation."""
    return before is not None and all(before.get(key) == job.get(key) for key in ("host", "process", "process_created"))
