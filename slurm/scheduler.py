"""Ask the scheduler about a run's newest job, and tell it to end. An error is silence, never an answer."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping

import psutil

from orchestrator.errors import SchedulerError
from orchestrator.processes import living_process
from orchestrator.reconcile import JobAnswer
from orchestrator.run_directory import RunDirectory

ANSWER_SECONDS = 20
"""Longer than Slurm's commands wait by themselves for a controller that does not answer."""
SUBMIT_SECONDS = 120
"""How long a submission may take; an intent of which nothing was heard for longer came to nothing."""
_SLURM_PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_SLURM_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")
SLURM_LIVING = frozenset((*_SLURM_PENDING, *_SLURM_RUNNING))
"""States of jobs that run, or will by themselves."""


def ask(run: RunDirectory) -> JobAnswer:
    """Return what the scheduler says of a run's newest job."""
    submissions = run.submissions()
    if not submissions:
        return JobAnswer.GONE
    newest = submissions[-1]
    if newest["job_id"] is None:
        answer = _ask_slurm(run) if newest["scheduler"] == "slurm" else JobAnswer.GONE
        is_being_made = time.time() - float(newest["time"]) < SUBMIT_SECONDS
        return JobAnswer.PENDING if answer == JobAnswer.GONE and is_being_made else answer
    if newest["scheduler"] == "slurm":
        return _ask_slurm(run)
    if newest["host"] != socket.gethostname():
        return JobAnswer.SILENT  # processes of another host cannot be seen
    return JobAnswer.RUNNING if local_process(run) is not None else JobAnswer.GONE


def why_waiting(run: RunDirectory) -> str:
    """Return why Slurm has not started a run's newest job, and when it expects to; nothing where it does not say."""
    try:
        job = slurm_job(run) if run.submissions()[-1]["scheduler"] == "slurm" else None
        said = (
            []
            if job is None
            else run_command(["squeue", "--noheader", f"--jobs={job}", "--format=%S %r"]).split(maxsplit=1)
        )
    except SchedulerError:
        return ""
    if len(said) != 2 or said[1].strip() == "None":
        return ""
    expected = "" if said[0] in ("N/A", "Unknown") else f", and expects to start it at {said[0]}"
    return f"Slurm says {said[1].strip()}{expected}"


def local_process(run: RunDirectory) -> psutil.Process | None:
    """Return the living process of a local run: its supervisor, or the controller that starts it."""
    attempts = run.attempts()
    job = attempts[-1].read_job() if attempts else None
    candidates = [(job["process"], job["process_created"])] if job else []
    submissions = run.submissions()
    newest = submissions[-1] if submissions else None
    if newest is not None and newest["job_id"] is not None:
        candidates.append((int(newest["job_id"]), newest["process_created"]))
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
        is_running = _ask_slurm(run) == JobAnswer.RUNNING
        job = slurm_job(run)
        if job is not None:
            run_command(["scancel", *(["--batch", "--signal=TERM"] if is_running else []), job])
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


def slurm_job(run: RunDirectory) -> str | None:
    """Return the id of a run's newest job, also of one whose submission was never answered; None where there is none.

    Raises:
        SchedulerError: slurmctld had to be asked and did not answer.
    """
    newest = run.submissions()[-1]
    return str(newest["job_id"]) if newest["job_id"] is not None else find_unrecorded_job(run)


def find_unrecorded_job(run: RunDirectory) -> str | None:
    """Look up by a run's name the job that was submitted and not recorded.

    Raises:
        SchedulerError: slurmctld did not answer.
    """
    submissions = run.submissions()
    known = {str(record["job_id"]) for record in submissions}
    name = submissions[-1]["job_name"]
    found = run_command(["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%A"]).split()
    unknown = sorted((job for job in found if job not in known), key=int)
    return unknown[-1] if unknown else None


def _ask_slurm(run: RunDirectory) -> JobAnswer:
    try:
        job_id = slurm_job(run)
    except SchedulerError:
        return JobAnswer.SILENT
    if job_id is None:
        return JobAnswer.GONE
    try:
        states = run_command(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]).split()
    except SchedulerError as error:
        return JobAnswer.GONE if "Invalid job id" in str(error) else JobAnswer.SILENT
    if not states:
        return JobAnswer.GONE
    if states[-1] in _SLURM_PENDING:
        return JobAnswer.PENDING
    return JobAnswer.RUNNING if states[-1] in _SLURM_RUNNING else JobAnswer.GONE


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of a job that this process may be in; sbatch would hand them on."""
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or not _is_of_a_job(name)}


def _is_of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SRUN_"))


def run_command(command: list[str]) -> str:
    """Run one of Slurm's commands and return what it prints.

    Raises:
        SchedulerError: it refused, or did not answer in time.
    """
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            process_group=0,  # the TERM of a requeue that the supervisor asks for is not for who asks
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"`{' '.join(command)}` did not answer: {error}") from error
    if result.returncode:
        raise SchedulerError(f"`{' '.join(command)}` was refused: {result.stderr.strip()}")
    return result.stdout
