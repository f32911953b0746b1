"""Start a run's ranks and see how they end: forked here, started here, or by srun."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator.errors import OrchestrateError
from orchestrator.plan import TrainingPlan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.job import OwnJob, end_step
from orchestrator.slurm.site_profile import rank_command, srun_options, unset_names, worker_variables
from orchestrator.slurm.submission import code_environment

PRELOAD_SECONDS = 180
SOCKET_FOLDER = "orchestrate-preload-"
SRUN_SECONDS = 10.0
"""How long srun has to end its step."""
SRUN_SECONDS_WITHOUT_A_NODE = 2.0
"""The same where one of the nodes will not answer it."""
WORKER = "megatron_solar.worker"


class Preload:
    """The process that has imported torch and megatron and forks CPU ranks; ends with this one."""

    def __init__(self, run: RunDirectory, plan: TrainingPlan) -> None:
        _sweep()
        # In the temporary folder, since a socket's path has 107 characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix=socket_folder(os.getpid())))
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


def socket_folder(process: int) -> str:
    """Return how the name of a supervisor's socket folder begins: its PID space, since others have the same PIDs."""
    space = Path("/proc/self/ns/pid")
    return f"{SOCKET_FOLDER}{space.stat().st_ino if space.exists() else 0}-{process}-"


