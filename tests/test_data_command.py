"""`orchestrate data`: what is shown, verified, merged and built ahead, against megatron-core's reader and builder."""

import dataclasses
import filecmp
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.prebuilt_index import REQUEST, prebuilt_problems
from megatron_solar.sample_order import COMPLETE
from megatron_solar.sample_request import request_of
from orchestrator.commands.main import group
from orchestrator.config import compose
from orchestrator.errors import ConfigError, DataError, DiskFullError, OrchestrateError, RunError
from orchestrator.files import sha256_of, write_atomic
from orchestrator.launch import check_inputs
from orchestrator.plan import TrainingPlan, make_plan, read_plan, write_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.step_documents import step_documents
from orchestrator.tokenize.decoder import load_decoder, printable
from orchestrator.tokenize.hugging_face import tokenizer_files
from orchestrator.tokenize.inspection import bad_reasons, choose_documents, find_documents, show_documents
from orchestrator.tokenize.manifest import (
    MANIFEST,
    DatasetManifest,
    fingerprint_of,
    parse_manifest,
    read_manifest,
    to_json,
)
from orchestrator.tokenize.merge import Source, group_shards, merge_data_sets
from orchestrator.tokenize.stage import tokenize_corpus
from orchestrator.tokenize.verification import verify_data_set
from tests.conftest import REPOSITORY, SMALL, Trainer, losses

TEXTS = [
    "The first one.\nWith two lines.",
    "한국어 문장입니다. 日本語の文。 Ünïcödé straße",
    "</s> <s> written out </s>",
    "an escape \x1b[31mred\x1b[0m and a turn \u202e",
    "  two spaces  kept ",
    "the last",
]


