"""Start a run's ranks and see how they end: forked here, started here, or by srun."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from orchestrator.errors import OrchestrateError
from orchestrator.plan import TrainingPlan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.submission import code_environment

PRELOAD_SECONDS = 180
SOCKET_FOLDER = "orchestrate-preload-"
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch asks for it
    "NCCL_ALGO": "Ring",  # sums in one order; megatron-core's deterministic mode asks for it
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
}
"""For training.deterministic; never seen on a GPU."""


class Preload:
    """The process that has imported torch and megatron and forks CPU ranks; ends with this one."""

    def __init__(self, run: RunDirectory, plan: TrainingPlan) -> None:
        _sweep()
        # In the temporary folder, since a socket's path has 107 characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix=f"{SOCKET_FOLDER}{os.getpid()}-"))
        self.socket = self._folder / "preload"
        self._log = run.jobs / "preload.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [worker_python(plan), "-P", "-m", "megatron_solar.preload", str(self.socket)],
                env=rank_environment(run, plan),
                cwd=run.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self) -> None:
        """Wait for the socket.

        Raises:
            OrchestrateError: the process ended; the end of its log is in the message.
        """
        deadline = time.monotonic() + PRELOAD_SECONDS
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                tail = self._log.read_text(errors="replace")[-2000:]
                raise OrchestrateError(
                    f"the process that forks the ranks did not start; its log {self._log} ends:\n{tail}"
                )
            time.sleep(0.02)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and remove its socket."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the socket folders of this user's supervisors that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SOCKET_FOLDER}[0-9]*-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(SOCKET_FOLDER).partition("-")[0])
            if folder.stat().st_uid == os.getuid() and not psutil.pid_exists(owner):
                shutil.rmtree(folder)


class Ranks:
    """The running ranks of one attempt; under Slurm one srun stands for all of them."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def ended(self) -> dict[int, int]:
        """Return the exit code of every rank that has ended, 128 + n for signal n."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code if code >= 0 else 128 - code for rank, code in codes.items() if code is not None}

    @property
    def count(self) -> int:
        """How many processes stand for the ranks."""
        return len(self._processes)

    def kill(self) -> None:
        """End all of them at once; killing a client kills its rank."""
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()


def start_ranks(run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan, preload: Preload | None) -> Ranks:
    """Start every rank of an attempt with this plan, its output in a log of its own."""
    write_plan(attempt.plan, plan)
    if plan.settings.cluster.scheduler == "slurm":
        return Ranks({0: _start_srun(run, attempt, plan)})
    worker = [str(run.path), str(attempt.number)]
    processes = {}
    for rank in range(plan.layout.world_size):
        arguments = [*worker, "--rank", str(rank), "--local-rank", str(rank)]
        if preload is not None:
            client = run.code / "orchestrator" / "slurm" / "rank_client.py"
            command = [sys.executable, "-I", "-S", str(client), str(preload.socket), *arguments]
        else:
            command = [worker_python(plan), "-P", "-m", "megatron_solar.worker", *arguments]
        with attempt.rank_log(rank).open("ab") as log:
            processes[rank] = subprocess.Popen(
                command,
                env=rank_environment(run, plan),
                cwd=run.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
    return Ranks(processes)


def worker_python(plan: TrainingPlan) -> str:
    """Return the interpreter of the workers."""
    return plan.settings.cluster.worker_python or sys.executable


def rank_environment(run: RunDirectory, plan: TrainingPlan) -> dict[str, str]:
    """Return the workers' environment: the snapshot's code and the cluster's own variables."""
    cluster = plan.settings.cluster
    environment = {**code_environment(run), **cluster.environment}
    if plan.settings.training.deterministic:
        environment |= DETERMINISTIC
    if cluster.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # a process that forks must have no threads
    if cluster.scheduler == "local":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["RES_OPTIONS"] = "timeout:1 attempts:1"  # look-ups of a host name that nobody knows stall
        for name in [name for name in environment if name.startswith("SLURM_")]:
            del environment[name]  # a shell inside some Slurm job must not decide about local ranks
    return environment


def _start_srun(run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan) -> "subprocess.Popen[bytes]":
    cluster = plan.settings.cluster
    command = [
        "srun",
        f"--nodes={cluster.nodes}",
        f"--ntasks={plan.layout.world_size}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        "--kill-on-bad-exit=1",
        "--overlap",
        f"--output={attempt.logs}/rank_%4t.log",
        worker_python(plan),
        "-P",
        "-m",
        "megatron_solar.worker",
        str(run.path),
        str(attempt.number),
    ]
    with (attempt.logs / "srun.log").open("ab") as log:
        return subprocess.Popen(
            command,
            env=rank_environment(run, plan),
            cwd=run.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=os.setpgrp,
        )
