"""Who is slow: ranks that burn a processor beside others that wait, and what is said of them."""

import json
import sys
import threading
import time

import pytest

from megatron_solar.rank_times import _HostClock
from megatron_solar.stacks import is_waiting
from orchestrator.doubts import SLOW_SAMPLES, slowest_rank
from orchestrator.events import Event, RankTimesEvent
from orchestrator.slurm import ranks
from orchestrator.status import read_status
from tests import numeric_faults
from tests.conftest import Trainer, events_of


def sample(step: int, rank: int, seconds: float, median: float = 1.0) -> RankTimesEvent:
    return RankTimesEvent(
        time=float(step), step=step, step_seconds=2.0, median_seconds=median, slowest_seconds=seconds,
        slowest_rank=rank, slowest_host=f"n{rank}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "is_warned"),
    [
        ([(1, 1.5)] * SLOW_SAMPLES, True),
        ([(0, 1.0), *[(1, 1.5)] * SLOW_SAMPLES], True),
        ([(1, 1.5)] * (SLOW_SAMPLES - 1), False),
        ([*[(1, 1.5)] * 9, (1, 1.1)], False),
        ([(1, 1.5), (2, 1.5), (1, 1.5), (1, 1.5)], False),
        ([(1, 1.1)] * 9, False),
    ],
)
def test_a_rank_is_called_slow_when_the_same_one_is_beyond_the_median_several_times_in_a_row(
    samples: list[tuple[int, float]], is_warned: bool
) -> None:
    events: list[Event] = [sample(step, rank, seconds) for step, (rank, seconds) in enumerate(samples)]
    line, warning = slowest_rank(events)
    assert f"rank {samples[-1][0]} on n{samples[-1][0]}" in line
    assert bool(warning) == is_warned
    assert slowest_rank([]) == ("", "")


@pytest.mark.parametrize(
    "layout",
    [
        ("layout.global_batch_size=4", "tokens=768"),
        ("layout.pipeline_parallel=2", "layout.global_batch_size=2", "tokens=384"),
    ],
)
def test_a_rank_that_computes_longer_than_the_others_is_named_with_its_node(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, layout: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ranks, "WORKER", numeric_faults.__name__)
    burnt = 0.3  # seconds of a processor in each of two micro-batches, many times what a step takes of it otherwise
    run, plan = trainer.make_run("cluster.ranks_per_node=2", *layout, "numerics.rank_time_steps=2")
    (run.path / numeric_faults.FILE).write_text(json.dumps([{"kind": "slow", "rank": 0, "seconds": burnt}]))
    attempt = trainer.train(run, plan)
    found = [event for event in events_of(attempt) if isinstance(event, RankTimesEvent)]
    assert [event.step for event in found] == [2, 4, 6]  # as many as make a warning
    assert {event.slowest_rank for event in found} == {0}
    assert all(2 * burnt <= event.slowest_seconds <= event.step_seconds for event in found)
    warnings = read_status(run).warnings
    assert any("rank 0 on" in warning and "slowest" in warning for warning in warnings)


def test_a_rank_that_hangs_in_a_measured_wait_is_still_one_that_waits_for_others() -> None:
    lock = threading.Lock()
    lock.acquire()
    wait = _HostClock().wrapped(lock.acquire)  # native, as the wait for a collective is
    thread = threading.Thread(target=lambda: wait())
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not is_waiting(sys._current_frames()[thread.ident or 0]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        lock.release()
        thread.join()
