"""Shards that changed, and their copies on a node: what is found before the first step, and what a kill leaves."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_solar.shard_files import VERIFIED_BYTES, ShardFile, check_shards
from megatron_solar.staging import LOCK, copy_of, missing_of, stage
from orchestrator import exit_codes
from orchestrator.errors import DataError, DiskFullError
from orchestrator.events import DataWaitEvent, StageEvent
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm import ranks
from orchestrator.tokenize.manifest import read_manifest
from tests import reading_ranks
from tests.conftest import REPOSITORY, Trainer, events_of, losses

STEPS = 6


def nothing() -> None:
    """Take the place of the hang watch."""


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def files_in(folder: Path, *contents: bytes) -> list[ShardFile]:
    """Write the files of shards, and say of them what a manifest would."""
    folder.mkdir()
    found = []
    for number, content in enumerate(contents):
        for ending, part in ((".bin", content), (".idx", content[:3])):
            file = ShardFile(
                prefix=str(folder / f"shard_{number:05}"), ending=ending, data_set="f" * 64,
                shard=f"shard_{number:05}", bytes=len(part), sha256=hashlib.sha256(part).hexdigest(),
            )  # fmt: skip
            file.path.write_bytes(part)
            found.append(file)
    return found


# Shards as they lie


def test_a_shard_that_was_changed_is_named_whatever_its_size(tmp_path: Path) -> None:
    files = files_in(tmp_path / "data", b"first shard", b"second shard")
    check_shards(files, tmp_path / "shards.json", nothing)
    flip_byte(files[2].path, 4)
    with pytest.raises(DataError, match=r"shard_00001\.bin, changed at .*, should have SHA-256 \w+, found \w+$"):
        check_shards(files, tmp_path / "shards.json", nothing)
    flip_byte(files[2].path, 4)
    check_shards(files, tmp_path / "shards.json", nothing)


def test_what_was_compared_is_not_read_again_until_its_time_of_change_is_another(tmp_path: Path) -> None:
    read = []
    files = files_in(tmp_path / "data", b"first shard", b"second shard")
    for expected, touch in ((4, None), (0, None), (1, files[1].path), (0, None)):
        if touch is not None:
            os.utime(touch, (1, 1))
        read.clear()
        check_shards(files, tmp_path / "shards.json", lambda: read.append(1))
        assert len(read) == expected


def test_large_shards_are_read_whole_only_when_they_were_changed(tmp_path: Path) -> None:
    large = ShardFile(
        prefix=str(tmp_path / "large"), ending=".bin", data_set="f", shard="large", bytes=VERIFIED_BYTES + 1,
        sha256=hashlib.sha256(b"").hexdigest(),
    )  # fmt: skip
    large.path.write_bytes(b"")  # its size is compared when manifests are read, not here
    read = []
    check_shards([large], tmp_path / "shards.json", lambda: read.append(1))
    assert not json.loads((tmp_path / "shards.json").read_text())["files"][str(large.path)]["is_verified"]
    large.path.write_bytes(b"other")
    with pytest.raises(DataError, match="large"):
        check_shards([large], tmp_path / "shards.json", lambda: read.append(1))
    assert len(read) == 1


@pytest.fixture
def own_corpus(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the training data, to be harmed."""
    return Path(shutil.copytree(corpus / "train", tmp_path / "train"))


def ended_with(trainer: Trainer, run: RunDirectory, plan: TrainingPlan) -> tuple[set[int], str]:
    """Return the exit codes of an attempt, and the log of its rank 0."""
    attempt, processes = trainer.start(run, plan)
    codes = trainer.wait(run, attempt, processes)
    return set(codes), attempt.rank_log(0).read_text()


def test_a_run_does_not_begin_with_a_shard_that_is_changed_or_truncated(trainer: Trainer, own_corpus: Path) -> None:
    shard = own_corpus / f"{read_manifest(own_corpus).shards[0].name}.bin"
    run, plan = trainer.make_run(f"data.train={own_corpus}", "data.validation=[]", steps=1)
    flip_byte(shard, 1000)
    codes, log = ended_with(trainer, run, plan)
    assert codes == {exit_codes.BAD_DATA}
    assert f"{shard}, changed at" in log and "should have SHA-256" in log
    flip_byte(shard, 1000)
    size = shard.stat().st_size
    os.truncate(shard, size - 2)
    codes, log = ended_with(trainer, run, plan)
    assert codes == {exit_codes.BAD_DATA}
    assert f"{shard.name} should have {size} bytes, found {size - 2}" in log


# Copies


def test_copies_are_whole_and_made_once(tmp_path: Path) -> None:
    files = files_in(tmp_path / "data", b"first shard", b"second shard")
    first = stage(files, tmp_path / "node", nothing)
    assert first.copied_bytes == sum(file.bytes for file in files)
    assert {copy_of(file, tmp_path / "node").read_bytes() for file in files} == {
        file.path.read_bytes() for file in files
    }
    assert first.prefixes == {file.prefix: str(tmp_path / "node" / ("f" * 64) / file.shard) for file in files}
    copy_of(files[2], tmp_path / "node").unlink()
    second = stage(files, tmp_path / "node", nothing)
    assert (second.copied_bytes, second.prefixes) == (files[2].bytes, first.prefixes)


