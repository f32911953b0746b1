"""Write down the end of an attempt whose supervisor was killed, or died with its node, as the next one finds it."""

import re
import time
from typing import Any

from orchestrator.attempt_record import attempt_record, last_heard
from orchestrator.exit_codes import Cause
from orchestrator.files import write_json
from orchestrator.plan import TrainingPlan
from orchestrator.recovery import Action, Decision, Ending
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.endings import AttemptEnding
from orchestrator.slurm.history import attempts_since_a_person, decide_on, newest_step, outcome_record
from orchestrator.slurm.job import OwnJob, record_of, record_of_node
from orchestrator.slurm.leaving import nodes_to_leave

_STEPD = re.compile(r"^slurmstepd: error: \*\*\* (?:JOB|STEP) [0-9.a-z]+ ON \S+ .*$", re.MULTILINE)


def close_lost(run: RunDirectory, plan: TrainingPlan, job: OwnJob | None, witness: str = "") -> Decision | None:
    """Give the newest attempt an outcome if it has none; nobody else will.

    Args:
        job: in which the run goes on.
        witness: how it is known that the supervisor's node is dead, where Slurm may not know yet.

    Returns:
        what would follow, where it goes on without a person; None where nothing was lost or a person started it.
    """
    attempts = run.attempts()
    lost = attempts[-1] if attempts else None
    record = lost.read_job() if lost is not None else None
    if lost is None or record is None or lost.read_outcome() is not None:
        return None
    cause, message, host, evidence = why_lost(run, record, job, witness)
    saved, ended = newest_step(run), last_heard(lost) or time.time()
    goes_on_by_itself = lost.number in [attempt.number for attempt in attempts_since_a_person(run)]
    decision = Decision(action=Action.STOP, why="nothing followed until a person resumed the run")
    if goes_on_by_itself:
        decision = decide_on(run, lost, Ending(cause=cause, saved_step=saved, enough_nodes=False), plan.settings)
    excluded, refusal = nodes_to_leave(run, plan, job, [host] if cause == Cause.NODE_FAILED and host else [])
    evidence += [{"source": "slurm", "text": refusal}] if refusal else []
    outcome = outcome_record(
        lost,
        AttemptEnding(cause=cause, message=message, host=host),
        decision,
        saved_step=saved,
        ended=ended,
        submissions=record["submissions"],
        excluded=excluded,
        evidence=evidence,
    )
    write_json(lost.outcome, {**attempt_record(run, lost, saved_step=saved, ended=ended), **outcome})
    return decision if goes_on_by_itself else None


def why_lost(
    run: RunDirectory, record: dict[str, Any], job: OwnJob | None, witness: str = ""
) -> tuple[Cause, str, str | None, list[dict[str, str]]]:
    """Return cause, message, node and evidence of an attempt whose supervisor wrote nothing down.

    Args:
        record: the attempt's job.json.
        job: in which the run goes on.
        witness: as for `close_lost`.
    """
    process = f"process {record['process']} on {record['host']}"
    if job is None or record["scheduler"] != "slurm":
        return Cause.SUPERVISOR_LOST, f"the supervisor, {process}, was killed or its machine died", None, []
    node = str(record.get("node", record["host"]))
    is_node_lost, of_node = record_of_node(node)
    is_same = str(record["job_id"]) == job.job_id
    of_job = "" if is_same else record_of(str(record["job_id"]))  # the record is of its present start otherwise
    evidence = [{"source": "slurm", "text": text} for text in (of_node if is_node_lost else "", of_job) if text]
    for path in sorted(run.jobs.glob(f"{record['job_id']}_*.out")):
        lines = _STEPD.findall(path.read_text(errors="replace"))
        evidence += [{"source": "slurm", "text": line} for line in lines[-1:]]
    if witness:
        evidence.append({"source": "node", "text": witness})
    if witness or is_node_lost or "JobState=NODE_FAIL" in of_job:
        message = f"node {node}, where the supervisor ran, died"
        return Cause.NODE_FAILED, message, node, evidence
    if "JobState=OUT_OF_MEMORY" in of_job:
        return Cause.OUT_OF_MEMORY, f"the job was killed for memory, with the supervisor, {process}", node, evidence
    again = "; Slurm started the job again" if is_same else ""
    return Cause.SUPERVISOR_LOST, f"the supervisor, {process}, was killed{again}", None, evidence
