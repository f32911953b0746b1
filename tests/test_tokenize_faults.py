"""A tokenization that is killed, out of room, changed or begun twice: nothing is lost, nothing is silently wrong."""

import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import ConfigError, DataError, DiskFullError, OrchestrateError
from orchestrator.tokenize.engine import EncodedBlock, EngineError
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest
from orchestrator.tokenize.publish import complete
from orchestrator.tokenize.stage import tokenize_corpus
from orchestrator.tokenize.work_folder import WorkFolder
from orchestrator.tokenize.workers import work_on
from tests.conftest import REPOSITORY
from tests.tokenize_corpora import SETTINGS, TOKENIZER, contents, undisturbed, wait_within, write_lines

DEADLINE_SECONDS = 60.0
wait_until = functools.partial(wait_within, DEADLINE_SECONDS)


class StoppedError(Exception):
    """What a test raises in the middle of the work."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus` and what one process, undisturbed, makes of it."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def tokenize(inputs: Sequence[Path], output: Path, **settings: Any) -> DatasetManifest:
    return tokenize_corpus(inputs, TOKENIZER, output, **{**SETTINGS, "workers": 1, **settings})


def stop_after(blocks: int, units: Sequence[int] | None = None) -> Callable[[WorkFolder, Callable[[], None]], None]:
    """Return who works on units in this process, committing after each block, and stops after some."""
    left = blocks

    def look() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StoppedError

    def carry_out(folder: WorkFolder, _: Callable[[], None]) -> None:
        wanted = range(folder.read_plan().units) if units is None else units
        work_on(folder.path, wanted, 1, 0.0, block_bytes=SETTINGS["block_bytes"], look=look)
        raise StoppedError

    return carry_out


def begun(
    inputs: Sequence[Path], output: Path, blocks: int, units: Sequence[int] | None = None, **settings: Any
) -> None:
    """Leave a tokenization after some blocks."""
    with pytest.raises(StoppedError):
        tokenize(inputs, output, carry_out=stop_after(blocks, units), **settings)


def start(
    inputs: Sequence[Path], output: Path, *, workers: int, before: str = "", **settings: object
) -> "subprocess.Popen[str]":
    """Start a tokenization in a process of its own; exit code 0, or 1 with the error on stdout."""
    call = f"tokenize_corpus({[*inputs]!r}, TOKENIZER, {output!r}, workers={workers}, **{ {**SETTINGS, **settings}!r})"
    program = (
        "import resource\nfrom pathlib import PosixPath\nfrom orchestrator.errors import OrchestrateError\n"
        "from orchestrator.tokenize.stage import tokenize_corpus\nfrom tests.tokenize_corpora import TOKENIZER\n"
        f"{before}\ntry:\n    {call}\n"
        "except OrchestrateError as error:\n    print(type(error).__name__, error)\n    raise SystemExit(1)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def endless_corpus(folder: Path) -> Path:
    """Return text on which two workers are busy for longer than any test waits."""
    folder.mkdir()
    line = json.dumps({"text": "a line of text, again and again. " * 30}) + "\n"
    for number in range(2):
        with (folder / f"{number}.jsonl").open("w") as stream:
            for _ in range(40):
                stream.write(line * 1000)
    return folder


def workers_of(output: Path) -> list[psutil.Process]:
    """Return the living workers of an output."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{output}.partial" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def read_records(output: Path) -> int:
    """Return the records that all units of a work folder have read."""
    folder = WorkFolder(output.with_name(f"{output.name}.partial"))
    return sum(folder.read_record(unit).records for unit in range(folder.read_plan().units))


# --- The same bytes


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, expected: Path, workers: int) -> None:
    tokenize([expected / "corpus"], tmp_path / "expected", workers=workers)
    assert contents(tmp_path, "expected") == contents(expected, "expected")


@pytest.mark.fault
def test_fifty_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(expected: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "tokenize_kills.py"), str(expected), "50"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "data sets are equal" in result.stdout


def test_work_that_is_left_after_any_block_is_gone_on_with_where_it_was(tmp_path: Path, expected: Path) -> None:
    inputs = [expected / "corpus"]
    for blocks in range(0, 40, 7):
        begun(inputs, tmp_path / "expected", blocks)
        folder = WorkFolder(tmp_path / "expected.partial")
        assert sum(folder.read_record(unit).records for unit in range(folder.read_plan().units)) >= blocks
    tokenize(inputs, tmp_path / "expected", block_bytes=7_000)
    assert contents(tmp_path, "expected") == contents(expected, "expected")


