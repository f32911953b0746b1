"""Which checkpoints may go: a table, and what never goes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from orchestrator.checkpoints import Checkpoint, checkpoint_name
from orchestrator.retention import UNTOUCHABLE, expendable, kept_at_most
from orchestrator.settings import CheckpointSettings
from tests.checkpoint_records import facts


def checkpoint(step: int, attempt: int = 1, loss: float | None = None, ancestry: tuple[str, ...] = ()) -> Checkpoint:
    own = facts(step, attempt, validation_loss=loss, ancestry=ancestry)
    return Checkpoint(path=Path(checkpoint_name(step, attempt)), facts=own, files={})


def kept(marked: list[Checkpoint], settings: CheckpointSettings, *more: str) -> list[int]:
    """Return the steps that stay of complete checkpoints, and of further folders."""
    gone = expendable([c.name for c in marked] + list(more), marked, settings, attempt=1)
    return [c.step for c in marked if c.name not in gone]


LINE = [checkpoint(step) for step in range(0, 70, 10)]
LOSSES = {0: 9.0, 10: 2.0, 20: 5.0, 30: 1.5, 40: 6.0, 50: 7.0}
MEASURED = [checkpoint(step, loss=loss) for step, loss in LOSSES.items()]


@pytest.mark.parametrize(
    ("marked", "settings", "steps"),
    [
        (LINE, CheckpointSettings(keep_last=3, keep_best=0), [40, 50, 60]),
        (LINE, CheckpointSettings(keep_last=1, keep_best=0), [50, 60]),  # never the newest two
        (LINE, CheckpointSettings(keep_last=2, keep_every_steps=20, keep_best=0), [0, 20, 40, 50, 60]),
        (LINE, CheckpointSettings(keep_last=99), [0, 10, 20, 30, 40, 50, 60]),
        (MEASURED, CheckpointSettings(keep_last=2, keep_best=1), [30, 40, 50]),
        (MEASURED, CheckpointSettings(keep_last=2, keep_best=2), [10, 30, 40, 50]),
        (LINE[:1], CheckpointSettings(keep_last=1), [0]),
    ],
)
def test_the_settings_say_what_stays(marked: list[Checkpoint], settings: CheckpointSettings, steps: list[int]) -> None:
    assert kept(marked, settings) == steps


def test_an_abandoned_branch_goes_once_the_surviving_one_has_two() -> None:
    settings = CheckpointSettings(keep_last=5)
    first = [checkpoint(10, 1), checkpoint(20, 1), checkpoint(30, 1)]
    back = checkpoint(25, 2, ancestry=(checkpoint_name(10, 1),))
    assert kept([*first, back], settings) == [10, 25]
    alone = checkpoint(5, 2)  # began from the base again
    assert kept([*first, alone], settings) == [10, 20, 30, 5]  # nothing newer is there twice


def test_folders_that_were_never_completed_go_but_not_what_is_being_written() -> None:
    line = [checkpoint(step, 2) for step in range(0, 70, 10)]
    names = [checkpoint_name(step, attempt) for step, attempt in ((70, 2), (45, 1), (55, 1), (45, 3))]
    gone = expendable([c.name for c in line] + [*names, "a-note"], line, CheckpointSettings(keep_last=99), attempt=2)
    # 55 stays until two are newer than it; attempt 3 is somebody who has taken the run over.
    assert gone == {checkpoint_name(45, 1): "never completed, or damaged"}


@given(
    steps=some.sets(some.integers(0, 200), min_size=1, max_size=12),
    settings=some.builds(
        CheckpointSettings,
        keep_last=some.integers(1, 6),
        keep_every_steps=some.integers(0, 50),
        keep_best=some.integers(0, 3),
    ),
)
def test_the_newest_two_never_go_and_every_nth_stays(steps: set[int], settings: CheckpointSettings) -> None:
    marked = [checkpoint(step, loss=float(step % 7)) for step in sorted(steps)]
    stays = kept(marked, settings)
    assert stays[-UNTOUCHABLE:] == sorted(steps)[-UNTOUCHABLE:]
    if settings.keep_every_steps:
        assert {step for step in steps if step % settings.keep_every_steps == 0} <= set(stays)


@given(
    total=some.integers(1, 300),
    settings=some.builds(
        CheckpointSettings,
        interval_steps=some.integers(1, 40),
        keep_last=some.integers(1, 5),
        keep_every_steps=some.sampled_from([0, 10, 25]),
        keep_best=some.integers(0, 2),
    ),
)
def test_the_forecast_is_never_below_what_lies_on_the_disk(total: int, settings: CheckpointSettings) -> None:
    saves = sorted({0, *range(settings.interval_steps, total + 1, settings.interval_steps), total})
    there: list[Checkpoint] = []
    most = 0
    for step in saves:
        there.append(checkpoint(step, loss=float(step * 37 % 11)))
        most = max(most, len(there))  # the old ones go after the new one is complete
        gone = expendable([c.name for c in there], there, settings, attempt=1)
        there = [c for c in there if c.name not in gone]
    assert most <= kept_at_most(total, settings)