def _sweep() -> None:
    """Remove the socket folders of this user's supervisors that were killed before they could."""
    own_space = socket_folder(0).removesuffix("0-")
    for folder in Path(tempfile.gettempdir()).glob(f"{own_space}[0-9]*-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(own_space).partition("-")[0])
            if folder.stat().st_uid == os.getuid() and not psutil.pid_exists(owner):
                shutil.rmtree(folder)


class Ranks:
    """The running ranks of one attempt; under Slurm one srun stands for all of them."""

    def __init__(
        self,
        processes: dict[int, subprocess.Popen[bytes]],
        srun_log: Path | None = None,
        end_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Stand for processes.

        Args:
            srun_log: where srun's own words go.
            end_step: asks Slurm to kill what srun may have left.
        """
        self._processes = processes
        self._srun_log = srun_log
        self._end_step = end_step

    def ended(self) -> dict[int, int]:
        """Return the exit code of every rank that has ended, 128 + n for signal n."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code if code >= 0 else 128 - code for rank, code in codes.items() if code is not None}

    @property
    def count(self) -> int:
        """How many processes stand for the ranks."""
        return len(self._processes)

    def srun_log(self) -> str:
        """Return what srun has said so far; nothing where the ranks are not started by it."""
        if self._srun_log is None or not self._srun_log.exists():
            return ""
        return self._srun_log.read_text(errors="replace")

    def kill(self, seconds: float = SRUN_SECONDS) -> None:
        """End all of them at once; killing a client kills its rank, and srun ends its step when it is told to.

        Args:
            seconds: how long srun may take; it waits for nodes that are dead, after it has ended the others' ranks.
        """
        self._signal(signal.SIGKILL if self._srun_log is None else signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while len(self.ended()) < self.count and time.monotonic() < deadline:
            time.sleep(0.02)
        if len(self.ended()) < self.count:
            self._signal(signal.SIGKILL)
            # A killed srun ends no step. In a thread: slurmctld may take long to answer while a node is dead.
            threading.Thread(target=self._end_step, name="end step", daemon=True).start()
        for process in self._processes.values():
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)


def start_ranks(
    run: RunDirectory,
    attempt: AttemptDirectory,
    plan: TrainingPlan,
    preload: Preload | None,
    nodes: Sequence[str] = (),
    job: OwnJob | None = None,
) -> Ranks:
    """Start every rank of an attempt with this plan, its output in a log of its own.

    Args:
        nodes: of the allocation, in the order of ranks; nothing without Slurm.
    """
    write_plan(attempt.plan, plan)
    words = rank_words(run, plan, preload, WORKER, [str(run.path), str(attempt.number)])
    if plan.settings.cluster.scheduler == "slurm":
        output = f"{attempt.logs}/rank_%4t.log"
        name = f"ranks-{attempt.number}"
        step = start_step(
            run, plan, words, name=name, nodes=nodes, ranks_per_node=plan.settings.cluster.ranks_per_node,
            output=output, log=attempt.srun_log,
        )  # fmt: skip
        return Ranks({0: step}, attempt.srun_log, lambda: end_step(job, name) if job is not None else None)
    processes = {}
    for rank in range(plan.layout.world_size):
        with attempt.rank_log(rank).open("ab") as log:
            processes[rank] = subprocess.Popen(
                [*words, "--rank", str(rank), "--local-rank", str(rank)],
                env=rank_environment(run, plan),
                cwd=run.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
    return Ranks(processes)


def rank_words(
    run: RunDirectory, plan: TrainingPlan, preload: Preload | None, module: str, arguments: Sequence[str]
) -> list[str]:
    """Return the command of a rank: a module of megatron_solar, started or forked from the preloaded process."""
    if preload is None:
        return [worker_python(plan), "-P", "-m", module, *arguments]
    client = run.code / "orchestrator" / "slurm" / "rank_client.py"
    return [sys.executable, "-I", "-S", str(client), str(preload.socket), module, *arguments]


def srun_line(run: RunDirectory, plan: TrainingPlan) -> str:
    """Return how ranks will be started, for people: the nodes are known once they have passed their checks."""
    nodes = [f"node{number}" for number in range(plan.settings.cluster.nodes)]
    ranks_per_node = plan.settings.cluster.ranks_per_node
    options = srun_options(plan, nodes=nodes, ranks_per_node=ranks_per_node, output="ATTEMPT/logs/rank_%4t.log")
    shown = ["--nodelist=NODES" if option.startswith("--nodelist=") else option for option in options]
    return shlex.join(
        ["srun", *shown, *rank_command(run, plan, rank_words(run, plan, None, WORKER, [str(run.path), "N"]))]
    )


def start_step(
    run: RunDirectory,
    plan: TrainingPlan,
    words: Sequence[str],
    *,
    name: str,
    nodes: Sequence[str],
    ranks_per_node: int,
    output: str,
    log: Path,
    outlives_nodes: bool = False,
) -> "subprocess.Popen[bytes]":
    """Start a step of ranks on nodes of the allocation with srun, whose own words go to `log`.

    Args:
        outlives_nodes: whether Slurm leaves the other ranks alone when it has lost a node.
    """
    options = srun_options(plan, nodes=nodes, ranks_per_node=ranks_per_node, output=output)
    if outlives_nodes:
        options.append("--no-kill")
    environment = rank_environment(run, plan)
    environment.pop("SLURM_HOSTFILE", None)  # it would count more than the nodes that were chosen
    arguments = [f"--job-name={name}", *options, *rank_command(run, plan, words)]
    return start_srun(run, arguments, environment, log)


def start_srun(
    run: RunDirectory, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """Start srun in the run's folder, its own words appended to `log`."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            ["srun", *arguments],
            env=environment,
            cwd=run.path,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            process_group=0,  # the TERM of a requeue, which would have it kill the ranks at once, is not for it
        )


def worker_python(plan: TrainingPlan) -> str:
    """Return the interpreter of the workers."""
    return plan.settings.cluster.worker_python or sys.executable


def rank_environment(run: RunDirectory, plan: TrainingPlan) -> dict[str, str]:
    """Return the workers' environment: the snapshot's code and the cluster's own variables."""
    environment = {**code_environment(run), **worker_variables(run, plan)}
    for name in unset_names(plan):
        environment.pop(name, None)
    if plan.settings.cluster.scheduler == "local":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["RES_OPTIONS"] = "timeout:1 attempts:1"  # look-ups of a host name that nobody knows stall
        for name in [name for name in environment if name.startswith("SLURM_")]:
            del environment[name]  # a shell inside some Slurm job must not decide about local ranks
    return environment
