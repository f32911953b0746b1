"""Tokenization against megatron-core's own builder and sentencepiece, and every way text can be bad."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
import sentencepiece

from orchestrator.errors import ConfigError, DataError, OrchestrateError
from orchestrator.tokenize.concatenate import Source, concatenate
from orchestrator.tokenize.document_lengths import bin_start, bins_of, count_lengths
from orchestrator.tokenize.hugging_face import tokenizer_files
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest
from orchestrator.tokenize.shard import ShardWriter, token_type
from orchestrator.tokenize.stage import tokenize_corpus
from tests.tokenize_corpora import TOKENIZER, write_lines

ORCHESTRATE = Path(sys.executable).with_name("orchestrate")

TEXTS = [
    "def main() -> None:\n    return None\n",
    "한국어 문장입니다. 日本語の文。 中文句子。 Ünïcödé straße",
    "</s> <s> <unk> [INST] are written out </s>",
    " ",
    "\n\n\t  spaces\r\nkept  ",
    "emoji 👩‍👩‍👧 and NUL \x00 and 𝔘𝔫𝔦",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


@pytest.fixture(scope="module")
def indexed_dataset() -> Any:
    with warnings.catch_warnings():
        # megatron-core 0.16.1 warns of what it finds no use for here: Transformer Engine, Apex.
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def tokenize(inputs: Sequence[Path], output: Path, **settings: Any) -> DatasetManifest:
    return tokenize_corpus(inputs, TOKENIZER, output, progress=False, **settings)


def read_ids(folder: Path) -> list[list[int]]:
    """Read a data set by its manifest and .idx lengths alone."""
    documents: list[list[int]] = []
    for shard in read_manifest(folder).shards:
        ids = numpy.fromfile(folder / f"{shard.name}.bin", dtype=shard.dtype)
        lengths = numpy.fromfile(folder / f"{shard.name}.idx", dtype="<i4", offset=34, count=shard.documents)
        documents += [part.tolist() for part in numpy.split(ids, numpy.cumsum(lengths)[:-1])]
    return documents


def quarantine(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(ORCHESTRATE), "tokenize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- The bytes


def test_shards_equal_those_of_megatrons_builder_and_its_reader_gives_the_ids_back(
    tmp_path: Path, reference: sentencepiece.SentencePieceProcessor, indexed_dataset: Any
) -> None:
    import torch

    seed = random.Random(3)
    characters = "abc  \n\t(){}<>/s_.,éß한국日本😀\u200b\ufeff▁0123"
    texts = TEXTS + ["".join(seed.choices(characters, k=seed.randint(1, 400))) for _ in range(1500)]
    manifest = tokenize([write_lines(tmp_path / "text.jsonl", texts)], tmp_path / "data")

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=numpy.uint16)
    expected = [[*reference.encode(text), reference.eos_id()] for text in texts]
    for ids in expected:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    (prefix,) = manifest.shard_prefixes(tmp_path / "data")
    assert Path(f"{prefix}.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert Path(f"{prefix}.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    dataset = indexed_dataset.IndexedDataset(prefix)
    assert [dataset[index].tolist() for index in range(len(dataset))] == expected
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)


def test_a_vocabulary_too_large_for_uint16_is_written_as_megatron_writes_it(
    tmp_path: Path, indexed_dataset: Any
) -> None:
    import torch

    for size in (32_000, 65_499, 65_500, 131_072):
        assert token_type(size) == indexed_dataset.DType.optimal_dtype(size).__name__
    documents = [[70_000, 2], [1, 131_071, 2], [2]]
    writer = ShardWriter(tmp_path, "ours", token_type(131_072), lengths=tmp_path / "lengths")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=numpy.int32)
    for ids in documents:
        writer.add(numpy.array(ids, dtype=numpy.int32).tobytes(), numpy.array([len(ids)], dtype=numpy.int32))
        builder.add_document(torch.tensor(ids), [len(ids)])
    shard = writer.finish()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert shard.bin_sha256 == hashlib.sha256((tmp_path / "theirs.bin").read_bytes()).hexdigest()
    assert shard.index_sha256 == hashlib.sha256((tmp_path / "theirs.idx").read_bytes()).hexdigest()


def test_an_end_of_document_written_in_the_text_stays_text(
    tmp_path: Path, reference: sentencepiece.SentencePieceProcessor
) -> None:
    text = "before</s>after <s> </s>"
    tokenize([write_lines(tmp_path / "text.jsonl", [text])], tmp_path / "data")
    (ids,) = read_ids(tmp_path / "data")
    assert ids.count(reference.eos_id()) == 1
    assert ids[-1] == reference.eos_id()
    assert reference.bos_id() not in ids
    assert reference.decode(ids[:-1]) == text


def test_a_large_corpus_is_cut_into_shards_that_hold_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document number {number}" for number in range(100)]
    source = write_lines(tmp_path / "text.jsonl", texts)
    one = tokenize([source], tmp_path / "one")
    many = tokenize([source], tmp_path / "many", shard_tokens=100)
    assert len(one.shards) == 1
    assert len(many.shards) > 5
    assert read_ids(tmp_path / "many") == read_ids(tmp_path / "one")
    assert (sum(shard.documents for shard in many.shards), many.tokens) == (100, one.tokens)


def test_a_tokenizer_json_gives_the_same_shards_by_several_processes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in tokenizer_files(TOKENIZER).items():
        (model / name).write_text(content)
    source = write_lines(tmp_path / "text.jsonl", TEXTS * 20)
    settings = {"progress": False, "unit_bytes": 60_000}
    by_json = tokenize_corpus([source], model, tmp_path / "json", workers=2, **settings)
    by_model = tokenize_corpus([source], TOKENIZER, tmp_path / "model-file", engine="sentencepiece", **settings)
    assert by_json.shards == by_model.shards
    assert len(by_json.shards) > 1
    assert (by_json.tokenizer_file, by_json.end_of_document) == ("tokenizer.json", by_model.end_of_document)
    assert (tmp_path / "json" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert by_json.engine.startswith("tokenizers ")


# --- What is read


def test_files_folders_and_globs_are_read_in_order_and_each_file_once(
    tmp_path: Path, reference: sentencepiece.SentencePieceProcessor
) -> None:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "note.md").write_text("hidden")
    (folder / "z.md").write_text("z")
    (folder / "b" / "a.py").write_text("a")
    (folder / "b" / "skip.csv").write_text("1,2")
    (folder / "b" / "more.rst").write_bytes(b"\xef\xbb\xbfmark\r\n")
    (tmp_path / "first.TXT").write_text("first")
    inputs = [tmp_path / "first.TXT", folder, tmp_path / "**" / "*.py"]
    manifest = tokenize(inputs, tmp_path / "data")
    texts = [reference.decode(ids[:-1]) for ids in read_ids(tmp_path / "data")]
    assert texts == ["first", "z", "a", "mark\r\n"]
    assert manifest.files == 4
    assert manifest.skipped_files == {".csv": 1, "hidden": 1}


BAD_LINES = {
    b'{"text": "half a line': "not JSON",
    b'{"body": "another key"}': "no key 'text'",
    b'{"text": null}': "key 'text' holds null, not text",
    b'{"text": 7.5}': "key 'text' holds a number, not text",
    b'{"text": true}': "key 'text' holds true or false, not text",
    b'{"text": ["a"]}': "key 'text' holds a list, not text",
    b'{"text": {"text": "a"}}': "key 'text' holds an object, not text",
    b'["text"]': "a list where an object was wanted",
    b'"text"': "a string where an object was wanted",
    b'{"text": "a", "text": "b"}': "duplicate key 'text'",
    b'{"text": "lone \\ud800 surrogate"}': "lone surrogate at character 5",
    b'{"text": "caf\xe9"}': "invalid UTF-8 at byte 13",
    b'{"text": "a"} {"text": "b"}': "not JSON: Extra data",
    b'{"text": "a", "score": NaN}': "not JSON: NaN",
    b'{"text": "tab\there"}': "not JSON: Invalid control character",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "not JSON that can be read",
    b"[" * 100_000: "nested too deeply",
}


def test_every_bad_record_is_quarantined_where_it_stands_and_its_neighbours_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    content, expected = b"\xef\xbb\xbf", []
    for number, (line, reason) in enumerate(BAD_LINES.items()):
        content += json.dumps({"text": f"good {number}"}).encode() + b"\r\n\r\n"
        expected.append((len(content), reason, line))
        content += line + b"\n"
    source.write_bytes(content + b'{"text": ""}\n{"text": "last, without a line end"}')
    manifest = tokenize([source], tmp_path / "data", max_bad=1.0)

    found = quarantine(tmp_path / "data")
    assert len(found) == len(expected) == manifest.quarantined_documents
    for record, (offset, reason, line) in zip(found, expected, strict=True):
        assert record["file"] == str(source)
        assert (record["offset"], record["bytes"]) == (offset, len(line))
        assert reason in record["reason"]
        assert record["content"] == line.decode("utf-8", "backslashreplace")
    assert manifest.documents == len(BAD_LINES) + 1
    assert manifest.empty_documents == 1
    assert manifest.documents_read == 2 * len(BAD_LINES) + 2


def test_a_plain_file_that_is_not_utf8_is_quarantined_and_an_empty_one_counted(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "latin1.py").write_bytes("# Grüße\n".encode("latin-1"))
    (folder / "empty.py").touch()
    (folder / "good.py").write_text("print('Grüße')\n", encoding="utf-8")
    manifest = tokenize([folder], tmp_path / "data", max_bad=0.5)
    assert (manifest.documents_read, manifest.documents) == (3, 1)
    assert (manifest.empty_documents, manifest.quarantined_documents) == (1, 1)
    (record,) = quarantine(tmp_path / "data")
    assert record["file"] == str(folder / "latin1.py")
    assert record["offset"] == 0
    assert record["reason"].startswith("invalid UTF-8 at byte 4")


def test_documents_are_held_out_by_their_text_so_that_no_copy_is_on_both_sides(
    tmp_path: Path, reference: sentencepiece.SentencePieceProcessor
) -> None:
    texts = ["", *(f"text {number % 40}" for number in range(120))]
    source = write_lines(tmp_path / "text.jsonl", texts)
    with source.open("a") as stream:
        stream.write("bad\n")
    training = tokenize([source], tmp_path / "data", validation_every=5, unit_bytes=500, shard_tokens=100)
    validation = read_manifest(tmp_path / "data-validation")

    held_out = [text for text in texts if text and zlib.crc32(text.encode()) % 5 == 0]
    kept = [text for text in texts if text and zlib.crc32(text.encode()) % 5]
    assert 10 < len(held_out) < 50
    for name, expected in (("data", kept), ("data-validation", held_out)):
        assert [reference.decode(ids[:-1]) for ids in read_ids(tmp_path / name)] == expected
    assert (training.documents_read, training.held_out_documents) == (122, len(held_out))
    assert (training.empty_documents, training.quarantined_documents) == (1, 1)
    assert (validation.documents_read, validation.quarantined_documents) == (len(held_out), 0)
    assert (training.part, validation.part) == ("training", "validation")
    assert training.fingerprint != validation.fingerprint
    # Small parts of many units are put together, up to the size of a shard.
    assert len(validation.shards) < len(training.shards)
    assert all(shard.tokens <= 100 for shard in validation.shards)


def test_shards_that_are_put_together_equal_one_of_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document number {number}" for number in range(50)]
    source = write_lines(tmp_path / "text.jsonl", texts)
    (whole,) = tokenize([source], tmp_path / "one").shards
    parts = tokenize([source], tmp_path / "many", shard_tokens=60).shards
    assert len(parts) > 4
    sources = [Source(folder=tmp_path / "many", shard=shard) for shard in parts]
    assert concatenate(sources, tmp_path, whole.name) == whole
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"{whole.name}{suffix}").read_bytes() == (
            tmp_path / "one" / f"{whole.name}{suffix}"
        ).read_bytes()


# --- The manifest


def test_the_fingerprint_depends_on_the_text_and_settings_and_not_on_the_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = tokenize([write_lines(tmp_path / "a.jsonl", TEXTS)], tmp_path / "a")
    same = tokenize([write_lines(tmp_path / "elsewhere" / "b.jsonl", TEXTS)], tmp_path / "elsewhere" / "b")
    other = tokenize([write_lines(tmp_path / "c.jsonl", [*TEXTS[1:], TEXTS[0]])], tmp_path / "c")
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != other.fingerprint
    assert read_manifest(tmp_path / "a") == first
    assert first.tokenizer_sha256 == hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()
    assert (tmp_path / "a" / first.tokenizer_file).read_bytes() == TOKENIZER.read_bytes()
    assert (first.vocab_size, first.end_of_document, first.begin_of_document) == (32_000, 2, 1)


def test_a_folder_that_is_no_data_set_or_a_damaged_one_is_refused_with_the_finding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; write one with `orchestrate tokenize"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    folder = tmp_path / "data"
    tokenize([write_lines(tmp_path / "text.jsonl", TEXTS)], folder)
    manifest = (folder / "manifest.json").read_text()

    (folder / "manifest.json").write_text(manifest.replace('"text_key": "text"', '"text_key": "body"'))
    with pytest.raises(DataError, match="changed by hand"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(manifest.replace('"tokens"', '"tokns"'))
    with pytest.raises(DataError, match="unknown key tokns"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(manifest[:100])
    with pytest.raises(DataError, match="should hold JSON"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(manifest)
    os.truncate(folder / "shard_00000.bin", 100)
    (folder / "shard_00000.idx").unlink()
    with pytest.raises(DataError, match=r"(?s)shard_00000\.bin should have \d+ bytes, found 100.*idx is missing"):
        read_manifest(folder)


def test_the_picture_counts_each_length_in_the_bin_that_holds_it() -> None:
    lengths = numpy.array([*range(1, 3000), 2**20 - 1, 2**20, 2**31 - 1], dtype=numpy.int32)
    for length, index in zip(lengths.tolist(), bins_of(lengths).tolist(), strict=True):
        assert bin_start(index) <= length < bin_start(index + 1)
    counted = count_lengths(lengths[:2500]) + count_lengths(lengths[2500:])
    assert sum(counted.documents) == lengths.size
    assert sum(counted.tokens) == lengths.sum(dtype=numpy.int64)
    assert counted.longest == 2**31 - 1


# --- Requests that cannot be met leave nothing


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "SentencePiece"),
        (b"{}", "SentencePiece"),
        (b"no model " * 1000, "SentencePiece"),
        (None, "exist"),
    ],
)
def test_a_tokenizer_file_that_is_none_is_one_clear_error(tmp_path: Path, content: bytes | None, reason: str) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    if content is not None:
        tokenizer.write_bytes(content)
    source = write_lines(tmp_path / "text.jsonl", TEXTS)
    with pytest.raises(DataError, match=reason) as caught:
        tokenize_corpus([source], tokenizer, tmp_path / "out" / "data", progress=False)
    assert str(tokenizer) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_text_found_names_the_inputs_and_the_kinds_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").touch()
    with pytest.raises(DataError, match=r"pictures; kinds .*\.jsonl.*found instead: 1 \.png"):
        tokenize([folder], tmp_path / "data")
    with pytest.raises(DataError, match="does not exist"):
        tokenize([folder / "a.txt"], tmp_path / "data")
    with pytest.raises(DataError, match="kind that is not read"):
        tokenize([folder / "a.png"], tmp_path / "data")
    (folder / "a.jsonl").write_text('\n{"text": ""}\nhalf')
    with pytest.raises(DataError, match=r"(?s)2 read, 1 empty, 1 unreadable.*a\.jsonl, byte 14: not JSON"):
        tokenize([folder], tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_an_output_folder_that_is_taken_is_left_as_it_was(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", TEXTS)
    for taken in ("data", "data-validation"):
        folder = tmp_path / taken
        folder.mkdir()
        (folder / "mine").touch()
        with pytest.raises(OrchestrateError, match=f"{taken} exists already"):
            tokenize([source], tmp_path / "data", validation_every=2)
        assert [path.name for path in folder.iterdir()] == ["mine"]
        (folder / "mine").unlink()
        folder.rmdir()
        assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_failed_request_for_held_out_documents_leaves_neither_folder(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", TEXTS)
    with pytest.raises(DataError, match="one document in 1000003 leaves none to validate on"):
        tokenize([source], tmp_path / "data", validation_every=1_000_003)
    with pytest.raises(ConfigError, match="use 2 or more"):
        tokenize([source], tmp_path / "data", validation_every=1)
    with pytest.raises(ConfigError, match="add --validation-every"):
        tokenize([source], tmp_path / "data", validation_output=tmp_path / "held")
    with pytest.raises(ConfigError, match="two separate folders"):
        tokenize([source], tmp_path / "data", validation_output=tmp_path / "data" / "held", validation_every=2)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


# --- The command


def test_the_command_prints_a_summary_and_the_next_command(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", [f"text {number}" for number in range(60)])
    with source.open("a") as stream:
        stream.write('{"text": 1}\n')
    output = tmp_path / "my data"
    arguments = [source, "--tokenizer", TOKENIZER, "--output", output, "--validation-every", 3]
    result = run(*arguments, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"JSON lines +1 file, .*\n *units +1, .*\n *engine .*\n *documents +about 61?0?.*1 bad", result.stdout
    )
    assert not output.exists()
    result = run(*arguments, "--max-bad", 0.02)
    assert result.returncode == 0, result.stderr
    held_out = sum(zlib.crc32(f"text {number}".encode()) % 3 == 0 for number in range(60))
    assert f"{60 - held_out} of 61 read, {held_out} held out, 1 quarantined" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next: orchestrate plan ")
    assert f"'data.train={output}' 'data.validation={output}-validation'" in last
    offset = source.stat().st_size - len('{"text": 1}\n')
    assert f"byte {offset}: key 'text' holds a number" in result.stderr
    assert "MB/s" in result.stderr
    for folder in (output, tmp_path / "my data-validation"):
        assert "tokens a document" in "".join(ElementTree.parse(folder / "documents.svg").getroot().itertext())


def test_json_prints_the_manifest_and_only_that(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.csv").write_text("a,b")
    result = run(tmp_path, "--tokenizer", TOKENIZER, "--output", tmp_path / "data", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert "not read: 1 .csv" in result.stderr


def test_exit_codes_tell_a_failure_from_a_wrong_request(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", TEXTS)
    for code, arguments in (
        (1, [tmp_path / "nothing", "--tokenizer", TOKENIZER, "--output", tmp_path / "data"]),
        (2, ["--tokenizer", TOKENIZER, "--output", tmp_path / "data"]),
        (2, [source, "--output", tmp_path / "data"]),
        (2, [source, "--tokenizer", TOKENIZER, "--output", tmp_path / "data", "--validation-every", 1]),
    ):
        result = run(*arguments)
        assert result.returncode == code, result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_the_manifest_is_read_with_the_standard_library_alone(tmp_path: Path) -> None:
    tokenize([write_lines(tmp_path / "text.jsonl", TEXTS)], tmp_path / "data")
    program = (
        "import pathlib, sys; from orchestrator.tokenize.manifest import read_manifest; "
        f"assert read_manifest(pathlib.Path({str(tmp_path / 'data')!r})).documents == {len(TEXTS)}; "
        "heavy = {'numpy', 'torch', 'megatron', 'rich', 'click', 'sentencepiece'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
