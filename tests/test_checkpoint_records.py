"""A checkpoint exists when its marker does; what is marked can be checked."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import (
    MARKER,
    Checkpoint,
    checkpoint_name,
    choose_checkpoint,
    complete_checkpoints,
    damage,
    mark_complete,
    read_checkpoint,
)
from orchestrator.errors import CheckpointError
from orchestrator.files import sha256_of
from orchestrator.run_directory import RunDirectory, create_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path, "a-run")


def written(run: RunDirectory, step: int, attempt: int = 1, files: int = 3) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Write a checkpoint's files as ranks do, without its marker."""
    path = run.checkpoint_path(checkpoint_name(step, attempt))
    path.mkdir()
    for number in range(files):
        (path / f"{number}.distcp").write_bytes(bytes([number]) * 100)
    return path, {p.name: {"bytes": 100, "sha256": sha256_of(p)} for p in path.iterdir()}


def marked(run: RunDirectory, step: int, attempt: int = 1) -> Checkpoint:
    path, files = written(run, step, attempt)
    return mark_complete(path, step=step, attempt=attempt, consumed_samples=step * 8, data_fingerprint="f", files=files)


def test_a_marked_checkpoint_is_read_back_as_it_was(run: RunDirectory) -> None:
    checkpoint = marked(run, 20)
    assert read_checkpoint(checkpoint.path) == checkpoint
    assert checkpoint.size_bytes == 300
    assert damage(checkpoint) == []


def test_names_sort_by_step_and_then_by_attempt() -> None:
    places = [(0, 1), (9, 1), (10, 1), (10, 2), (10, 11), (999_999, 3), (1_000_000, 1)]
    names = [checkpoint_name(step, attempt) for step, attempt in places]
    assert names == sorted(names)
    assert names[2] == "step_0000010.attempt_0001"


def test_a_checkpoint_without_a_marker_is_none(run: RunDirectory) -> None:
    marked(run, 10)
    path, _ = written(run, 20)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [10]
    with pytest.raises(CheckpointError, match="was never completed"):
        read_checkpoint(path)


@pytest.mark.parametrize("fault", ["missing", "short", "long"])
def test_a_checkpoint_with_a_file_that_is_not_whole_is_not_marked(run: RunDirectory, fault: str) -> None:
    path, files = written(run, 20)
    if fault == "missing":
        (path / "1.distcp").unlink()
    else:
        (path / "1.distcp").write_bytes(b"x" * (99 if fault == "short" else 101))
    with pytest.raises(CheckpointError, match=r"1\.distcp should have 100 bytes"):
        mark_complete(path, step=20, attempt=1, consumed_samples=1, data_fingerprint="f", files=files)
    assert not (path / MARKER).exists()


def test_of_one_step_the_newest_attempt_counts(run: RunDirectory) -> None:
    for step, attempt in ((10, 1), (20, 1), (20, 2), (15, 3)):
        marked(run, step, attempt)
    assert [(c.step, c.attempt) for c in complete_checkpoints(run)] == [(10, 1), (15, 3), (20, 2)]


def test_the_newest_or_a_named_step_is_chosen(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        marked(run, step)
    assert choose_checkpoint(run).step == 30
    assert choose_checkpoint(run, 20).step == 20
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 25; there are \[10, 20, 30\]"):
        choose_checkpoint(run, 25)


def test_a_run_without_a_checkpoint_says_so(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        choose_checkpoint(run)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(run.checkpoint_path("step_0000001.attempt_0001"))


def test_every_kind_of_damage_is_found_and_named(run: RunDirectory) -> None:
    checkpoint = marked(run, 20)
    (checkpoint.path / "0.distcp").unlink()
    (checkpoint.path / "1.distcp").write_bytes(b"short")
    flipped = bytearray((checkpoint.path / "2.distcp").read_bytes())
    flipped[50] ^= 1
    (checkpoint.path / "2.distcp").write_bytes(flipped)
    missing, short, changed = damage(checkpoint)
    assert missing.endswith("0.distcp is missing")
    assert "1.distcp should have 100 bytes, found 5" in short
    assert "2.distcp does not have the SHA-256" in changed


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_of_several_ranks_cover_every_file_once(run: RunDirectory, parts: int) -> None:
    checkpoint = marked(run, 20)
    for path in checkpoint.path.glob("*.distcp"):
        path.unlink()
    found = [problem for part in range(parts) for problem in damage(checkpoint, part, parts)]
    assert len(found) == len(set(found)) == 3
