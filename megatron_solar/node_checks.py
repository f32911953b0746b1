"""Check the nodes of an allocation with ranks on all of them: one computes rightly, and reaches the others.

    python -m megatron_solar.node_checks FOLDER --nodes N --ranks-per-node R --device cpu|cuda [--seconds S]

A matrix product with a known result, an all-reduce within each node, then two rounds over pairs of
nodes: (0,1) (2,3)..., then (1,2) (3,4)... and the last with the first where their number is even; one
all-reduce over all could not name the culprit. Each group has a rendezvous of its own and a time limit,
so that a dead node spoils its own pairs only. Each rank writes what it saw to FOLDER/rank_0003.json;
`orchestrator/slurm/node_checks.py` judges it. Only the CPU's side has ever run: gloo, not NCCL.
"""

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_solar.failures import node_name
from megatron_solar.worker import own_address
from orchestrator.files import read_json, write_json
from orchestrator.run_directory import FILE_MASK

if TYPE_CHECKING:
    import torch
    import torch.distributed

STAGES = 3
"""The node by itself, and two rounds of pairs; each has its share of the time."""
DEFAULT_SECONDS = 60.0
_SIZES = {"cpu": (256, 1 << 18), "cuda": (8192, 1 << 26)}
"""Rows of the square matrices, and elements of the all-reduced tensor (fp32)."""
_REPEATS = {"cpu": 30, "cuda": 20}
_kept: list[object] = []
"""Groups and stores, until the process leaves: taking one down waits for the other ranks."""
_REMAINDER = 32
"""What is left of each sum of products: small enough for bf16 to hold it exactly, times four."""


