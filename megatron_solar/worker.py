"""One rank, from its first line to its exit code.

Started as `python -m megatron_solar.worker RUN ATTEMPT`, or forked from the preloaded process. Rank
and world size come from the arguments, or from Slurm's variables under srun. A failing rank leaves
a record with rank, host, step and traceback before it ends.
"""

import argparse
import contextlib
import errno
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_solar.failures import record_failure
from megatron_solar.hang_watch import HangWatch, connection_seconds
from megatron_solar.stacks import waits_for_others
from orchestrator import exit_codes
from orchestrator.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    HardwareError,
    ModelFolderError,
    NotFiniteError,
    NumericsError,
    PrecisionError,
    SpikeError,
)
from orchestrator.files import is_full, read_json, write_json
from orchestrator.packages import package_versions
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory

NEEDS_LESS = (
    "less memory is needed with a smaller layout.micro_batch_size, with layout.recompute=full, or with more "
    "layout.tensor_parallel, layout.context_parallel or layout.pipeline_parallel"
)
NUMERICS_CODES: dict[type[NumericsError], int] = {
    HardwareError: exit_codes.HARDWARE,
    SpikeError: exit_codes.SPIKE,
    NotFiniteError: exit_codes.NOT_FINITE,
    PrecisionError: exit_codes.PRECISION,
}


def main(arguments: Sequence[str]) -> int:
    """Run one rank and return its exit code."""
    started, began = time.time(), time.monotonic()
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
    watch: HangWatch | None = None
    try:
        plan = read_plan(attempt.plan)
        watch = HangWatch(run, attempt, options.rank, plan.settings.patience, began=began)
        watch.start()
        reason = _run_rank(run, attempt, plan, options.rank, options.local_rank, started, watch)
    except BaseException as error:
        if watch is not None:
            watch.yield_to_hang()
        code = _exit_code(error)
        _record_failure(attempt, options.rank, error, code)
        return code
    return exit_codes.FINISHED if reason == "finished" else exit_codes.SAVED_AND_LEFT


def _run_rank(
    run: RunDirectory,
    attempt: AttemptDirectory,
    plan: TrainingPlan,
    rank: int,
    local_rank: int,
    started: float,
    watch: HangWatch,
) -> str:
    import torch

    from megatron_solar.cpu import cuda_calls_on_cpu
    from megatron_solar.libraries import check_libraries

    check_libraries(plan.settings)
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

        seconds = connection_seconds(plan.settings.patience)
        join(attempt, rank, plan.layout.world_size, "gloo" if on_cpu else "nccl", seconds)
        return train(run, attempt, plan, worker_started=started, watch=watch)


@waits_for_others
def join(attempt: AttemptDirectory, rank: int, world_size: int, backend: str, seconds: float) -> None:
    """Initialize torch.distributed; rank 0 listens on a free port and says where in the attempt's folder.

    So no port has to be chosen before, none can be taken, and no node name has to resolve.

    Args:
        seconds: how long ranks wait for one another, here and in every collective.
    """
    from datetime import timedelta

    import torch.distributed

    timeout = timedelta(seconds=seconds)
    if rank == 0:
        host = own_address()
        store = torch.distributed.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        write_json(attempt.rendezvous, {"host": host, "port": store.port})
    else:
        began = time.monotonic()
        # The folder is read anew, since a network file system remembers for long that a name was not there.
        while attempt.rendezvous.name not in os.listdir(attempt.path):  # noqa: PTH208
            waited = time.monotonic() - began
            if waited > seconds:
                raise TimeoutError(f"rank 0 did not say where it listens within {seconds:.0f} s: {attempt.rendezvous}")
            time.sleep(min(0.5, 0.02 + waited / 10))  # hundreds of ranks look
        where = read_json(attempt.rendezvous)
        store = torch.distributed.TCPStore(where["host"], where["port"], world_size, is_master=False, timeout=timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


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


def _record_failure(attempt: AttemptDirectory, rank: int, error: BaseException, code: int) -> None:
    record_failure(
        attempt,
        rank,
        step=last_step(attempt),
        exit_code=code,
        error=type(error).__name__,
        message="; ".join(filter(None, [str(error), NEEDS_LESS if code == exit_codes.OUT_OF_MEMORY else ""])),
        traceback="".join(traceback.format_exception(error)),
        more={"blamed": {"ranks": error.ranks, "hosts": error.hosts}} if isinstance(error, HardwareError) else None,
    )


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
    if isinstance(error, NumericsError):
        return next(code for kind, code in NUMERICS_CODES.items() if isinstance(error, kind))
    return exit_codes.OUT_OF_MEMORY if _is_out_of_memory(error) else exit_codes.EXCEPTION


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of Python, of torch on a device or on the CPU, or of a mapped file."""
    is_torchs = isinstance(error, RuntimeError) and ": can't allocate memory" in str(error)  # no class of its own
    is_the_systems = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_torchs or is_the_systems or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving by the interpreter's own way waits for threads of gloo and costs seconds.
    os._exit(code)
