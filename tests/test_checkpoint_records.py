"""A checkpoint exists when its marker does; what is marked can be checked; readers follow the newest start."""

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import (
    INDEX,
    MARKER,
    checkpoint_name,
    choose_checkpoint,
    complete_checkpoints,
    damage,
    foreign,
    lost_checkpoints,
    mark_complete,
    mark_damaged,
    merge_tensors,
    parse_name,
    part_record,
    read_checkpoint,
    read_index,
    read_parts,
    unusable_markers,
)
from orchestrator.errors import CheckpointError
from orchestrator.files import write_json
from orchestrator.run_directory import RunDirectory, create_run
from tests.checkpoint_records import RANKS, SHAPE, facts, write_checkpoint, write_parts


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path, "a-run")


def steps(run: RunDirectory) -> list[tuple[int, int]]:
    return [(checkpoint.step, checkpoint.attempt) for checkpoint in complete_checkpoints(run)]


def test_a_marked_checkpoint_is_read_back_as_it_was(run: RunDirectory) -> None:
    checkpoint = write_checkpoint(run, 20, validation_loss=2.5, ancestry=("step_0000010.attempt_0001",))
    assert read_checkpoint(checkpoint.path) == checkpoint
    assert checkpoint.facts.model == SHAPE
    assert set(checkpoint.files) == {"rank_0000.safetensors", "rank_0001.safetensors", INDEX}
    assert checkpoint.size_bytes == sum((checkpoint.path / name).stat().st_size for name in checkpoint.files)
    assert [piece.offset for piece in read_index(checkpoint)["weight/w"].pieces] == [(0, 0), (2, 0)]
    assert damage(checkpoint) == []


def test_names_sort_by_step_and_then_by_attempt() -> None:
    places = [(0, 1), (9, 1), (10, 1), (10, 2), (10, 11), (999_999, 3), (1_000_000, 1)]
    names = [checkpoint_name(step, attempt) for step, attempt in places]
    assert names == sorted(names)
    assert names[2] == "step_0000010.attempt_0001"
    assert [parse_name(name) for name in names] == places
    assert parse_name("random") is None and parse_name("/a/base") is None


def test_the_parts_of_a_checkpoint_are_there_only_when_every_rank_has_said_so(run: RunDirectory) -> None:
    path, parts = write_parts(run, 20)
    assert read_parts(path, RANKS) == parts
    (path / part_record(1)).unlink()
    assert read_parts(path, RANKS) is None


def test_a_checkpoint_without_a_marker_is_none(run: RunDirectory) -> None:
    write_checkpoint(run, 10)
    path, _ = write_parts(run, 20)
    assert steps(run) == [(10, 1)]
    with pytest.raises(CheckpointError, match="was never completed"):
        read_checkpoint(path)


@pytest.mark.parametrize("fault", ["missing", "short", "long"])
def test_a_checkpoint_with_a_file_that_is_not_whole_is_not_marked(run: RunDirectory, fault: str) -> None:
    path, parts = write_parts(run, 20)
    file = path / "rank_0001.safetensors"
    if fault == "missing":
        file.unlink()
    else:
        size = file.stat().st_size
        file.write_bytes(b"x" * (size - 1 if fault == "short" else size + 1))
    with pytest.raises(CheckpointError, match=r"rank_0001\.safetensors should have \d+ bytes"):
        mark_complete(path, facts(20), parts)
    assert not (path / MARKER).exists()


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_none_and_not_a_damaged_one(run: RunDirectory) -> None:
    kept, deleted = write_checkpoint(run, 10), write_checkpoint(run, 20)
    marker = deleted.path / MARKER
    content = marker.read_bytes()
    done = threading.Event()

    def delete_and_bring_back() -> None:
        for _ in range(3000):
            marker.unlink()
            (deleted.path / "new").write_bytes(content)
            (deleted.path / "new").rename(marker)
        done.set()

    deleter = threading.Thread(target=delete_and_bring_back)
    deleter.start()
    seen = set()
    while not done.is_set():
        seen.add(tuple(checkpoint.step for checkpoint in complete_checkpoints(run)))
    deleter.join()
    assert seen == {(kept.step,), (kept.step, deleted.step)}


def test_pieces_that_leave_a_gap_or_overlap_or_disagree_are_not_marked(run: RunDirectory) -> None:
    path, parts = write_parts(run, 20)
    with pytest.raises(CheckpointError, match="should have 24 numbers, the ranks wrote 12"):
        mark_complete(path, facts(20), parts[:1])
    with pytest.raises(CheckpointError, match="should have 24 numbers, the ranks wrote 36"):
        merge_tensors([*parts, parts[0]])
    other = dataclasses.replace(parts[1].tensors["weight/w"], shape=(4, 7))
    with pytest.raises(CheckpointError, match=r"weight/w is \(\(4, 6\), 'F32'\) for one rank"):
        merge_tensors([parts[0], dataclasses.replace(parts[1], tensors={"weight/w": other})])
    assert not (path / MARKER).exists()


def test_pieces_with_a_gap_as_large_as_their_overlap_are_not_whole(run: RunDirectory) -> None:
    _, (one, other) = write_parts(run, 20)
    (piece,) = one.tensors["weight/w"].pieces
    twice = dataclasses.replace(other.tensors["weight/w"], pieces=(dataclasses.replace(piece, file=other.file),))
    with pytest.raises(CheckpointError, match="numbers that two ranks wrote, and others that none did"):
        merge_tensors([one, dataclasses.replace(other, tensors={"weight/w": twice})])


