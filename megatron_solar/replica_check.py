"""Whether all data-parallel replicas hold the same weights, compared exactly.

Each rank sums the bits of each parameter as integers, each multiplied by its place, so that swapped values are seen;
integer sums do not depend on the order of summation, and 64 bits wrap around alike everywhere. It is done on the
device in one pass. megatron-core's own `check_param_hashes_across_dp_replicas` copies every parameter to host memory
and takes its SHA-1, which its docstring warns of, and compares with the first replica, which may be the wrong one.

It cannot see what only one rank holds: the master weights and moments, which the distributed optimizer shards; with
fp32 a flip in a rank's own shard is what it gives to all replicas at the next step. Weights are gathered anew from
the shards after every step, so that a flip in a gathered copy counts for the step after it only.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_solar import compat
from megatron_solar.replica import Replica
from megatron_solar.stacks import waits_for_others
from megatron_solar.telling import EventWriter
from orchestrator.errors import HardwareError
from orchestrator.events import ReplicaEvent
from orchestrator.plan import TrainingPlan

PART_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Of a parameter at a time, by device; what is summed takes 8 bytes each for a moment. On the CPU it stays in the
cache, 8 times as fast as parts of 4 million; on a GPU, where it has never run, fewer kernels are started.
"""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By the bytes of an element."""


class ReplicaCheck:
    """Compares the replicas every `numerics.replica_check_steps` steps and before each save."""

    def __init__(self, plan: TrainingPlan, replica: Replica, hosts: Sequence[str], tell: EventWriter) -> None:
        """Compare the replicas of a plan.

        Args:
            hosts: of all ranks, in their order.
        """
        self._device = plan.settings.cluster.device
        self._hosts = hosts
        self._tell = tell
        self._replica = replica
        self._ranks = compat.ranks_of_replicas()
        self._every = plan.settings.numerics.replica_check_steps if len(self._ranks) > 1 else 0

    def __call__(self, step: int, *, is_saving: bool) -> None:
        """Compare, if it is the step's turn; collective.

        Raises:
            HardwareError: replicas differ; nothing of this state is saved.
        """
        if not self._every or not (is_saving or step % self._every == 0):
            return
        compat.complete_weights(self._replica.chunks)
        parameters = [pair for chunk in self._replica.chunks for pair in chunk.module.named_parameters()]
        sums = torch.stack([bit_sum(parameter.detach()) for _, parameter in parameters])
        everyone = compat.gather_over_replicas(sums)
        if not self._is_any_different(everyone):
            return
        odd, columns, is_majority = odd_replicas(everyone.tolist())
        found = [self._ranks[index] for index in odd], [parameters[column][0] for column in columns], is_majority
        self._leave(step, found)

    @waits_for_others
    def _is_any_different(self, everyone: Tensor) -> bool:
        """Return whether the replicas of any rank differ; one number over all ranks."""
        flag = (everyone != everyone[0]).any().to(torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _leave(self, step: int, found: tuple[list[int], list[str], bool]) -> None:
        everyone: list[Any] = [None] * len(self._hosts)
        torch.distributed.all_gather_object(everyone, found)
        ranks = tuple(sorted({rank for odd, _, _ in everyone for rank in odd}))
        names = tuple(dict.fromkeys(name for _, names, _ in everyone for name in names))
        hosts = tuple(dict.fromkeys(self._hosts[rank] for rank in ranks))
        is_majority = all(of_rank for odd, _, of_rank in everyone if odd)
        self._tell(
            ReplicaEvent(
                time=time.time(), step=step, parameters=names, ranks=ranks, hosts=hosts, is_majority=is_majority
            )
        )
        count = len(self._ranks)
        who = "which the other replicas outvote" if is_majority else "and no majority says which of them is right"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise HardwareError(
            f"after step {step} all {count} data-parallel replicas should hold the same weights; {names[0]}{more} is "
            f"another one on rank {', '.join(map(str, ranks))} ({', '.join(hosts)}), {who}; this state is not saved",
            ranks,
            hosts if is_majority else (),
        )


def bit_sum(values: Tensor) -> Tensor:
    """Return the sum of all elements' bits, each times its place from 1 on, modulo 2**64."""
    flat = values.contiguous().view(_INTEGERS[values.element_size()]).view(-1)
    size = PART_ELEMENTS[flat.device.type]
    places = torch.arange(1, min(len(flat), size) + 1, device=flat.device)
    whole = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), size):
        part = flat[start : start + size].to(torch.int64)
        whole += (part * (places[: len(part)] + start)).sum()
    return whole


def odd_replicas(sums: Sequence[Sequence[int]]) -> tuple[list[int], list[int], bool]:
    """Return which replicas differ from the majority, in which columns, and whether there is a majority.

    Args:
        sums: a row a replica, a column a parameter.
    """
    odd: set[int] = set()
    columns = []
    is_majority = True
    for column, values in enumerate(zip(*sums, strict=True)):
        if len(set(values)) == 1:
            continue
        columns.append(column)
        value, count = Counter(values).most_common(1)[0]
        if 2 * count > len(values):
            odd |= {index for index, other in enumerate(values) if other != value}
        else:
            is_majority = False
            odd |= set(range(len(values)))
    return sorted(odd), columns, is_majority