def pair_rounds(nodes: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of both rounds; in an odd number of nodes the last, then the first, stands aside."""
    first = [(n, n + 1) for n in range(0, nodes - 1, 2)]
    second = [(n, n + 1) for n in range(1, nodes - 1, 2)]
    if nodes % 2 == 0 and nodes > 1:
        second.append((nodes - 1, 0))
    return first, second


def main(arguments: Sequence[str]) -> int:
    """Run one rank of the checks; 0 once it has written what it saw, whatever that is."""
    parser = argparse.ArgumentParser(prog="node_checks")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    parser.add_argument("--host", default=node_name())
    options = parser.parse_args(arguments)
    os.umask(FILE_MASK)
    import torch  # noqa: F401 (not the node's fault where it is missing: the rank ends, and nobody is blamed)

    rank, node = options.rank, options.rank // options.ranks_per_node
    matrix_error, tflops = "", 0.0
    try:
        _choose_device(options.device, rank % options.ranks_per_node)
        tflops = multiply(options.device)
    except Exception as error:  # whatever a broken device raises is the finding
        matrix_error = _in_one_line(error)
    groups = []
    meeting = Meeting(options.folder, rank)
    meeting.wait_for_all(options.nodes * options.ranks_per_node, options.seconds)
    started = time.monotonic()
    for stage, nodes in enumerate(_groups_of(node, options.nodes)):
        members = [n * options.ranks_per_node + i for n in nodes for i in range(options.ranks_per_node)]
        if len(members) < 2:
            continue
        deadline = started + options.seconds * (stage + 1) / STAGES
        error_text, speed = "", 0.0
        try:
            speed = meeting.all_reduce(f"stage_{stage}", members, options.device, deadline)
        except Exception as error:
            error_text = _in_one_line(error)
        groups.append({"nodes": nodes, "error": error_text, "gigabytes_per_second": speed})
    write_json(
        options.folder / f"rank_{rank:04d}.json",
        {
            "rank": rank,
            "node": node,
            "host": options.host,
            "matrix_error": matrix_error,
            "matrix_tflops": tflops,
            "groups": groups,
            "seconds": time.monotonic() - started,
        },
    )
    return 0


def _groups_of(node: int, nodes: int) -> Iterator[tuple[int, ...]]:
    """Yield the nodes that a node meets in each stage: itself, and its partner in each round or nobody."""
    yield (node,)
    for pairs in pair_rounds(nodes):
        yield next((pair for pair in pairs if node in pair), ())


def multiply(device: str) -> float:
    """Multiply two square matrices whose product is known, and return TFLOP/s.

    Raises:
        ArithmeticError: the device computed something else.
    """
    import torch

    size, _ = _SIZES[device]
    left, right, expected = known_product(size, torch.float32 if device == "cpu" else torch.bfloat16, device)
    product = left @ right  # the first one loads the library
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_REPEATS[device]):
        product = left @ right
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not torch.equal(product, expected):
        wrong = int((product != expected).sum())
        raise ArithmeticError(f"{wrong} of {size * size} elements of a matrix product are wrong")
    return 2.0 * size**3 * _REPEATS[device] / seconds / 1e12


def known_product(size: int, dtype: "torch.dtype", device: str) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return two matrices and their product.

    They are u s^T and t v^T, with u and v of one or two, s and t of plus and minus one whose product sums to
    32. Every sum over a contiguous part is a small integer, so that bf16 and any order of summing are exact.
    """
    import torch

    index = torch.arange(size, device=device)
    outer = index % 2 + 1
    signs = 1 - index // 3 % 2 * 2
    product_of_signs = torch.where(index % (2 * size // _REMAINDER) == 1, 1, 1 - index % 2 * 2)
    left = outer[:, None] * signs[None, :]
    right = (signs * product_of_signs)[:, None] * outer[None, :]
    expected = _REMAINDER * outer[:, None] * outer[None, :]
    return left.to(dtype), right.to(dtype), expected.to(dtype)


class Meeting:
    """Where one rank meets the others: the lowest rank of each group listens, and says where in the folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._own_store: torch.distributed.TCPStore | None = None

    def wait_for_all(self, ranks: int, seconds: float) -> None:
        """Wait until every rank is there, or so long: hundreds import torch from one disk, and some are late."""
        write_json(self._folder / f"here_{self._rank:04d}.json", {})
        began = time.monotonic()
        while sum(name.startswith("here_") for name in os.listdir(self._folder)) < ranks:  # noqa: PTH208
            waited = time.monotonic() - began
            if waited > seconds:
                return
            time.sleep(min(0.5, 0.02 + waited / 10))

    def all_reduce(self, name: str, members: Sequence[int], device: str, deadline: float) -> float:
        """Sum a tensor over some ranks, and return the bus bandwidth in GB/s (2 (n-1)/n of the bytes a second).

        Raises:
            TimeoutError: not all of them came before the deadline.
            ArithmeticError: the sum is wrong.
        """
        import torch
        from torch.distributed import PrefixStore

        store = PrefixStore(f"{name}/{members[0]}", self._store_of(members[0], deadline))
        size, number = len(members), members.index(self._rank)
        group = _new_group(store, number, size, device, _left(deadline))
        _kept.append(group)
        ramp = torch.arange(_SIZES[device][1], device=device, dtype=torch.float32) % 97
        expected = ramp * size + size * (size - 1) / 2  # small integers: exact in any order
        self._sum(group, torch.zeros(1, device=device), deadline)  # the first one connects
        tensor = ramp + number
        began = time.perf_counter()
        self._sum(group, tensor, deadline)
        seconds = time.perf_counter() - began
        with contextlib.suppress(RuntimeError):  # who ends first would cut off what the others still read
            store.set(f"done/{number}", "")
            store.wait([f"done/{other}" for other in range(size)], min(_left(deadline), timedelta(seconds=5)))
        if not torch.equal(tensor, expected):
            wrong = int((tensor != expected).sum())
            raise ArithmeticError(f"{wrong} of {tensor.numel()} elements of an all-reduce are wrong")
        return 2 * (size - 1) / size * tensor.numel() * 4 / seconds / 1e9

    @staticmethod
    def _sum(group: Any, tensor: "torch.Tensor", deadline: float) -> None:
        import torch

        group.allreduce([tensor], timeout=_left(deadline)).wait()
        if tensor.is_cuda:
            torch.cuda.synchronize()

    def _store_of(self, owner: int, deadline: float) -> Any:
        """Return a connection to the store of a rank; it is opened at the first use, on a free port."""
        from torch.distributed import TCPStore

        path = self._folder / f"store_{owner:04d}.json"
        if owner == self._rank:
            if self._own_store is None:
                host = own_address()
                self._own_store = TCPStore(host, 0, None, True, _left(deadline), wait_for_workers=False)
                _kept.append(self._own_store)
                write_json(path, {"host": host, "port": self._own_store.port})
            self._own_store.set_timeout(_left(deadline))
            return self._own_store
        # The folder is read anew, since a network file system remembers for long that a name was not there.
        while path.name not in os.listdir(self._folder):  # noqa: PTH208
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {owner} did not come in time")
            time.sleep(0.02)
        where = read_json(path)
        # TCPStore tries for more than twice its timeout (torch 2.13), even where the owner has left.
        socket.create_connection((where["host"], where["port"]), _left(deadline).total_seconds()).close()
        store = TCPStore(where["host"], where["port"], None, False, _left(deadline) / 3)
        store.set_timeout(_left(deadline))
        _kept.append(store)
        return store


def _new_group(store: Any, rank: int, size: int, device: str, timeout: timedelta) -> Any:
    """Return a process group of its own: torch's default one counts, and two ranks would count differently.

    After a group that failed on one of them they would wait for each other under two names (torch 2.13).
    """
    from torch import distributed

    if device == "cpu":
        return distributed.ProcessGroupGloo(store, rank, size, timeout)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return distributed.ProcessGroupNCCL(store, rank, size, options)


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _choose_device(device: str, local_rank: int) -> None:
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
        return
    # A rank that waits for a dead one is to go on, not to be ended by NCCL's watchdog.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    torch.cuda.set_device(local_rank % max(1, torch.cuda.device_count()))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo would keep the interpreter for seconds
