"""Submit a run's supervisor as one job through Submitit, or a job array. The only module that imports submitit.

The job's main process is our supervisor, not Submitit's pickled function: it hears the signals
itself and imports the run's own snapshot of the code. Submitit 1.5.4's private `_submit_command`
does that, called in one place for each executor.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from orchestrator.checks import time_limit_seconds
from orchestrator.errors import SchedulerError
from orchestrator.files import read_json
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.processes import living_process
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.history import excluded_nodes
from orchestrator.slurm.job import job_facts
from orchestrator.slurm.requests import check_request
from orchestrator.slurm.scheduler import SUBMIT_SECONDS, find_unrecorded_job, without_job
from orchestrator.slurm.site_profile import sbatch_options, script_setup

SUPERVISOR = "orchestrator.slurm.supervisor"


def check_scheduler(run: RunDirectory, plan: TrainingPlan) -> None:
    """Refuse a scheduler that is not here or could never start the job, before anything is written.

    Args:
        run: whose folder need not be there yet.

    Raises:
        ConfigError: a container runtime or an account that is not here.
        SchedulerError: Slurm was asked for and `sbatch` is not found, does not answer, or says no.
    """
    cluster = plan.settings.cluster
    if cluster.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise SchedulerError(
            f"cluster {cluster.name!r} is a Slurm cluster, and there is no `sbatch` on this machine; run this on a "
            "login node, or take cluster=local for this machine"
        )
    if cluster.scheduler == "slurm":
        check_request(plan, sbatch_script(run, plan))


class UnknownSubmissionError(SchedulerError):
    """Whether a job was submitted is not known; the run's folder has to stay."""


def submit(run: RunDirectory, *, by: Literal["person", "supervisor"]) -> str:
    """Submit the supervisor of a run, once, whatever becomes of the scheduler's answer.

    The intent is written first, with its number. The job carries the number and leaves where a newer one
    was begun; so one that arrives late does no harm. Where sbatch fails or does not answer, the job is
    looked up by its name before anybody tries again.

    Args:
        by: who wants it; failures are counted since a person last did.

    Returns:
        the job's id.

    Raises:
        SchedulerError: the job was not submitted; the output of the submission is in the message.
        UnknownSubmissionError: the scheduler said nothing, neither then nor when asked.
    """
    with interrupts_later():
        scheduler = read_plan(run.plan).settings.cluster.scheduler
        intent = {"time": time.time(), "by": by, "scheduler": scheduler, "host": socket.gethostname(), "job_id": None}
        number = run.add_submission({**intent, "job_name": job_name(run)})
        try:
            job = _submitted(run, number)
        except SchedulerError as error:
            found = None
            if scheduler == "slurm":
                try:
                    found = find_unrecorded_job(run)
                except SchedulerError as silence:
                    raise UnknownSubmissionError(
                        f"whether the job of run {run.name} was submitted is not known, and nothing is tried twice: "
                        f"{error}\nwhen asked, {silence}\n`orchestrate resume {run.name}` asks again, and submits it "
                        "where Slurm has no such job"
                    ) from error
            if found is None:
                run.complete_submission(number, {"is_withdrawn": True})
                raise
            job = {"job_id": found, "process_created": 0.0}
        try:
            run.complete_submission(number, job)
        except BaseException:
            _take_back({**intent, **job})  # a job that nobody knows of must not run
            raise
    facts = job_facts(str(job["job_id"])) if scheduler == "slurm" else None
    if facts is not None:
        run.complete_submission(number, {"may_requeue": facts.may_requeue})
    return str(job["job_id"])


def _submitted(run: RunDirectory, number: int) -> dict[str, Any]:
    """Submit in a process of its own session, so that a Ctrl-C in the launching terminal never reaches the job.

    Raises:
        SchedulerError: it failed, or took too long.
    """
    return _answer_of([str(run.path), str(number)], f"run {run.name}", run.path, code_environment(run))