@pytest.fixture(scope="module", autouse=True)
def megatron_on_cpu() -> Iterator[None]:
    """Megatron is imported inside, as in every CPU worker, and without its warnings."""
    with cuda_calls_on_cpu():
        importlib.import_module("megatron_solar.compat")
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A data set of TEXTS and three bad records of two kinds."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[1:1] = ["{no json", '{"text": null}', '{"text": null}']
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenize_corpus([folder / "in.jsonl"], tokenizer, folder / "data", max_bad=1, progress=False)
    return folder / "data"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A data set of several shards."""
    folder, library = tmp_path_factory.mktemp("shards") / "data", Path(os.__file__).parent
    made = tokenize_corpus(
        [library / "json", library / "wsgiref"], tokenizer, folder, shard_tokens=4000, workers=1, progress=False
    )
    assert len(made.shards) > 3
    return folder


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a data set, to be harmed."""
    return Path(shutil.copytree(folder, to))


def orchestrate(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command in this process and return its stdout."""
    group([str(argument) for argument in arguments], standalone_mode=False)
    return capsys.readouterr().out


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def documents_by_megatron(folder: Path, manifest: DatasetManifest) -> list[list[int]]:
    """Read all documents with megatron-core's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [
        ids.tolist() for shard in manifest.shards for ids in IndexedDataset(str(folder / shard.name), multimodal=False)
    ]


# inspect


def test_documents_are_shown_as_they_were_written_with_their_end(texts: Path) -> None:
    manifest = read_manifest(texts)
    decoder = load_decoder(texts / manifest.tokenizer_file)
    shown = list(show_documents(texts, manifest, range(len(TEXTS)), decoder, 10_000))
    assert [document.text for document in shown] == [f"{text}⟨</s>⟩" for text in TEXTS]
    assert all(document.tokens == document.shown_tokens for document in shown)


def test_a_document_by_number_is_megatrons_document_of_that_number(shards: Path) -> None:
    manifest = read_manifest(shards)
    decoder = load_decoder(shards / manifest.tokenizer_file)
    expected = documents_by_megatron(shards, manifest)
    assert len(expected) == manifest.documents > 10
    shown = list(show_documents(shards, manifest, range(manifest.documents), decoder, 10**9))
    assert [document.tokens for document in shown] == [len(ids) for ids in expected]
    assert [document.text for document in shown] == [decoder.text(ids) for ids in expected]
    with pytest.raises(ConfigError, match=f"document {manifest.documents} should be from 0 to"):
        list(show_documents(shards, manifest, [manifest.documents], decoder, 1))


def test_chosen_documents_lie_evenly_or_are_drawn_the_same_again(shards: Path) -> None:
    manifest = dataclasses.replace(read_manifest(shards), documents=1000)
    assert choose_documents(manifest, 4) == [125, 375, 625, 875]
    drawn = choose_documents(manifest, 50, seed=3)
    assert drawn == choose_documents(manifest, 50, seed=3) == sorted(set(drawn))
    assert drawn != choose_documents(manifest, 50, seed=4)
    assert choose_documents(dataclasses.replace(manifest, documents=2), 5) == [0, 1]


def test_documents_are_found_by_their_text(texts: Path) -> None:
    manifest = read_manifest(texts)
    decoder = load_decoder(texts / manifest.tokenizer_file)
    assert list(find_documents(texts, manifest, "one", decoder, 9)) == [0]
    assert list(find_documents(texts, manifest, "two", decoder, 9)) == [0, 4]
    assert list(find_documents(texts, manifest, "two", decoder, 1)) == [0]


def test_a_tokenizer_json_decodes_as_the_model_it_was_made_from(tmp_path: Path, texts: Path) -> None:
    for name, content in tokenizer_files(texts / "tokenizer.model").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    ids = [number for document in documents_by_megatron(texts, read_manifest(texts)) for number in document]
    ids += [1, 40_000]
    found = load_decoder(tmp_path / "tokenizer.json").text(ids)
    assert found == load_decoder(texts / "tokenizer.model").text(ids)
    assert found.endswith("the last⟨</s>⟩⟨<s>⟩⟨id 40000⟩")


def test_what_is_shown_cannot_steer_a_terminal(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = orchestrate(capsys, "data", "inspect", texts, "--documents", 6)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "an escape \\x1b[31mred\\x1b[0m and a turn \\u202e⟨</s>⟩" in shown
    assert "  | With two lines.⟨</s>⟩" in shown
    assert shown.splitlines()[-1] == f"next: orchestrate data inspect {texts} --verify"
    assert printable("a\tb\nc\x00") == "a\\tb\\nc\\x00"


def test_bad_records_are_shown_by_reason_with_examples(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = bad_reasons(texts)
    assert [reason.records for reason in reasons] == [2, 1]
    assert reasons[0].examples[0]["content"] == '{"text": null}'
    shown = json.loads(orchestrate(capsys, "data", "inspect", texts, "--json", "--document", 1))
    assert [reason["records"] for reason in shown["quarantine"]] == [2, 1]
    assert [document["text"] for document in shown["documents"]] == [f"{TEXTS[1]}⟨</s>⟩"]
    assert shown["manifest"]["documents"] == len(TEXTS)


# inspect --verify


def test_whole_data_sets_verify(corpus: Path, texts: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (corpus / "train", corpus / "validation", texts, shards):
        assert verify_data_set(folder, read_manifest(folder)) == []
    assert "verified: every byte" in orchestrate(capsys, "data", "inspect", shards, "--verify")


def test_all_damage_is_told_at_once(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(shards, tmp_path / "data")
    names = [shard.name for shard in read_manifest(folder).shards]
    flip_byte(folder / f"{names[0]}.bin", 100)
    flip_byte(folder / f"{names[1]}.idx", 50)  # of the offsets of its two documents
    os.truncate(folder / f"{names[2]}.bin", 10)
    (folder / f"{names[3]}.idx").unlink()
    flip_byte(folder / "tokenizer.model", 1000)
    (folder / "quarantine.jsonl").write_text('{"reason": "none of these"}\n')
    with pytest.raises(DataError) as raised:
        orchestrate(capsys, "data", "inspect", folder, "--verify")
    assert raised.value.exit_code == 1
    told = "\n".join(raised.value.problems)
    for part in (
        f"{names[0]}.bin should have SHA-256",
        f"{names[1]}.idx should have SHA-256",
        f"{names[1]}.idx has offsets that do not follow from its lengths",
        f"{names[2]}.bin should have",
        f"{names[3]}.idx is missing",
        "tokenizer.model should have SHA-256",
        "quarantine.jsonl should have 0 whole records, found 1",
    ):
        assert part in told, told


@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        (5, 2, "1 documents have the end of document 2 inside, such as 0"),
        (-1, 7, "documents do not end with the end of document 2, such as"),
        (5, 32_000, "1 documents have ids that are not below the vocabulary's 32000, such as 0"),
    ],
    ids=["an end inside", "no end", "an id beyond"],
)
def test_wrong_tokens_are_told_though_the_checksums_fit(
    tmp_path: Path, shards: Path, place: int, token: int, message: str
) -> None:
    folder = copied(shards, tmp_path / "data")
    manifest = read_manifest(folder)
    shard = manifest.shards[0]
    path = folder / f"{shard.name}.bin"
    tokens = np.fromfile(path, dtype=shard.dtype)
    tokens[place] = token
    tokens.tofile(path)
    changed = dataclasses.replace(shard, bin_sha256=sha256_of(path))
    manifest = dataclasses.replace(manifest, shards=(changed, *manifest.shards[1:]))
    write_atomic(folder / MANIFEST, to_json(dataclasses.replace(manifest, fingerprint=fingerprint_of(manifest))))
    (problem,) = verify_data_set(folder, read_manifest(folder))
    assert message in problem


def test_counts_that_do_not_add_up_are_told(shards: Path) -> None:
    manifest = dataclasses.replace(parse_manifest(shards), documents_read=7, tokens=3)
    told = verify_data_set(shards, manifest)
    assert f"manifest.json: 7 documents were read, {manifest.documents} are accounted for" in told
    assert any(problem.startswith("manifest.json: 3 tokens in all") for problem in told)


# merge


def test_merged_bytes_are_those_of_megatrons_builder_on_the_same_shards(
    tmp_path: Path, corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    output = tmp_path / "merged"
    told = orchestrate(capsys, "data", "merge", corpus / "train", shards, "--output", output)
    assert told.splitlines()[-1] == f"next: orchestrate data inspect {output}"
    prefixes = [folder / shard.name for folder in (corpus / "train", shards) for shard in read_manifest(folder).shards]
    builder = IndexedDatasetBuilder(str(tmp_path / "expected.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "expected.idx"))
    merged = read_manifest(output)
    assert [shard.name for shard in merged.shards] == ["shard_00000"]
    for ending in (".bin", ".idx"):
        made, expected = output / f"shard_00000{ending}", tmp_path / f"expected{ending}"
        assert made.read_bytes() == expected.read_bytes()
    assert verify_data_set(output, merged) == []
    assert (output / "documents.svg").stat().st_size > 1000


def test_what_was_counted_and_quarantined_is_put_together(tmp_path: Path, texts: Path, shards: Path) -> None:
    merged = merge_data_sets([shards, texts], tmp_path / "merged")
    parts = [read_manifest(shards), read_manifest(texts)]
    for field in ("documents_read", "documents", "empty_documents", "quarantined_documents", "tokens", "text_bytes"):
        assert getattr(merged, field) == sum(getattr(part, field) for part in parts), field
    assert merged.quarantined_documents == 3
    assert (tmp_path / "merged" / "quarantine.jsonl").read_bytes() == (texts / "quarantine.jsonl").read_bytes()
    assert merged.inputs == (*parts[0].inputs, *parts[1].inputs)
    assert merged == read_manifest(tmp_path / "merged")
    assert merge_data_sets([shards, texts], tmp_path / "again").fingerprint == merged.fingerprint


def test_shards_become_as_many_or_as_large_as_asked_for(tmp_path: Path, texts: Path, shards: Path) -> None:
    expected = [ids for folder in (shards, texts) for ids in documents_by_megatron(folder, read_manifest(folder))]
    for number, options in enumerate(({"shards": 3}, {"shard_tokens": 9000}, {"shard_tokens": 1})):
        output = tmp_path / str(number)
        merged = merge_data_sets([shards, texts], output, **options)
        assert documents_by_megatron(output, merged) == expected
        assert verify_data_set(output, merged) == []
        if "shards" in options:
            assert len(merged.shards) == 3
        else:
            largest = max(shard.tokens for folder in (shards, texts) for shard in read_manifest(folder).shards)
            assert all(shard.tokens <= max(options["shard_tokens"], largest) for shard in merged.shards)


def test_groups_of_shards_are_whole_in_order_and_near_their_share(shards: Path) -> None:
    shard, chance = read_manifest(shards).shards[0], random.Random(5)
    for _ in range(300):
        sizes = [chance.randint(1, 1000) for _ in range(chance.randint(1, 40))]
        sources = [Source(folder=shards, shard=dataclasses.replace(shard, tokens=size)) for size in sizes]
        count = chance.randint(1, len(sizes))
        groups = group_shards(sources, shards=count)
        assert [source for group in groups for source in group] == sources
        assert len(groups) == count
        assert min(map(len, groups)) == 1 or all(groups)
        limit = chance.randint(1, 3000)
        groups = group_shards(sources, shard_tokens=limit)
        assert [source for group in groups for source in group] == sources
        totals = [[source.shard.tokens for source in group] for group in groups]
        assert all(sum(group) <= limit or len(group) == 1 for group in totals)
        assert all(sum(left) + right[0] > limit for left, right in itertools.pairwise(totals))
    equal = [Source(folder=shards, shard=dataclasses.replace(shard, tokens=100)) for _ in range(12)]
    assert [len(group) for group in group_shards(equal, shards=4)] == [3, 3, 3, 3]
    many = dataclasses.replace(shard, tokens=1, documents=2**30)
    assert [len(group) for group in group_shards([Source(folder=shards, shard=many)] * 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_damaged_source_is_refused_and_nothing_is_left(
    tmp_path: Path, texts: Path, shards: Path, ending: str
) -> None:
    folder = copied(shards, tmp_path / "data")
    shard = read_manifest(folder).shards[2]
    flip_byte(folder / f"{shard.name}{ending}", 50)
    with pytest.raises(DataError, match=f"{shard.name}{ending} should have SHA-256 .* it is damaged"):
        merge_data_sets([texts, folder], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_data_sets_that_do_not_go_together_are_refused_all_at_once(
    tmp_path: Path, corpus: Path, shards: Path, tokenizer: Path
) -> None:
    other = tokenizer.with_name("mistral_instruct_tokenizer_240323.model.v3")
    (tmp_path / "in.txt").write_text("a text")
    tokenize_corpus([tmp_path / "in.txt"], other, tmp_path / "v3", progress=False)
    with pytest.raises(ConfigError) as raised:
        merge_data_sets([shards, tmp_path / "v3", corpus / "validation", shards], tmp_path / "merged", shards=100)
    told = raised.value.problems
    assert len(told) == 4
    assert "was made with another tokenizer" in told[0]
    assert "what was held out would be trained on" in told[1]
    assert "which would be read twice" in told[2]
    assert "--shards 100 should be from 1 to" in told[3]
    assert not (tmp_path / "merged").exists()


def test_what_a_disk_has_no_room_for_is_refused_before_a_byte_is_written(
    mount_disk: Callable[..., Path], corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = mount_disk(1)
    (disk / "filler").write_bytes(bytes(900_000))
    with pytest.raises(DiskFullError, match=r"the merged data set .*/merged needs .* in 6 files, .* has .* free; free"):
        merge_data_sets([corpus / "train", shards], disk / "merged")
    asked = words(f"data.train={shards}", f"data.validation={corpus / 'validation'}", steps=2000)
    with pytest.raises(DiskFullError, match=r"the sample index .*/index needs .* free; free space"):
        orchestrate(capsys, "data", "index", "demo-base", *asked, f"--output={disk / 'index'}", "--workers=1")
    assert [path.name for path in disk.iterdir()] == ["filler"]


# index


def words(*data: str, steps: int = 20) -> list[str]:
    return [*SMALL, f"training.tokens={steps * 4 * 32}", "name=ahead", *data]


def same_files(left: Path, right: Path) -> list[str]:
    """Return the names of two folders' files after seeing that they are the same."""
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    different = filecmp.cmpfiles(left, right, names, shallow=False)
    assert different == (names, [], []), different
    return names


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_built_ahead_is_what_rank_0_builds(
    tmp_path: Path, corpus: Path, shards: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_solar.data import open_samples

    # The second data set twice: each of its epochs is built once.
    data = [f"data.train=[{corpus / 'train'},{shards},{shards}]", "data.weights=[1,2,2]"]
    data.append(f"data.validation={corpus / 'validation'}")
    asked = words(*data, steps=2000)
    output = tmp_path / "index"
    options = [f"--output={output}", f"--workers={workers}", "--json"]
    told = json.loads(orchestrate(capsys, "data", "index", "demo-base", *asked, *options))
    plan = make_plan(compose("demo-base", asked))
    request = request_of(plan)
    open_samples(request, tmp_path / "cache")
    assert len(same_files(output / "train", tmp_path / "cache" / "train")) > 50
    same_files(output / "validation", tmp_path / "cache" / "validation")
    paths = [path for path in output.rglob("*") if path.is_file()]
    assert told["files"] == len(paths)
    assert told["bytes"] == sum(path.stat().st_size for path in paths)


def test_a_dry_run_says_about_what_is_built(
    tmp_path: Path, corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(f"data.train={shards}", f"data.validation={corpus / 'validation'}", steps=2000)
    options = [*asked, f"--output={tmp_path / 'index'}", "--json"]
    expected = json.loads(orchestrate(capsys, "data", "index", "demo-base", *options, "--dry-run"))
    assert not (tmp_path / "index").exists()
    found = json.loads(orchestrate(capsys, "data", "index", "demo-base", *options))
    again = json.loads(orchestrate(capsys, "data", "index", "demo-base", *options))
    assert found["is_new"]
    assert not again["is_new"]
    assert expected["files"] == pytest.approx(found["files"], rel=0.05)  # an epoch more or less of a shard
    assert expected["bytes"] == pytest.approx(found["bytes"], rel=0.1)


def test_a_run_with_an_index_built_ahead_has_the_same_losses_and_builds_none(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, plan = trainer.make_run(steps=6)
    attempt = trainer.train(plain, plan)
    write_atomic(plain.config, config_of(plan))
    orchestrate(capsys, "data", "index", plain.config, f"--output={tmp_path / 'index'}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    ahead, plan = trainer.make_run(f"data.index={tmp_path / 'index'}", steps=6)
    assert losses(trainer.train(ahead, plan)) == losses(attempt)
    assert plain.data_index.exists()
    assert not ahead.data_index.exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before


def config_of(plan: TrainingPlan) -> str:
    from orchestrator.config import to_yaml

    return to_yaml(plan.settings)


@pytest.fixture
def built(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, list[str]]:
    """An index built ahead, and the words it was built with."""
    asked = words(f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}")
    asked += [f"paths.runs={tmp_path / 'runs'}"]
    orchestrate(capsys, "data", "index", "demo-base", *asked, f"--output={tmp_path / 'index'}", "--workers=1")
    return tmp_path / "index", asked


def plan_with(built: tuple[Path, list[str]], *more: str) -> TrainingPlan:
    folder, asked = built
    return make_plan(compose("demo-base", [*asked, f"data.index={folder}", *more]))


def test_an_index_of_other_samples_is_refused_before_anything_is_submitted(built: tuple[Path, list[str]]) -> None:
    from megatron_solar.data import open_samples

    assert check_inputs(plan_with(built))
    plan = plan_with(built, "training.seed=7", "training.tokens=12800")
    for refuse in (
        lambda: check_inputs(plan),
        lambda: open_samples(request_of(plan), built[0].parent / "cache"),
    ):
        with pytest.raises(DataError, match="make one with `orchestrate data index") as raised:
            refuse()
        assert "training.seed: the index is for 1234, the run wants 7" in raised.value.problems
        assert "training samples: the index is for 80, the run wants 400" in raised.value.problems
    assert not (built[0].parent / "cache").exists()


@pytest.mark.parametrize("fault", ["torn", "incomplete", "away"])
def test_an_index_that_is_not_whole_is_refused(built: tuple[Path, list[str]], fault: str) -> None:
    folder = built[0] / "validation"
    if fault == "torn":
        os.truncate(next(folder.glob("*sample_index.npy")), 130)
    elif fault == "incomplete":
        (folder / COMPLETE).unlink()
    else:
        shutil.rmtree(built[0])
    expected = {"torn": "lacks bytes of 1 files, such as", "incomplete": "has no complete.json", "away": "is not there"}
    with pytest.raises(DataError, match=expected[fault]):
        check_inputs(plan_with(built))


def test_data_sets_that_changed_since_are_told(tmp_path: Path, built: tuple[Path, list[str]], shards: Path) -> None:
    folder = copied(shards, tmp_path / "data")
    plan = plan_with(built, f"data.train={folder}")
    with pytest.raises(DataError, match=f"data.train: the index is for .*, the run wants .*{folder}"):
        check_inputs(plan)


def test_a_folder_of_something_else_is_never_touched(
    tmp_path: Path, built: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "thesis.tex").write_text("years of work")
    with pytest.raises(OrchestrateError, match="exists already"):
        orchestrate(capsys, "data", "index", "demo-base", *built[1], f"--output={tmp_path / 'mine'}")
    assert (tmp_path / "mine" / "train" / "thesis.tex").read_text() == "years of work"


def test_a_build_that_is_killed_leaves_nothing_trusted_and_the_same_command_builds_it(
    tmp_path: Path, shards: Path, corpus: Path
) -> None:
    asked = words(f"data.train={shards}", f"data.validation={corpus / 'validation'}", steps=20_000)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "orchestrator.commands.main", "data", "index", "demo-base", *asked]
    command += [f"--output={tmp_path / 'index'}", "--workers=2"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".index.*.partial/train/*shuffle_index.npy")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    builders = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(builders) == 2
    assert psutil.wait_procs(builders, timeout=60)[1] == []
    assert not (tmp_path / "index").exists()
    assert not list(tmp_path.glob(".index.*.partial/train/complete.json"))
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert not prebuilt_problems(tmp_path / "index", request_of(make_plan(compose("demo-base", asked))))
    assert (tmp_path / "index" / REQUEST).exists()


def killed(epoch: tuple[str, int]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_builder_that_is_killed_is_told(tmp_path: Path) -> None:
    from megatron_solar.index_builder import epoch_workers

    with pytest.raises(OrchestrateError, match="was killed, perhaps for memory"), epoch_workers(2) as each:
        list(each(killed, [("shard", 0), ("shard", 1)]))


# show


Shown = tuple[RunDirectory, TrainingPlan]


@pytest.fixture(scope="module")
def shown_run(trainer: Trainer, texts: Path, shards: Path) -> Shown:
    """A run over two data sets, one of them many times."""
    run, plan = trainer.make_run(f"data.train=[{texts},{shards}]", "data.weights=[1,9]", steps=30)
    trainer.train(run, plan)
    return run, plan


def test_the_documents_of_a_step_are_the_tokens_that_megatron_gave_it(shown_run: Shown) -> None:
    from megatron_solar.data import open_samples

    run, plan = shown_run
    opened = open_samples(request_of(plan), run.data_index).train
    folders = {folder: read_manifest(Path(folder)) for folder in plan.settings.data.train}
    by_folder = {folder: documents_by_megatron(Path(folder), of) for folder, of in folders.items()}
    epochs, several = set(), 0
    for step in range(1, plan.total_steps + 1):
        seen = step_documents(run, step)
        assert [sample.sample for sample in seen.samples] == list(range((step - 1) * 4, step * 4))
        assert seen.attempt == 1
        for sample in seen.samples:
            item = opened[sample.sample]
            expected = [*item["tokens"].tolist(), int(item["labels"][-1])]
            parts = [by_folder[sample.folder][part.document][part.start : part.stop] for part in sample.parts]
            assert [token for part in parts for token in part] == expected
            shard = next(its for its in folders[sample.folder].shards if its.name == sample.shard)
            assert all(part.document_in_shard < shard.documents for part in sample.parts)
            epochs.add(sample.epoch)
            several += len(sample.parts) > 1
    assert several  # samples that cross a document's end
    assert max(epochs) >= 1


def test_a_step_is_shown_with_text_and_the_next_command(shown_run: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    run, plan = shown_run
    told = json.loads(orchestrate(capsys, "data", "show", run.path, "--step", 3, "--samples", 2, "--json"))
    assert [sample["sample"] for sample in told["samples"]] == [8, 9]
    part = told["samples"][0]["parts"][0]
    shown = orchestrate(capsys, "data", "show", run.path, "--step", 3, "--samples", 2)
    assert f"document {part['document']} [{part['start']}, {part['stop']}) of {part['document_tokens']}" in shown
    folder = told["samples"][0]["folder"]
    last = shown.splitlines()[-1]
    assert last == f"next: orchestrate data inspect {folder} --document {part['document']}"
    inspected = json.loads(orchestrate(capsys, *last.split()[2:], "--json", "--tokens", 10**6))
    begins = part["begins"].removesuffix("⟨</s>⟩").strip()
    assert begins.strip("\ufffd") in inspected["documents"][0]["text"]
    with pytest.raises(RunError, match=f"has not done step {plan.total_steps + 1}"):
        step_documents(run, plan.total_steps + 1)


def test_of_several_attempts_at_a_step_the_last_counts_and_a_prolonged_runs_index_serves(
    tmp_path: Path, trainer: Trainer
) -> None:
    run, plan = trainer.make_run(steps=4)
    trainer.train(run, plan)
    before = step_documents(run, 3)
    longer = dataclasses.replace(plan.settings.training, tokens=8 * 4 * 32)
    prolonged = make_plan(dataclasses.replace(plan.settings, training=longer))
    order = run.resumes_folder / "0001"
    order.mkdir(parents=True)
    write_plan(order / "plan.json", prolonged)
    trainer.train(run, read_plan(run.plan))
    assert step_documents(run, 7).attempt == 2
    assert step_documents(run, 3) == before  # from the index that the second attempt has built anew
    shutil.copytree(run.attempt(2).path, run.attempt(3).path)  # a start that did the same steps again
    again = step_documents(run, 7)
    assert (again.attempt, again.others) == (3, (2,))
    assert again.samples == step_documents(run, 7).samples


def test_a_step_whose_index_is_gone_says_how_to_build_it_again(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plan = trainer.make_run(steps=2)
    write_atomic(run.config, config_of(plan))
    trainer.train(run, plan)
    before = step_documents(run, 2)
    shutil.rmtree(run.data_index)
    with pytest.raises(DataError, match=f"orchestrate data index {run.config} --output DIR"):
        step_documents(run, 2)
    orchestrate(capsys, "data", "index", run.config, f"--output={tmp_path / 'index'}")
    assert step_documents(run, 2, index=tmp_path / "index") == before
    with pytest.raises(DataError, match="is not there"):
        step_documents(run, 2, index=tmp_path / "nothing")