def test_the_tasks_of_an_array_share_the_units_and_the_command_publishes_them(tmp_path: Path, expected: Path) -> None:
    def carry_out(folder: WorkFolder, look: Callable[[], None]) -> None:
        command = [sys.executable, "-m", "orchestrator.tokenize.worker", str(folder.path), "--tasks", "2"]
        tasks = [subprocess.Popen([*command, "--task", str(task), "--workers", str(task + 1)]) for task in range(2)]
        assert [task.wait(DEADLINE_SECONDS) for task in tasks] == [0, 0]
        look()

    tokenize([expected / "corpus"], tmp_path / "expected", carry_out=carry_out)
    assert contents(tmp_path, "expected") == contents(expected, "expected")


def test_megatron_reads_every_shard_of_many_units(expected: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        # megatron-core 0.16.1 warns of what it finds no use for here: Transformer Engine, Apex.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name in ("expected", "expected-validation"):
        manifest = read_manifest(expected / name)
        for shard, prefix in zip(manifest.shards, manifest.shard_prefixes(expected / name), strict=True):
            dataset = IndexedDataset(prefix)
            assert len(dataset) == shard.documents
            assert sum(len(dataset[index]) for index in range(len(dataset))) == shard.tokens
            assert all(dataset[index][-1] == manifest.end_of_document for index in range(len(dataset)))
    assert len(read_manifest(expected / "expected").shards) > 10


# --- Interrupted at a certain place


def test_a_kill_between_the_two_renames_is_mended_by_the_same_command(tmp_path: Path, expected: Path) -> None:
    inputs, output = [expected / "corpus"], tmp_path / "expected"
    begun(inputs, output, 10_000)
    folder = WorkFolder(tmp_path / "expected.partial")
    plan = folder.read_plan()
    complete(folder, plan, [folder.read_record(unit) for unit in range(plan.units)], output, max_bad=0.05)
    (held_out,) = tmp_path.glob(".expected-validation.*")
    held_out.rename(tmp_path / "expected-validation")
    tokenize(inputs, output)
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "expected-validation"]
    with pytest.raises(OrchestrateError, match="exists already"):
        tokenize(inputs, output)


def test_workers_whose_coordinator_is_killed_leave_and_the_next_one_goes_on(tmp_path: Path) -> None:
    corpus, output = endless_corpus(tmp_path / "corpus"), tmp_path / "data"
    with start([corpus], output, workers=2) as process:
        wait_until(lambda: len([*(tmp_path / "data.partial" / "units").glob("*.json")]) >= 2)
        assert len(workers_of(output)) == 2
        process.kill()
        process.wait(DEADLINE_SECONDS)
        wait_until(lambda: not workers_of(output))
    assert read_records(output) > 0


def test_a_killed_worker_ends_the_run_with_the_unit_its_files_and_what_to_do(tmp_path: Path) -> None:
    corpus, output = endless_corpus(tmp_path / "corpus"), tmp_path / "data"
    with start([corpus], output, workers=2) as process:
        wait_until(lambda: len([*(tmp_path / "data.partial" / "units").glob("*.json")]) >= 2)
        workers_of(output)[0].kill()
        complaint, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "DataError unit " in complaint
    assert f"{corpus}/" in complaint
    assert "killed (SIGKILL), perhaps since memory ran out; use fewer --workers" in complaint
    assert not workers_of(output)


def test_an_interrupt_from_the_keyboard_says_what_is_kept_and_leaves_no_worker(tmp_path: Path) -> None:
    corpus, output = endless_corpus(tmp_path / "corpus"), tmp_path / "data"
    command = [str(Path(sys.executable).with_name("orchestrate")), "tokenize", str(corpus)]
    command += ["--tokenizer", str(TOKENIZER), "--output", str(output), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: len([*(tmp_path / "data.partial" / "units").glob("*.lock")]) >= 2)
        os.killpg(process.pid, signal.SIGINT)
        _, complaint = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert f"what is done is kept in {output}.partial, and the same command goes on" in complaint
    assert "Traceback" not in complaint
    assert not workers_of(output)