def _answer_of(
    arguments: Sequence[str], what: str, folder: Path, environment: Mapping[str, str], given: str | None = None
) -> dict[str, Any]:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "orchestrator.slurm.submission", *arguments],
        env=without_job(environment),
        cwd=folder,
        start_new_session=True,
        stdin=None if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(given, timeout=SUBMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SchedulerError(f"the submission of {what} took more than {SUBMIT_SECONDS} s") from None
    if process.returncode:
        raise SchedulerError(f"the job of {what} could not be submitted:\n{errors.strip()[-2000:]}")
    return dict(json.loads(output.splitlines()[-1]))


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: between a submission and its record it would lose a job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _take_back(record: Mapping[str, Any]) -> None:
    """End a job that was submitted and could not be recorded."""
    if record["scheduler"] == "slurm":
        subprocess.run(["scancel", str(record["job_id"])], capture_output=True, check=False)
        return
    process = living_process(int(record["job_id"]), float(record["process_created"]))
    for part in [*(process.children(recursive=True) if process is not None else []), process]:
        if part is not None:
            with contextlib.suppress(psutil.Error):
                part.kill()


def code_environment(run: RunDirectory) -> dict[str, str]:
    """Return the environment in which a run's own snapshot of the code is imported."""
    return {**os.environ, "PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}


def job_name(run: RunDirectory) -> str:
    """Return the name of all jobs of a run, which no other run has: with `singleton` one runs at a time."""
    token = read_json(run.provenance).get("token") if run.provenance.exists() else None
    return f"orchestrate-{run.name}" + (f"-{token}" if token else "")


def supervisor_command(run: RunDirectory, number: int) -> str:
    """Return the job's main process as a shell line."""
    return shlex.join([sys.executable, "-P", "-m", SUPERVISOR, str(run.path), str(number)])


def _submit_local(run: RunDirectory, plan: TrainingPlan, number: int) -> tuple[str, float]:
    import submitit

    executor = submitit.LocalExecutor(folder=run.jobs)
    limit = time_limit_seconds(plan.settings.cluster.time_limit) or 0
    executor.update_parameters(
        timeout_min=limit / 60,
        signal_delay_s=plan.settings.cluster.warning_seconds,
        stderr_to_stdout=True,
    )
    job = executor._submit_command(supervisor_command(run, number))
    return str(job.job_id), psutil.Process(int(job.job_id)).create_time()


def slurm_executor(run: RunDirectory, plan: TrainingPlan) -> Any:
    """Return Submitit's executor with what sbatch is asked for."""
    import submitit

    executor = submitit.SlurmExecutor(folder=run.jobs)
    executor.update_parameters(
        nodes=plan.settings.cluster.nodes,  # Submitit counts with it
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,  # Submitit's own; a site that checks them would refuse it
        additional_parameters=sbatch_options(plan, job_name(run), excluded_nodes(run)),
        setup=script_setup(run, plan),
    )
    return executor


def sbatch_script(run: RunDirectory, plan: TrainingPlan) -> str:
    """Return the script that is submitted."""
    text: str = slurm_executor(run, plan)._make_submission_file_text(_slurm_command(run), "test")
    return text


def _slurm_command(run: RunDirectory, number: int = 1) -> str:
    return f"exec {supervisor_command(run, number)}"


def _submit_slurm(run: RunDirectory, plan: TrainingPlan, number: int) -> tuple[str, float]:
    job = slurm_executor(run, plan)._submit_command(_slurm_command(run, number))
    return str(job.job_id), 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayScript:
    """A job array that any number of times does the same command."""

    folder: str
    """Where the script is kept."""
    options: dict[str, Any]
    """Of sbatch by their long names, with _ for -; True stands for one without a value."""
    setup: list[str]
    command: str

    def executor(self) -> Any:
        """Return Submitit's executor with what sbatch is asked for."""
        import submitit

        executor = submitit.SlurmExecutor(folder=self.folder)
        executor.update_parameters(
            use_srun=False, stderr_to_stdout=True, wckey=None, additional_parameters=self.options, setup=self.setup
        )
        return executor

    def text(self) -> str:
        """Return the script."""
        text: str = self.executor()._make_submission_file_text(self.command, "test")
        return text


def submit_array(script: ArrayScript, what: str) -> str:
    """Submit a job array in a process of its own session, and return its id.

    Raises:
        SchedulerError: sbatch failed, or took too long; whether there is a job is known by its name only.
    """
    given = json.dumps(dataclasses.asdict(script))
    return str(_answer_of([], what, Path(script.folder), os.environ, given)["job_id"])


def main_of_array() -> None:
    """Submit the array that stdin has, and print the job's record as JSON in the last line."""
    script = ArrayScript(**json.load(sys.stdin))
    job = script.executor()._submit_command(script.command)
    print(json.dumps({"job_id": str(job.job_id)}))


def main(path: str, number: int) -> None:
    """Submit, and print the job's record as JSON in the last line."""
    run = RunDirectory(Path(path))
    plan = read_plan(run.plan)
    scheduler = plan.settings.cluster.scheduler
    # The local executor's controller inherits these; a pipe would keep the launching command waiting.
    answer = os.dup(1)
    log = os.open(run.jobs / "controller.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    errors = os.dup(2)
    for target in (1, 2):
        os.dup2(log, target)
    os.dup2(null, 0)
    try:
        job_id, created = (_submit_slurm if scheduler == "slurm" else _submit_local)(run, plan, number)
    except Exception:
        os.dup2(errors, 2)
        raise
    os.write(answer, (json.dumps({"job_id": job_id, "process_created": created}) + "\n").encode())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main_of_array()
    else:
        main(sys.argv[1], int(sys.argv[2]))