def test_a_shard_that_is_not_what_its_manifest_says_is_not_copied_and_named(tmp_path: Path) -> None:
    files = files_in(tmp_path / "data", b"first shard", b"second shard")
    flip_byte(files[2].path, 4)
    with pytest.raises(DataError, match=r"shard_00001\.bin should have SHA-256 .* as its data set's manifest says"):
        stage(files, tmp_path / "node", nothing)
    assert missing_of(files, tmp_path / "node") == files[2:]
    assert sorted(path.name for path in (tmp_path / "node").rglob("*") if path.is_file()) == [
        LOCK, "shard_00000.bin", "shard_00000.idx",
    ]  # fmt: skip


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_copied(
    tmp_path: Path, mount_disk: Callable[..., Path]
) -> None:
    files = files_in(tmp_path / "data", bytes(300_000), bytes(900_000))
    disk = mount_disk(1)
    with pytest.raises(DiskFullError, match=r"needs room for 1\.2 MB in 4 files more, .* are free; remove copies"):
        stage(files, disk, nothing)
    assert [path.name for path in disk.iterdir()] == [LOCK]


STAGES = """
import json, sys
from pathlib import Path
from megatron_solar.shard_files import ShardFile
from megatron_solar.staging import stage
files = [ShardFile(**file) for file in json.loads(sys.argv[1])]
staged = stage(files, Path(sys.argv[2]), lambda: print("alive", flush=True))
print("copied", staged.copied_bytes, flush=True)
"""


def start_staging(files: list[ShardFile], folder: Path) -> "subprocess.Popen[str]":
    described = json.dumps([vars(file) for file in files])
    return subprocess.Popen(
        [sys.executable, "-c", STAGES, described, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        time.sleep(0.02)


def test_a_kill_leaves_no_half_copy_and_a_waiting_process_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    content = os.urandom(9 << 20)
    files = files_in(tmp_path / "data", b"first shard", content)
    node = tmp_path / "node"
    large = files[2]
    large.path.unlink()
    os.mkfifo(large.path)  # a source that gives its first part and then no more
    copier = start_staging(files, node)
    try:
        with large.path.open("wb") as source:
            source.write(content[: 5 << 20])
            source.flush()
            partial = copy_of(large, node).with_name(f".{large.path.name}.partial")
            wait_until("half a copy", lambda: partial.exists() and partial.stat().st_size > 0)
            waiting = start_staging(files, node)
            assert waiting.stdout is not None
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=3)
            copier.send_signal(signal.SIGSTOP)  # so that it does not see the end of the source
            large.path.unlink()
            large.path.write_bytes(content)
            assert missing_of(files, node) == files[2:]
            copier.kill()
        said = waiting.communicate(timeout=60)[0].splitlines()
    finally:
        copier.kill()
        copier.communicate()
    assert said[-1] == f"copied {sum(file.bytes for file in files[2:])}"
    assert copy_of(large, node).read_bytes() == content
    assert not partial.exists()


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ranks be those of `tests/reading_ranks.py`."""
    monkeypatch.setattr(ranks, "WORKER", reading_ranks.__name__)


@pytest.mark.usefixtures("reading")
def test_ranks_read_the_copies_and_a_wait_for_samples_is_told(
    trainer: Trainer, own_corpus: Path, tmp_path: Path
) -> None:
    two = ("cluster.ranks_per_node=2", f"data.train={own_corpus}")
    plain, plan = trainer.make_run(*two, steps=STEPS)
    whole = losses(trainer.train(plain, plan))
    node = tmp_path / "node"
    run, plan = trainer.make_run(*two, f"data.stage_to={node}", "data.wait_alarm_share=0.3", steps=STEPS)
    (run.path / reading_ranks.SLOW).write_text(json.dumps({"rank": 1, "steps": [1, 3, 5], "seconds": 3}))
    first = trainer.train(run, plan)
    assert losses(first) == whole
    (staged,) = [event for event in events_of(first) if isinstance(event, StageEvent)]
    assert (staged.files, staged.folder) == (4, str(node))
    waits = [event for event in events_of(first) if isinstance(event, DataWaitEvent)]
    # Step 1 opens files and is not counted; a busy machine may have others of the rest wait as well.
    assert waits[0].first_step > 1 and waits[0].first_step <= 3 and waits[-1].step >= 5
    assert sum(event.steps for event in waits) >= 2
    assert sum(event.waiting_seconds for event in waits) >= 6
    assert all(event.waiting_seconds <= event.step_seconds for event in waits)

    shard = own_corpus / f"{read_manifest(own_corpus).shards[0].name}.bin"
    flip_byte(shard, 1000)  # which nobody reads any more
    again, plan = trainer.make_run(*two, f"data.stage_to={node}", steps=STEPS)
    second = trainer.train(again, plan)
    assert losses(second) == whole
    (staged,) = [event for event in events_of(second) if isinstance(event, StageEvent)]
    assert staged.copied_bytes == 0
    next(path for path in node.rglob("*.bin") if path.stat().st_size == shard.stat().st_size).unlink()
    codes, log = ended_with(trainer, *trainer.make_run(two[1], f"data.stage_to={node}", steps=STEPS))
    assert codes == {exit_codes.BAD_DATA}
    assert f"{shard} should have SHA-256" in log
