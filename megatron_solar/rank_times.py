"""How long each rank computes in a step: the step's time without what it spends in collectives, every n-th step.

All ranks end a step together, so that a slow one is seen only by how little it waits for the others. On these steps
alone the calls of torch.distributed that megatron makes, and the waits for those that it began, are timed: on the CPU
by the clock, on CUDA by events on the current stream, for which a collective makes the stream wait (never run on one).
Reading samples and preparing them count as computing.
"""

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed

from megatron_solar.failures import node_name
from megatron_solar.stacks import waits_for_others
from megatron_solar.telling import EventWriter
from orchestrator.events import RankTimesEvent
from orchestrator.plan import TrainingPlan

CALLS = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "barrier", "batch_isend_irecv", "broadcast", "irecv", "isend",
    "recv", "reduce_scatter", "reduce_scatter_tensor", "send",
)  # fmt: skip
"""What megatron calls, by its own names for it too."""


def hosts_of_ranks() -> list[str]:
    """Return the name of each rank's node, in their order; collective."""
    hosts: list[Any] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, node_name())
    return hosts


class RankTimes:
    """Measures the ranks every `numerics.rank_time_steps` steps, and tells of the slowest."""

    def __init__(self, plan: TrainingPlan, hosts: Sequence[str], tell: EventWriter) -> None:
        """Measure the ranks of a plan.

        Args:
            hosts: of all ranks, in their order.
        """
        self._every = plan.settings.numerics.rank_time_steps if plan.layout.world_size > 1 else 0
        self._device = plan.settings.cluster.device
        self._hosts = hosts
        self._tell = tell

    @contextlib.contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Measure what is done within, if it is the step's turn; collective at its end then."""
        if not self._every or step % self._every:
            yield
            return
        clock = _DeviceClock() if self._device == "cuda" else _HostClock()
        with clock.timed(), _timed_collectives(clock):
            yield
        whole, waited = clock.seconds()
        self._compare(step, whole, whole - waited)

    @waits_for_others
    def _compare(self, step: int, whole: float, computed: float) -> None:
        mine = torch.tensor([computed], dtype=torch.float64, device=self._device)
        everyone = [torch.empty_like(mine) for _ in self._hosts]
        torch.distributed.all_gather(everyone, mine)
        seconds = torch.cat(everyone).tolist()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        self._tell(
            RankTimesEvent(
                time=time.time(),
                step=step,
                step_seconds=whole,
                median_seconds=statistics.median(seconds),
                slowest_seconds=seconds[slowest],
                slowest_rank=slowest,
                slowest_host=self._hosts[slowest],
            )
        )


class _HostClock:
    """Seconds of the whole, and of the calls within, of which an inner one counts with the outer."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self._is_inside = False

    def mark(self) -> Any:
        """Return this moment."""
        return time.perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds from one moment to another."""
        return float(end - begin)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Time the whole, which is the last span."""
        begin = self.mark()
        yield
        self._spans.append((begin, self.mark()))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is timed."""

        @functools.wraps(call)
        @waits_for_others  # a rank that hangs in a wait of a measured step stands in this frame
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return call(*arguments, **options)
            self._is_inside, begin = True, self.mark()
            try:
                return call(*arguments, **options)
            finally:
                self._spans.append((begin, self.mark()))
                self._is_inside = False

        return timed

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the whole and those of the calls."""
        *calls, whole = [self.between(begin, end) for begin, end in self._spans]
        return whole, sum(calls)


class _DeviceClock(_HostClock):
    """The same by events of the current stream; never run on a GPU."""

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000

    def seconds(self) -> tuple[float, float]:
        torch.cuda.synchronize()
        return super().seconds()


@contextlib.contextmanager
def _timed_collectives(clock: _HostClock) -> Iterator[None]:
    """Have the collectives timed that are called meanwhile, by whichever name a module of megatron knows them."""
    work: Any = torch.distributed.Work
    originals = {id(call): call for name in CALLS if (call := getattr(torch.distributed, name, None)) is not None}
    wrapped = {number: clock.wrapped(call) for number, call in originals.items()}
    places = [
        (module, name, value)
        for key, module in list(sys.modules.items())
        if key == "torch.distributed" or key.startswith(("torch.distributed.distributed_c10d", "megatron.core"))
        for name, value in list(vars(module).items())
        if id(value) in originals
    ]
    wait = work.wait
    for module, name, value in places:
        setattr(module, name, wrapped[id(value)])
    work.wait = clock.wrapped(wait)
    try:
        yield
    finally:
        work.wait = wait
        for module, name, value in places:
            setattr(module, name, value)
