"""Ask the scheduler about a run's newest job, and tell it to end. An error is silence, never an answer."""

import contextlib
import os
import signal
import socket
import subprocess

import psutil

from orchestrator.errors import SchedulerError
from orchestrator.processes import living_process
from orchestrator.reconcile import JobAnswer
from orchestrator.run_directory import RunDirectory

ANSWER_SECONDS = 20
_SLURM_PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_SLURM_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")


def ask(run: RunDirectory) -> JobAnswer:
    """Return what the scheduler says of a run's newest job."""
    submissions = run.submissions()
    if not submissions:
        return JobAnswer.GONE
    newest = submissions[-1]
    if newest["scheduler"] == "slurm":
        return _ask_slurm(str(newest["job_id"]))
    if newest["host"] != socket.gethostname():
        return JobAnswer.SILENT  # processes of another host cannot be seen
    return JobAnswer.RUNNING if local_process(run) is not None else JobAnswer.GONE


def local_process(run: RunDirectory) -> psutil.Process | None:
    """Return the living process of a local run: its supervisor, or the controller that starts it."""
    attempts = run.attempts()
    job = attempts[-1].read_job() if attempts else None
    candidates = [(job["process"], job["process_created"])] if job else []
    submissions = run.submissions()
    candidates += [(int(submissions[-1]["job_id"]), submissions[-1]["process_created"])] if submissions else []
    living = (living_process(number, created) for number, created in candidates)
    return next((process for process in living if process is not None), None)


def tell_to_end(run: RunDirectory) -> None:
    """Send a run's supervisor the signal of a cancellation; it has the ranks save, and then ends.

    Under Slurm only the job's main process hears it: a plain scancel would end the ranks at once.

    Raises:
        SchedulerError: Slurm refused or did not answer.
    """
    submissions = run.submissions()
    if submissions and submissions[-1]["scheduler"] == "slurm":
        job = str(submissions[-1]["job_id"])
        is_running = _ask_slurm(job) == JobAnswer.RUNNING
        _run(["scancel", *(["--batch", "--signal=TERM"] if is_running else []), job])
        return
    if submissions and submissions[-1]["host"] != socket.gethostname():
        raise SchedulerError(f"run {run.name} runs on {submissions[-1]['host']}; cancel it there")
    process = local_process(run)
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)


def warn_of_time_limit(run: RunDirectory) -> None:
    """Send a local run's supervisor what its job's time limit sends: SIGUSR2, save and leave.

    Raises:
        SchedulerError: the run has no living supervisor on this machine.
    """
    attempts = run.attempts()
    job = attempts[-1].read_job() if attempts else None
    process = local_process(run)
    if job is None or process is None or process.pid != job["process"]:
        raise SchedulerError(f"run {run.name} has no supervisor on this machine to warn")
    process.send_signal(signal.SIGUSR2)


def _ask_slurm(job_id: str) -> JobAnswer:
    try:
        states = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]).split()
    except SchedulerError as error:
        return JobAnswer.GONE if "Invalid job id" in str(error) else JobAnswer.SILENT
    if not states:
        return JobAnswer.GONE
    if states[-1] in _SLURM_PENDING:
        return JobAnswer.PENDING
    return JobAnswer.RUNNING if states[-1] in _SLURM_RUNNING else JobAnswer.GONE


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"`{' '.join(command)}` did not answer: {error}") from error
    if result.returncode:
        raise SchedulerError(f"`{' '.join(command)}` was refused: {result.stderr.strip()}")
    return result.stdout
