"""Become the only supervisor of a run: the newest submission's, with the run's lock."""

import socket
import time

from orchestrator.errors import RunError
from orchestrator.owner_lock import OwnedLock, acquire
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.job import OwnJob
from orchestrator.slurm.storage import RENEWAL_SECONDS

LOCK_STALE_SECONDS = 60.0
"""Age at which the lock of a supervisor on another host is taken over; its owner renews it much more often."""


def settle_submission(run: RunDirectory, number: int, job: OwnJob | None) -> None:
    """Record this job where nobody could, and leave where the run goes on in a newer one.

    Raises:
        RunError: another submission has followed, or this one was taken back.
    """
    submissions = run.submissions()
    if not submissions or submissions[-1]["number"] != number:
        raise RunError(f"run {run.name} does not go on in submission {number}; this job leaves")
    if job is not None and submissions[-1]["job_id"] is None:
        run.complete_submission(number, {"job_id": job.job_id, "process_created": 0.0})


def take_run(run: RunDirectory, job: OwnJob | None) -> OwnedLock:
    """Become a run's only supervisor.

    One of another host that has stopped renewing its lock is waited for. A requeued job takes the run
    from its own former start at once: Slurm has given that one up, and it may live on a lost node.

    Raises:
        RunError: it has a living supervisor.
    """
    attempts = run.attempts()
    before = attempts[-1].read_job() if attempts else None
    is_same = job is not None and before is not None and before["job_id"] == job.job_id
    if job is not None and before is not None and is_same and before["restart_count"] < job.restarts:
        run.supervisor_lock.unlink(missing_ok=True)
    deadline = time.monotonic() + LOCK_STALE_SECONDS + RENEWAL_SECONDS
    while True:
        lock = acquire(run.supervisor_lock, "supervisor", stale_seconds=LOCK_STALE_SECONDS)
        if isinstance(lock, OwnedLock):
            return lock
        is_leaving = before is not None and attempts[-1].read_outcome() is not None  # it ends its last things
        is_here = lock.endswith(f" on {socket.gethostname()}")
        if (is_here and not is_leaving) or time.monotonic() > deadline:
            raise RunError(f"run {run.name} has a supervisor, {lock}; this one leaves")
        time.sleep(1.0)