def test_a_second_process_on_the_same_output_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    corpus, output = endless_corpus(tmp_path / "corpus"), tmp_path / "data"
    with start([corpus], output, workers=2) as process:
        wait_until(lambda: len([*(tmp_path / "data.partial" / "units").glob("*.json")]) >= 2)
        with pytest.raises(OrchestrateError, match=f"data.partial is worked on by process {process.pid} on "):
            tokenize([corpus], output)
        assert process.poll() is None
        process.kill()


# --- No room


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_with_room_the_same_command_goes_on(
    tmp_path: Path, expected: Path, mount_disk: Callable[..., Path], workers: int
) -> None:
    disk = mount_disk(3)
    stone = disk / "stone"
    stone.write_bytes(bytes(2_350_000))
    with pytest.raises(DiskFullError, match=rf"(?s)no room is left on the file system {disk} .*same command goes on"):
        tokenize([expected / "corpus"], disk / "expected", workers=workers)
    assert [path.name for path in disk.iterdir() if path != stone] == ["expected.partial"]
    done = read_records(disk / "expected")
    assert done > 0
    stone.unlink()
    assert tokenize([expected / "corpus"], disk / "expected").documents_read > done
    assert contents(disk, "expected") == contents(expected, "expected")


def test_a_file_that_may_not_grow_is_told_and_the_same_command_goes_on(tmp_path: Path, expected: Path) -> None:
    """The limit is that of a shell's `ulimit -f`; unlike a small disk it needs no root."""
    source = write_lines(tmp_path / "text.jsonl", ["a few words, again and again. " * 100] * 2000)
    large = {"unit_bytes": 1 << 30, "shard_tokens": 1 << 30, "validation_every": None, "block_bytes": 100_000}
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, {resource.RLIM_INFINITY}))"
    with start([source], tmp_path / "data", workers=1, before=limit, **large) as process:
        complaint, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "DiskFullError unit 0 " in complaint
    assert "ulimit -f" in complaint
    assert 0 < read_records(tmp_path / "data") < 2000
    tokenize([source], tmp_path / "data", **large)
    tokenize([source], tmp_path / "anew", **large)
    assert contents(tmp_path, "data") == contents(tmp_path, "anew")


# --- Not the same


