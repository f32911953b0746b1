"""Submit a run's supervisor as one job through Submitit. The only module that imports submitit.

The job's main process is our supervisor, not Submitit's pickled function: it hears the signals
itself and imports the run's own snapshot of the code. Submitit 1.5.4's private `_submit_command`
does that, called in one place for each executor.
"""

import contextlib
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from orchestrator.checks import time_limit_seconds
from orchestrator.errors import SchedulerError
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.processes import living_process
from orchestrator.run_directory import RunDirectory

SUPERVISOR = "orchestrator.slurm.supervisor"


def check_scheduler(run: RunDirectory, plan: TrainingPlan) -> None:
    """Refuse a scheduler that is not here or could never start the job, before anything is written.

    Args:
        run: whose folder need not be there yet.

    Raises:
        SchedulerError: Slurm was asked for and `sbatch` is not found, or Slurm says no.
    """
    cluster = plan.settings.cluster
    if cluster.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise SchedulerError(
            f"cluster {cluster.name!r} is a Slurm cluster, and there is no `sbatch` on this machine; run this on a "
            "login node, or take cluster=local for this machine"
        )
    if cluster.scheduler == "slurm":
        _refuse_impossible(run, plan)


def submit(run: RunDirectory, *, by: Literal["person", "supervisor"]) -> str:
    """Submit the supervisor of a run and record the job.

    Args:
        by: who wants it; failures are counted since a person last did.

    Returns:
        the job's id.

    Raises:
        SchedulerError: the job could not be submitted; the output of the submission is in the message.
    """
    # In a process of its own session, so that a Ctrl-C in the launching terminal never reaches the job.
    with interrupts_later():
        result = subprocess.run(
            [sys.executable, "-P", "-m", "orchestrator.slurm.submission", str(run.path)],
            env=code_environment(run),
            cwd=run.path,
            start_new_session=True,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SchedulerError(f"the job of run {run.name} could not be submitted:\n{result.stderr.strip()[-2000:]}")
        record = {**json.loads(result.stdout.splitlines()[-1]), "by": by}
        try:
            run.add_submission(record)
        except BaseException:
            _take_back(record)  # a job that nobody knows of must not run
            raise
    return str(record["job_id"])


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


def supervisor_command(run: RunDirectory) -> str:
    """Return the job's main process as a shell line."""
    return shlex.join([sys.executable, "-P", "-m", SUPERVISOR, str(run.path)])


def _submit_local(run: RunDirectory, plan: TrainingPlan) -> tuple[str, float]:
    import submitit

    executor = submitit.LocalExecutor(folder=run.jobs)
    limit = time_limit_seconds(plan.settings.cluster.time_limit) or 0
    executor.update_parameters(
        timeout_min=limit / 60,
        signal_delay_s=plan.settings.cluster.warning_seconds,
        stderr_to_stdout=True,
    )
    job = executor._submit_command(supervisor_command(run))
    return str(job.job_id), psutil.Process(int(job.job_id)).create_time()


def slurm_executor(run: RunDirectory, plan: TrainingPlan) -> Any:
    """Return Submitit's executor with what sbatch is asked for."""
    import submitit

    cluster = plan.settings.cluster
    executor = submitit.SlurmExecutor(folder=run.jobs)
    # B: the warning goes to the job's main process, which is the supervisor, and not to the ranks.
    additional: dict[str, object] = {
        "requeue": True,
        "dependency": "singleton",
        "signal": f"B:USR2@{cluster.warning_seconds}",
    }
    if cluster.account:
        additional["account"] = cluster.account
    executor.update_parameters(
        job_name=f"orchestrate-{run.name}",
        nodes=cluster.nodes,
        ntasks_per_node=cluster.ranks_per_node,
        time=(time_limit_seconds(cluster.time_limit) or 0) // 60,
        use_srun=False,
        stderr_to_stdout=True,
        **({"gpus_per_node": cluster.ranks_per_node} if cluster.device == "cuda" else {}),
        **({"partition": cluster.partition} if cluster.partition else {}),
        additional_parameters=additional,
        setup=[f"export PYTHONPATH={shlex.quote(str(run.code))} PYTHONSAFEPATH=1"],
    )
    return executor


def sbatch_script(run: RunDirectory, plan: TrainingPlan) -> str:
    """Return the script that is submitted."""
    text: str = slurm_executor(run, plan)._make_submission_file_text(_slurm_command(run), "test")
    return text


def _refuse_impossible(run: RunDirectory, plan: TrainingPlan) -> None:
    """Ask Slurm whether the job could ever start; without this it may accept it and leave it pending for ever.

    Raises:
        SchedulerError: it could not; Slurm's reason is in the message.
    """
    result = subprocess.run(
        ["sbatch", "--test-only"], input=sbatch_script(run, plan), capture_output=True, text=True, check=False
    )
    if result.returncode:
        cluster = plan.settings.cluster
        raise SchedulerError(
            f"Slurm could not run this on {cluster.nodes} nodes of partition {cluster.partition or '(the default)'}: "
            f"{' '.join(result.stderr.split())}; see `sinfo`, and set cluster.nodes, partition, account or time_limit"
        )


def _slurm_command(run: RunDirectory) -> str:
    return f"exec {supervisor_command(run)}"


def _submit_slurm(run: RunDirectory, plan: TrainingPlan) -> tuple[str, float]:
    job = slurm_executor(run, plan)._submit_command(_slurm_command(run))
    return str(job.job_id), 0.0


def main(path: str) -> None:
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
        job_id, created = (_submit_slurm if scheduler == "slurm" else _submit_local)(run, plan)
    except Exception:
        os.dup2(errors, 2)
        raise
    record = {
        "time": time.time(),
        "scheduler": scheduler,
        "job_id": job_id,
        "process_created": created,
        "host": socket.gethostname(),
    }
    os.write(answer, (json.dumps(record) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1])