def test_a_damaged_marker_costs_its_own_checkpoint_and_no_other(run: RunDirectory) -> None:
    write_checkpoint(run, 10)
    torn, edited, moved = write_checkpoint(run, 20), write_checkpoint(run, 30), write_checkpoint(run, 40)
    (torn.path / MARKER).write_text((torn.path / MARKER).read_text()[:200])
    text = (edited.path / MARKER).read_text()
    (edited.path / MARKER).write_text(text.replace('"consumed_samples": 240', '"consumed_samples": 248'))
    moved.path.rename(run.checkpoint_path(checkpoint_name(50, 1)))
    assert steps(run) == [(10, 1)]
    assert set(unusable_markers(run)) == {torn.name, edited.name, checkpoint_name(50, 1)}
    assert "is damaged: it is not what was written" in unusable_markers(run)[edited.name]


def test_a_run_that_ever_had_a_checkpoint_is_told_from_one_that_had_none(run: RunDirectory) -> None:
    assert lost_checkpoints(run) == ""
    checkpoint = write_checkpoint(run, 10, attempt=0)  # of a branch: no supervisor of this run has marked it
    assert lost_checkpoints(run) == ""
    mark_damaged(checkpoint.path, ["a flipped byte"], 1.0)
    assert f"the last of them {checkpoint.name}" in lost_checkpoints(run)
    shutil.rmtree(checkpoint.path)
    write_json(run.provenance, {"branched_from": {"run": "other", "checkpoint": "step_0000010.attempt_0003"}})
    assert "the last of them step_0000010.attempt_0003" in lost_checkpoints(run)


def test_of_one_step_the_newest_start_counts(run: RunDirectory) -> None:
    write_checkpoint(run, 10, 1)
    write_checkpoint(run, 20, 1)
    write_checkpoint(run, 20, 2, ancestry=(checkpoint_name(10, 1),))
    assert steps(run) == [(10, 1), (20, 2)]


def test_what_a_lost_start_saved_beyond_the_point_from_which_a_newer_one_went_on_is_left_out(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        write_checkpoint(run, step, 1)
    assert steps(run) == [(10, 1), (20, 1), (30, 1)]
    write_checkpoint(run, 25, 2, ancestry=(checkpoint_name(20, 1),))
    assert steps(run) == [(10, 1), (20, 1), (25, 2)]
    write_checkpoint(run, 40, 1)  # ranks of start 1 that live on, and a supervisor that does so too
    assert steps(run) == [(10, 1), (20, 1), (25, 2)]


def test_a_branch_goes_through_starts_whose_own_checkpoints_are_gone(run: RunDirectory) -> None:
    write_checkpoint(run, 10, 1)
    write_checkpoint(run, 30, 1)
    write_checkpoint(run, 40, 3, ancestry=(checkpoint_name(20, 2), checkpoint_name(10, 1)))
    assert steps(run) == [(10, 1), (40, 3)]


def test_a_damaged_checkpoint_is_left_out_until_its_mark_is_removed(run: RunDirectory) -> None:
    write_checkpoint(run, 10)
    newest = write_checkpoint(run, 20)
    mark_damaged(newest.path, ["a file is missing"], 1.0)
    assert steps(run) == [(10, 1)]
    (newest.path / "damaged.json").unlink()
    assert steps(run) == [(10, 1), (20, 1)]


def test_the_newest_or_a_named_step_is_chosen(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        write_checkpoint(run, step)
    assert choose_checkpoint(run).step == 30
    assert choose_checkpoint(run, 20).step == 20
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 25; there are \[10, 20, 30\]"):
        choose_checkpoint(run, 25)


def test_a_run_without_a_checkpoint_says_so(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        choose_checkpoint(run)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(run.checkpoint_path("step_0000001.attempt_0001"))


def test_a_marker_of_another_version_is_named(run: RunDirectory) -> None:
    checkpoint = write_checkpoint(run, 20)
    (checkpoint.path / MARKER).write_text('{"step": 20}')
    with pytest.raises(CheckpointError, match=r"complete\.json is not of this version"):
        read_checkpoint(checkpoint.path)


def test_every_kind_of_damage_is_found_and_named(run: RunDirectory) -> None:
    checkpoint = write_checkpoint(run, 20)
    (checkpoint.path / "rank_0000.safetensors").unlink()
    flipped = bytearray((checkpoint.path / "rank_0001.safetensors").read_bytes())
    flipped[-1] ^= 1
    (checkpoint.path / "rank_0001.safetensors").write_bytes(flipped)
    with (checkpoint.path / INDEX).open("a") as stream:
        stream.write(" ")
    missing, changed, longer = damage(checkpoint)
    assert missing.endswith("rank_0000.safetensors is missing")
    assert "rank_0001.safetensors does not have the SHA-256" in changed
    assert f"{INDEX} should have" in longer
    assert damage(checkpoint, ["rank_0001.safetensors"]) == [changed]


@pytest.mark.parametrize(
    ("different", "problem"),
    [
        ({"model": dataclasses.replace(SHAPE, num_layers=4)}, "model.num_layers is 4 in the checkpoint and 2"),
        ({"tokenizer_sha256": "other"}, "made with tokenizer other, the run's with tokenizer"),
        ({"data_fingerprint": "other"}, "put the data sets back as they were"),
    ],
)
def test_a_foreign_checkpoint_is_told_by_its_facts(different: dict[str, Any], problem: str) -> None:
    assert foreign(facts(1), SHAPE, "tokenizer", "data") == []
    (found,) = foreign(facts(1, **different), SHAPE, "tokenizer", "data")
    assert problem in found