def test_all_settings_that_differ_from_those_begun_with_are_told_at_once(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", [f"text {number}" * 50 for number in range(100)])
    begun([source], tmp_path / "data", 2)
    other = tmp_path / "other.txt"
    other.write_text("another text")
    with pytest.raises(DataError) as caught:
        tokenize([source, other], tmp_path / "data", text_key="body", validation_every=7, shard_tokens=77)
    assert caught.value.problems == (
        "text_key was 'text', now 'body'",
        "validation_every was 10, now 7",
        "shard_tokens was 15000, now 77",
        f"1 file not there before: {other}",
    )
    assert "remove it to start over" in str(caught.value)
    # What decides nothing of the result may change.
    manifest = tokenize([source], tmp_path / "data", max_bad=0.5, block_bytes=3000, progress=True)
    assert manifest.documents_read == 100


def test_a_changed_file_is_read_anew_where_nothing_is_lost_by_it_and_refused_by_name_where_something_is(
    tmp_path: Path,
) -> None:
    texts = [f"text {number} " * 50 for number in range(100)]
    small = [write_lines(tmp_path / f"{number}.jsonl", texts[:20]) for number in range(3)]
    large = write_lines(tmp_path / "large.jsonl", texts * 3)
    inputs, settings = [*small, large], {"validation_every": None, "unit_bytes": 40_000, "block_bytes": 2_000}
    begun(inputs, tmp_path / "data", 2, units=[0], **settings)
    assert 0 < read_records(tmp_path / "data") < 60
    write_lines(small[2], texts[:50])
    assert tokenize(inputs, tmp_path / "data", **settings).documents == 20 + 20 + 50 + 300
    one = tokenize(inputs, tmp_path / "anew", **{**settings, "unit_bytes": 1 << 20})
    assert read_manifest(tmp_path / "data").tokens == one.tokens

    begun(inputs, tmp_path / "more", 10_000, units=[0], **settings)
    write_lines(small[0], texts[:3])
    write_lines(large, texts)
    with pytest.raises(DataError) as caught:
        tokenize(inputs, tmp_path / "more", **settings)
    assert caught.value.problems == (
        f"{small[0]} has changed, and its documents are in a shard that is finished",
        f"{large} has changed, and it is cut into 4 units",
    )


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", [f"text {number}" * 50 for number in range(100)])

    def carry_out(folder: WorkFolder, _: Callable[[], None]) -> None:
        os.utime(source, ns=(1, 1))
        work_on(folder.path, [0], 1, 0.0)

    with pytest.raises(DataError, match=r"unit 0 .*text\.jsonl has changed while it was read"):
        tokenize([source], tmp_path / "data", carry_out=carry_out)


def test_files_that_lost_what_was_committed_are_refused_by_name(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", [f"text {number}" * 50 for number in range(100)])
    begun([source], tmp_path / "data", 2)
    shard = tmp_path / "data.partial" / "training" / "shard_00000.bin"
    os.truncate(shard, 100)
    with pytest.raises(DataError, match=rf"{shard} should have at least \d+ bytes .* found 100"):
        tokenize([source], tmp_path / "data")
    (tmp_path / "data.partial" / "units" / "00000.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"(?s)00000\.json is damaged; remove it and that unit starts over.*unit is missing"
    ):
        tokenize([source], tmp_path / "data")
    (tmp_path / "data.partial" / "units" / "00000.json").unlink()
    assert tokenize([source], tmp_path / "data").documents_read == 100


def test_a_folder_of_somebody_else_is_not_worked_in(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", ["a text"])
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"it has 'thesis\.tex' and no plan\.json"):
        tokenize([source], tmp_path / "data")
    assert [path.name for path in (tmp_path / "data.partial").iterdir()] == ["thesis.tex"]


# --- Bad records


def test_too_many_bad_records_stop_the_end_and_a_larger_share_goes_on(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", [f"text {number}" for number in range(95)])
    with source.open("a") as stream:
        stream.write("bad\n" * 5)
    settings: dict[str, Any] = {"validation_every": None, "unit_bytes": 1 << 20}
    with pytest.raises(DataError, match=r"5 of 100 records \(0\.05\) .* more than --max-bad 0\.049.*larger") as caught:
        tokenize([source], tmp_path / "data", max_bad=0.049, **settings)
    assert len(caught.value.problems) == 3
    assert caught.value.problems[0].startswith(f"{source}, byte {source.stat().st_size - 20}: not JSON")
    # Nothing is read again: the text is not even there as it was.
    assert tokenize([source], tmp_path / "data", max_bad=0.05, **settings).quarantined_documents == 5
    with pytest.raises(ConfigError, match="share of the records"):
        tokenize([source], tmp_path / "other", max_bad=1.5, **settings)


def test_too_many_bad_records_stop_a_run_that_has_read_ten_thousand(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "good"}\n{"text": null}\n' * 200_000)

    def carry_out(folder: WorkFolder, look: Callable[[], None]) -> None:
        work_on(folder.path, range(folder.read_plan().units), 1, 0.0, block_bytes=100_000, look=look)

    with pytest.raises(DataError, match=r"cannot be read, more than --max-bad 0\.01"):
        tokenize([source], tmp_path / "data", max_bad=0.01, unit_bytes=1 << 30, carry_out=carry_out)
    assert WorkFolder(tmp_path / "data.partial").read_record(0).state == "running"


class DisagreeingEngine:
    """As the plan's engine, but it finds a difference."""

    def __init__(self) -> None:
        engine, _ = load_engine(TOKENIZER)
        self.name = engine.name
        self.vocab_size, self.end_of_document = engine.vocab_size, engine.end_of_document
        self.begin_of_document = engine.begin_of_document

    def encode_lines(self, lines: bytes, text_key: str) -> EncodedBlock:
        raise EngineError(f"ids of {len(lines)} bytes under {text_key} differ", b"the document \xf0\x9f\x98\x80")

    def encode_texts(self, texts: Sequence[bytes]) -> EncodedBlock:
        raise NotImplementedError


def test_a_document_on_which_two_engines_disagree_is_kept(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", ["a text"])

    def carry_out(folder: WorkFolder, look: Callable[[], None]) -> None:
        work_on(folder.path, [0], 1, engine=DisagreeingEngine())

    with pytest.raises(DataError, match=r"unit 0 .*under text differ; the document is kept in .*disagreement\.txt"):
        tokenize([source], tmp_path / "data", carry_out=carry_out)
    assert (tmp_path / "data.partial" / "disagreement.txt").read_text() == "the document 😀"
