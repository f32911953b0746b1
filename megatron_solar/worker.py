"""One rank, from its first line to its exit code.

Started as `python -m megatron_solar.worker RUN ATTEMPT`, or forked from the preloaded process. Rank
and world size come from the arguments, or from Slurm's variables under srun. A failing rank leaves
a record with rank, host, step and traceback before it ends.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from orchestrator import exit_codes
from orchestrator.errors import CheckpointError, ConfigError, DataError, DiskFullError, ModelFolderError
from orchestrator.files import is_full, read_json, write_json
from orchestrator.packages import package_versions
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory

RENDEZVOUS_SECONDS = 600


def main(arguments: Sequence[str]) -> int:
    """Run one rank and return its exit code."""
    started = time.time()
    os.umask(FILE_MASK)
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--local-rank", type=int, default=int(os.environ.get("SLURM_LOCALID", "0")))
    options = parser.parse_args(arguments)
    # The supervisor hears the warnings and asks through the stop file; a rank that Slurm signals lives on, also
    # at the TERM of a requeue or a cancellation: until the KILL some seconds later it can save.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Deprecations among torch and megatron, repeated by every rank, would bury what matters in its log.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\.")
    run = RunDirectory(options.run)
    attempt = run.attempt(options.attempt)
    try:
        plan = read_plan(attempt.plan)
        reason = _run_rank(run, attempt, plan, options.rank, options.local_rank, started)
    except BaseException as error:
        code = _exit_code(error)
        _record_failure(attempt, options.rank, error, code)
        return code
    return exit_codes.FINISHED if reason == "finished" else exit_codes.SAVED_AND_LEFT


def _run_rank(
    run: RunDirectory, attempt: AttemptDirectory, plan: TrainingPlan, rank: int, local_rank: int, started: float
) -> str:
    import torch

    from megatron_solar.cpu import cuda_calls_on_cpu

    on_cpu = plan.settings.cluster.device == "cpu"
    if on_cpu:
        cluster = plan.settings.cluster
        neighbours = cluster.ranks_per_node * (cluster.nodes if cluster.one_machine else 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    else:
        torch.cuda.set_device(local_rank % max(1, torch.cuda.device_count()))
    if rank == 0:
        versions = {"python": sys.version.split()[0], "packages": package_versions()}
        write_json(attempt.worker_versions, versions)
    if plan.settings.training.deterministic:
        torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as stack:
        if on_cpu and "megatron.core" not in sys.modules:  # a forked rank inherits the substitute
            stack.enter_context(cuda_calls_on_cpu())
        from megatron_solar.train import train

        join(attempt, rank, plan.layout.world_size, "gloo" if on_cpu else "nccl")
        return train(run, attempt, plan, worker_started=started)


def join(attempt: AttemptDirectory, rank: int, world_size: int, backend: str) -> None:
    """Initialize torch.distributed; rank 0 listens on a free port and says where in the attempt's folder.

    So no port has to be chosen before, none can be taken, and no node name has to resolve.
    """
    from datetime import timedelta

    import torch.distributed

    timeout = timedelta(seconds=RENDEZVOUS_SECONDS)
    if rank == 0:
        host = own_address()
        store = torch.distributed.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        write_json(attempt.rendezvous, {"host": host, "port": store.port})
    else:
        began = time.monotonic()
        # The folder is read anew, since a network file system remembers for long that a name was not there.
        while attempt.rendezvous.name not in os.listdir(attempt.path):  # noqa: PTH208
            waited = time.monotonic() - began
            if waited > RENDEZVOUS_SECONDS:
                raise TimeoutError(
                    f"rank 0 did not say where it listens within {RENDEZVOUS_SECONDS} s: {attempt.rendezvous}"
                )
            time.sleep(min(0.5, 0.02 + waited / 10))  # hundreds of ranks look
        where = read_json(attempt.rendezvous)
        store = torch.distributed.TCPStore(where["host"], where["port"], world_size, is_master=False, timeout=timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def own_address() -> str:
    """Return the address by which this host reaches the supervisor's, without sending anything; loopback without Slurm.

    Names of nodes may resolve to a loopback address, or not at all; srun tells its own address to every task.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return "127.0.0.1"
    known = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "192.0.2.1")  # otherwise an address of documentation
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((known, 9))  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])


def node_name() -> str:
    """Return Slurm's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _record_failure(attempt: AttemptDirectory, rank: int, error: BaseException, code: int) -> None:
    text = "".join(traceback.format_exception(error))
    record = {
        "rank": rank,
        "host": node_name(),
        "time": time.time(),
        "step": last_step(attempt),
        "exit_code": code,
        "error": type(error).__name__,
        "message": str(error),
        "traceback": text,
    }
    # A full disk may take neither; the exit code then says what happened.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        write_json(attempt.rank_failure(rank), record)


def last_step(attempt: AttemptDirectory) -> int | None:
    """Return the last step that an attempt told of, or None."""
    from orchestrator.events import StartEvent, StepEvent, read_events

    steps = [event.step for _, event in read_events(attempt.events) if isinstance(event, StepEvent | StartEvent)]
    return steps[-1] if steps else None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, CheckpointError):
        return exit_codes.BAD_CHECKPOINT
    if isinstance(error, DiskFullError) or is_full(error):
        return exit_codes.DISK_FULL
    if isinstance(error, DataError):
        return exit_codes.BAD_DATA
    if isinstance(error, ConfigError | ModelFolderError):
        return exit_codes.BAD_CONFIG
    if type(error).__name__ == "NotFiniteError":
        return exit_codes.NOT_FINITE
    return exit_codes.EXCEPTION


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving by the interpreter's own way waits for threads of gloo and costs seconds.
    os._exit(code)
