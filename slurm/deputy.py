"""Have a run go on whose supervisor died with the first node of its job.

An agent becomes this, by `deputy_command`, where its supervisor is gone and has not said that it leaves. A job that
outlives dead nodes (`--no-kill`) outlives its first one too: Slurm leaves it running, without a main process, until its
time is over (seen with 22.05). A supervisor that lives renews the run's lock, and only cannot be reached from here.
"""

import logging
import os
import sys
import time
from pathlib import Path

from orchestrator.errors import OrchestrateError, SchedulerError
from orchestrator.plan import read_plan
from orchestrator.recovery import Action
from orchestrator.run_directory import FILE_MASK, RunDirectory
from orchestrator.slurm.job import OwnJob, end_job, own_job, requeue
from orchestrator.slurm.lost import close_lost
from orchestrator.slurm.node_agent import node_name
from orchestrator.slurm.storage import RENEWAL_SECONDS
from orchestrator.slurm.submission import UnknownSubmissionError, submit
from orchestrator.slurm.take_over import LOCK_STALE_SECONDS

TURN_SECONDS = 10.0
"""How much longer each further node waits, so that one acts and the others find it done."""
ASK_SECONDS = 10.0
TRY_SECONDS = 3600.0

log = logging.getLogger("deputy")


def deputy_command(run: RunDirectory) -> list[str]:
    """Return what an agent runs, with the run's own code; a list whose first word is a path."""
    code = f"import sys; sys.path.insert(0, {str(run.code)!r}); from orchestrator.slurm.deputy import main; main()"
    return [sys.executable, "-I", "-c", code, str(run.path)]


def is_abandoned(lock: Path, seconds: float) -> bool:
    """Wait, and return whether a run's lock was renewed by nobody for so long; not where it was released or taken."""
    before = _state(lock)
    until = time.monotonic() + seconds
    while before is not None and time.monotonic() < until:
        time.sleep(RENEWAL_SECONDS / 2)
        if _state(lock) != before:
            return False
    return before is not None


def _state(lock: Path) -> tuple[bytes, float] | None:
    try:
        with lock.open("rb") as stream:  # opening asks a network file system anew
            return stream.read(), os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def take_over(run: RunDirectory, job: OwnJob) -> None:
    """Write down how the attempt ended, and have the run go on in a successor of this job, or end it.

    A requeue would keep the job's place in the queue, but Slurm's KILL comes before the dead node can be excluded.

    Raises:
        SchedulerError: slurmctld refused or did not answer.
    """
    witness = f"nothing was heard from {job.host} on {node_name()}, and for {LOCK_STALE_SECONDS:.0f} s nobody has "
    decision = close_lost(run, read_plan(run.plan), job, witness + "renewed the run's lock")
    if decision is not None and decision.action == Action.STOP:
        log.info("ends job %s: %s", job.job_id, decision.why)
        return end_job(job)
    try:
        log.info("goes on as job %s", submit(run, by="supervisor"))
    except UnknownSubmissionError:
        raise  # one more makes no second run: the older one leaves
    except SchedulerError as error:
        log.warning("%s", error)
        if requeue(job):
            log.info("job %s is started again by Slurm", job.job_id)
        return None
    return end_job(job)


def main() -> None:
    """Wait until the supervisor must be dead, then act, however long Slurm takes to answer."""
    os.umask(FILE_MASK)
    run, job = RunDirectory(Path(sys.argv[1])), own_job()
    if job is None or run.cancel_mark.exists():
        return
    form = f"%(asctime)sZ deputy on {node_name()} %(levelname)s %(message)s"  # srun died with the supervisor
    logging.basicConfig(level=logging.INFO, format=form, filename=run.jobs / "deputy.log", force=True)
    logging.Formatter.converter = time.gmtime
    attempt = run.attempts()[-1]
    turn = max(0, int(os.environ.get("SLURM_NODEID", "1")) - 1)
    log.info("hears nothing of the supervisor on %s", job.host)
    if not is_abandoned(run.supervisor_lock, LOCK_STALE_SECONDS + turn * TURN_SECONDS):
        log.info("the supervisor lives, or has left, or has a successor")
        return
    if attempt.outcome.exists() or run.attempts()[-1].number != attempt.number:
        log.info("attempt %d is over already", attempt.number)
        return
    until = time.monotonic() + TRY_SECONDS
    while time.monotonic() < until:
        try:
            take_over(run, job)
            return
        except SchedulerError as error:
            log.warning("asks again in %.0f s: %s", ASK_SECONDS, error)
        except OrchestrateError as error:
            log.error("%s", error)
            return
        time.sleep(ASK_SECONDS)
