"""What our training loop adds to megatron-core's schedule and optimizer step, with one rank and with two.

    python benchmarks/loop_overhead.py [--ranks 1 2] [--pairs 300] [--steps 1] [--json]

`megatron_solar/train.py` trains a model of 4 M parameters on CPU cores, one a rank: events on, profiler off, every
guard at its default. After each few of its steps the same processes do as many steps of the bare parts on the same
model and optimizer: megatron-core's schedule on samples that were read before, and `optimizer.step()`; no samples are
read, no loss is looked at, nothing is told. Each block of ours is compared with the mean of the bare blocks before
and after it. Printed are medians of the blocks, the median of the ratios with its bootstrap interval of 95 %, and
what is done only every so many steps, spread over these: of the clock and of CPU seconds, which other work on the
machine touches less. With the defaults, on two idle cores, it takes about 12 minutes: single
steps in turn, since a shared machine is 10 % faster or slower from one second to the next, and by more later on.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.hang_watch import HangWatch, Phase
from orchestrator.config import compose
from orchestrator.demo import find_vocabulary
from orchestrator.plan import TrainingPlan, make_plan, write_plan
from orchestrator.run_directory import RunDirectory, create_run
from orchestrator.tokenize.stage import tokenize_corpus

WANTED = 0.02
"""Most that the loop may add, as a share of the bare parts."""
WARM_UP = 2
"""First pairs that are not counted: memory is taken for the first time, the first checkpoint is written."""
RESAMPLES = 10_000
ROUNDS = 7
"""How often each of the parts that are not in every step is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Ours beside bare, seconds of a step."""

    ours: float
    bare: float
    more: float
    """Median of the ratios, less one."""
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured with so many ranks."""

    ranks: int
    parameters: int
    pairs: int
    clock: Compared
    """Of the slowest rank."""
    cpu: Compared
    """Of all threads of all ranks."""
    now_and_then: dict[str, tuple[float, int]]
    """What is not done in every step: seconds, and every how many steps."""

    @property
    def more(self) -> float:
        """What the loop adds by the clock, with what is not done in every step, as a share of the bare parts."""
        rare = sum(seconds / every for seconds, every in self.now_and_then.values())
        return self.clock.more + rare / self.clock.bare


Times = tuple[float, float]
"""Seconds by the clock, and of all threads of this process."""


def times() -> Times:
    """Return both clocks."""
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    """Return what both clocks have gone on."""
    clock, cpu = times()
    return clock - began[0], cpu - began[1]


class Interleaved(HangWatch):
    """The watch of a rank that, told that a block of steps is done, has as many done of the bare parts."""

    def begin(self, steps: int, bare: Callable[[int], Times]) -> None:
        """Interleave blocks of so many steps.

        Args:
            bare: does a block after so many steps of the loop, and says how long it took.
        """
        self._steps, self._bare = steps, bare
        self.ours: list[Times] = []
        self.bare: list[Times] = []
        self._began: Times | None = None

    def enter(self, phase: Phase, step: int | None) -> None:
        """Take the loop's word, and its turn where a block ends."""
        super().enter(phase, step)
        if phase == Phase.STEP and step is not None and step % self._steps == 0:
            if self._began is not None:
                self.ours.append(since(self._began))
            self.bare.append(self._bare(step))
            self._began = times()


def plan_of(folder: Path, corpus: Path, ranks: int, options: argparse.Namespace) -> TrainingPlan:
    """Return the plan of a run of the loop."""
    # The first block begins once `steps` are done; nothing falls on a counted step but what is in every one.
    total = options.steps * (options.pairs + WARM_UP + 2)
    return make_plan(
        compose(
            "demo-base",
            [
                f"name=ranks-{ranks}", f"paths.runs={folder}", f"data.train={corpus}", "data.validation=[]",
                f"model.hidden_size={options.hidden}", f"model.ffn_hidden_size={3 * options.hidden}",
                "model.num_attention_heads=4", "model.num_query_groups=2", f"cluster.ranks_per_node={ranks}",
                "layout.micro_batch_size=2", "layout.global_batch_size=8", f"training.tokens={total * 8 * 128}",
                "checkpoint.interval_steps=1000000", "training.validation_interval_steps=1000000",
            ],
        )
    )  # fmt: skip


