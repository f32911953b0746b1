"""A tokenizer.json through Hugging Face's library: the ids of its vocabulary, and special tokens that stay text."""

import json
from pathlib import Path

import numpy
import pytest

from orchestrator.errors import DataError
from orchestrator.tokenize.engine import EncodedBlock
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.hugging_face import tokenizer_files
from orchestrator.tokenize.sentencepiece_engine import SentencePieceEngine
from tests.encoder_fuzz import VOCABULARIES

TEXTS = [
    "plain text",
    "a web page that says </s> and <s> and <unk>",
    "</s>",
    "  spaces\n\n\tkept ",
    "한국어 日本語 😀 \x00",
    "def f():\n    return 1\n" * 20,
]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder as `orchestrate export` makes it, without the SentencePiece model."""
    for name, content in tokenizer_files(VOCABULARIES["v1"]).items():
        (tmp_path / name).write_text(content)
    return tmp_path


def documents(block: EncodedBlock) -> list[list[int]]:
    ids = numpy.frombuffer(block.ids, dtype=numpy.uint16)
    return [part.tolist() for part in numpy.split(ids, numpy.cumsum(block.lengths)[:-1])]


def test_ids_equal_sentencepieces_and_special_tokens_in_the_text_stay_text(model_folder: Path) -> None:
    engine, file = load_engine(model_folder)
    assert file == model_folder / "tokenizer.json"
    assert engine.name.startswith("tokenizers ")
    assert (engine.vocab_size, engine.end_of_document, engine.begin_of_document) == (32_000, 2, 1)
    reference = SentencePieceEngine(VOCABULARIES["v1"])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]).encode()
    found, expected = engine.encode_lines(lines, "text"), reference.encode_lines(lines, "text")
    assert documents(found) == documents(expected)
    assert found.empty == 1
    assert all(ids.count(2) == 1 and ids[-1] == 2 for ids in documents(found))


def test_a_model_folder_is_served_by_its_sentencepiece_model_first(model_folder: Path) -> None:
    (model_folder / "tokenizer.model").write_bytes(VOCABULARIES["v1"].read_bytes())
    engine, file = load_engine(model_folder)
    assert file.name == "tokenizer.model"
    assert engine.name.startswith("native ")
    (model_folder / "tokenizer.model").unlink()
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"should have a tokenizer\.model or a tokenizer\.json, has neither"):
        load_engine(model_folder)


def test_truncation_and_padding_of_the_file_are_not_applied(model_folder: Path) -> None:
    path = model_folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    engine, _ = load_engine(path)
    reference = SentencePieceEngine(VOCABULARIES["v1"])
    texts = [text.encode() for text in TEXTS]
    assert documents(engine.encode_texts(texts)) == documents(reference.encode_texts(texts))


def test_a_tokenizer_json_without_an_end_of_document_is_refused(model_folder: Path) -> None:
    config = model_folder / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(DataError, match=r"does not say which token that is; put a tokenizer_config\.json"):
        load_engine(model_folder)
    config.write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(DataError, match="names '<end>' as eos_token, and the tokenizer has no such token"):
        load_engine(model_folder)
    config.write_text('{"eos_token": {"content": "</s>"}}')
    assert load_engine(model_folder)[0].end_of_document == 2


def test_a_file_that_is_no_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"vocab": 1}')
    with pytest.raises(DataError, match=r"should be a tokenizer\.json of Hugging Face"):
        load_engine(path)
    with pytest.raises(DataError, match="engine native was asked for"):
        load_engine(path, "native")
    with pytest.raises(DataError, match="engine tokenizers was asked for"):
        load_engine(VOCABULARIES["v1"], "tokenizers")
    with pytest.raises(DataError, match="does not exist"):
        load_engine(tmp_path / "nowhere.model")