def rank_main(rank: int, run_path: str, plan: TrainingPlan, options: argparse.Namespace) -> None:
    """Run one rank, and have rank 0 write what all found."""
    warnings.simplefilter("ignore")
    ranks = plan.layout.world_size
    torch.set_num_threads(1)
    run = RunDirectory(Path(run_path))
    attempt = run.attempt(1)
    with cuda_calls_on_cpu():
        from megatron_solar import run_state, train

        store = torch.distributed.FileStore(str(run.path / "store"), ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        watch = Interleaved(run, attempt, rank, plan.settings.patience, began=time.monotonic())
        state: dict[str, Any] = {}

        @functools.wraps(run_state.build_or_load)
        def build_or_load(run: RunDirectory, plan: TrainingPlan, samples: Any, tell: Any) -> Any:
            replica, loaded = run_state.build_or_load(run, plan, samples, tell)
            state.update(replica=replica, samples=samples, tell=tell)
            return replica, loaded

        train.build_or_load = build_or_load
        watch.begin(options.steps, lambda step: bare_block(plan, state, step, options.steps))
        watch.start()
        train.train(run, attempt, plan, worker_started=time.time(), watch=watch)
        now_and_then = measure_now_and_then(plan, state)
        every: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(every, (watch.ours, watch.bare, now_and_then))
        if rank == 0:
            (run.path / "found.json").write_text(json.dumps(every))
    os._exit(0)


def bare_block(plan: TrainingPlan, state: dict[str, Any], step: int, steps: int) -> Times:
    """Do as many steps as the loop did just before, on the same samples, and say how long they took."""
    samples, first = state["samples"], step - steps
    batches = [
        samples.micro_batches(
            samples.train, plan.consumed_samples(number), plan.layout, plan.num_microbatches(number + 1), "cpu"
        )
        for number in range(first, step)
    ]
    with without_evidence(state["replica"].chunks):
        torch.distributed.barrier()
        began = times()
        for batch in batches:
            bare_step(plan, state["replica"], batch)
        taken = since(began)
        torch.distributed.barrier()
    return taken


def bare_step(plan: TrainingPlan, replica: Any, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Do what a step cannot do without."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_solar.one_step import forward_step

    for chunk in replica.chunks:
        chunk.zero_grad_buffer()
    replica.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=replica.chunks[0],
        num_microbatches=len(batches),
        seq_length=plan.settings.data.sequence_length,
        micro_batch_size=plan.layout.micro_batch_size,
        forward_only=False,
    )
    replica.optimizer.step()


@contextlib.contextmanager
def without_evidence(chunks: Sequence[Any]) -> Iterator[None]:
    """Have megatron's own start of a reduction, which the loop's guard stands before."""
    watched = [(group, vars(group).pop("start_grad_sync")) for chunk in chunks for group in chunk.bucket_groups]
    try:
        yield
    finally:
        for group, start in watched:
            group.start_grad_sync = start


def measure_now_and_then(plan: TrainingPlan, state: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Return what the parts cost that are not in every step, beyond the step's own time."""
    from megatron_solar.rank_times import RankTimes, hosts_of_ranks
    from megatron_solar.replica_check import ReplicaCheck

    if plan.layout.world_size == 1:
        return {}
    numerics, replica, hosts = plan.settings.numerics, state["replica"], hosts_of_ranks()
    check = ReplicaCheck(plan, replica, hosts, state["tell"])
    rank_times = RankTimes(plan, hosts, state["tell"])
    batches = state["samples"].micro_batches(
        state["samples"].train, 0, plan.layout, plan.num_microbatches(plan.total_steps), "cpu"
    )

    def timed_step(step: int) -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        with rank_times.measuring(step):
            bare_step(plan, replica, batches)
        return time.perf_counter() - began

    checks, measured = [], []
    for _ in range(ROUNDS):
        torch.distributed.barrier()
        began = time.perf_counter()
        check(numerics.replica_check_steps, is_saving=True)
        checks.append(time.perf_counter() - began)
        measured.append(timed_step(numerics.rank_time_steps) - timed_step(numerics.rank_time_steps + 1))
    return {
        "replica check": (statistics.median(checks), numerics.replica_check_steps),
        "rank times": (max(0.0, statistics.median(measured)), numerics.rank_time_steps),
    }


def found_of(plan: TrainingPlan, every: Sequence[Any], steps: int) -> Found:
    """Return what all ranks measured: the slowest rank's seconds of each block, and the CPU seconds of all."""
    blocks = [[list(zip(*of_ranks, strict=True)) for of_ranks in zip(*kind, strict=True)]
              for kind in zip(*((of_rank[0], of_rank[1]) for of_rank in every), strict=True)]  # fmt: skip
    ours, bare = blocks
    clock = compared([max(clocks) for clocks, _ in ours], [max(clocks) for clocks, _ in bare], steps)
    cpu = compared([sum(seconds) for _, seconds in ours], [sum(seconds) for _, seconds in bare], steps)
    return Found(
        ranks=plan.layout.world_size,
        parameters=plan.parameters,
        pairs=len(ours) - WARM_UP,
        clock=clock,
        cpu=cpu,
        now_and_then={
            name: (max(of_rank[2][name][0] for of_rank in every), every[0][2][name][1]) for name in every[0][2]
        },
    )


def compared(ours: Sequence[float], bare: Sequence[float], steps: int) -> Compared:
    """Return blocks of ours beside those of the bare parts: one stands before each of ours, and one after the last."""
    around = [(before + after) / 2 for before, after in itertools.pairwise(bare)]
    ratios = [mine / theirs - 1 for mine, theirs in zip(ours, around, strict=True)][WARM_UP:]
    low, high = interval(ratios)
    return Compared(
        ours=statistics.median(ours[WARM_UP:]) / steps,
        bare=statistics.median(bare[WARM_UP:]) / steps,
        more=statistics.median(ratios),
        low=low,
        high=high,
    )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of 95 % of a median."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def measure(folder: Path, corpus: Path, ranks: int, options: argparse.Namespace) -> Found:
    """Run the loop with so many ranks."""
    plan = plan_of(folder, corpus, ranks, options)
    run = create_run(folder, plan.settings.name)
    write_plan(run.launched_plan, plan)
    run.new_attempt()
    torch.multiprocessing.spawn(rank_main, (str(run.path), plan, options), nprocs=ranks)
    return found_of(plan, json.loads((run.path / "found.json").read_text()), options.steps)


def report(every: Sequence[Found]) -> None:
    """Print a table."""
    print(f"{'ranks':>5} {'seconds of':>11} {'bare':>9} {'ours':>9} {'more':>8} {'95 %':>18}")
    for found in every:
        for name, part in (("clock", found.clock), ("CPU", found.cpu)):
            between = f"{100 * part.low:+.2f} to {100 * part.high:+.2f} %"
            print(f"{found.ranks:>5} {name:>11} {part.bare:>9.4f} {part.ours:>9.4f} {100 * part.more:>+6.2f} % "
                  f"{between:>18}")  # fmt: skip
    for found in every:
        for name, (seconds, steps) in found.now_and_then.items():
            share = 100 * seconds / steps / found.clock.bare
            print(f"{name} of {found.ranks} ranks: {1000 * seconds:.1f} ms every {steps} steps, {share:+.3f} %")
        print(f"{found.ranks} ranks, all of it: {100 * found.more:+.2f} %, wanted at most +{100 * WANTED:.0f} %; "
              f"{found.pairs} pairs, {found.parameters:,} parameters")  # fmt: skip


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1, help="of a block")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "train"
        tokenize_corpus([Path(os.__file__).parent / "asyncio"], find_vocabulary(), corpus, progress=False)
        every = [measure(Path(folder), corpus, ranks, options) for ranks in options.ranks]
    if options.json:
        print(json.dumps([dataclasses.asdict(found) | {"more": found.more} for found in every]))
    else:
        report(every)


if __name__ == "__main__":
    main()
