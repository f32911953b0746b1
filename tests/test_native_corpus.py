"""The native encoder's ids against sentencepiece's on all of a real corpus, for two vocabularies.

    python -m pytest tests/test_native_corpus.py --whole-corpus

takes more than 200 MB in nine scripts and code (tests/text_corpus.py), and four minutes; without the switch a part of
it, with text of every script. Three quarters of the time is sentencepiece.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mistral_common
import numpy
import pytest
import sentencepiece
from numpy.typing import NDArray

from orchestrator.tokenize.engines import load_engine
from tests import text_corpus

VOCABULARIES = Path(mistral_common.__file__).parent / "data"
BLOCK_BYTES = 4_000_000
SCRIPTS = ("English", "C", "Korean", "Japanese", "Chinese", "German", "French", "Russian", "Greek")

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="the corpus is built from packages of Debian")


@pytest.fixture(scope="module")
def is_whole(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--whole-corpus"))


@pytest.fixture(scope="module")
def corpus(is_whole: bool) -> Path:
    return text_corpus.corpus(small=not is_whole)


def test_each_script_has_its_part_of_the_corpus(corpus: Path, is_whole: bool) -> None:
    sizes = text_corpus.languages(corpus)
    total, least = (200e6, 8e6) if is_whole else (20e6, 0.25e6)
    wanted = SCRIPTS if is_whole else [*SCRIPTS[:1], "Python", *SCRIPTS[2:]]
    assert sizes.total() > total
    assert {language: sizes[language] for language in wanted if sizes[language] < least} == {}


@pytest.mark.parametrize("vocabulary", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_every_document_of_the_corpus_has_sentencepieces_ids(corpus: Path, is_whole: bool, vocabulary: str) -> None:
    engine, file = load_engine(VOCABULARIES / vocabulary, "native")
    assert engine.name.startswith("native")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    token_type = numpy.uint16 if engine.vocab_size < 65_500 else numpy.int32
    documents = 0
    for lines in blocks(corpus):
        block = engine.encode_lines(b"".join(lines), "text")
        texts = [json.loads(line)["text"] for line in lines]
        lengths, ids = expected(reference, texts)
        assert (block.records, block.empty, block.bad) == (len(lines), 0, ())
        found = numpy.frombuffer(block.ids, dtype=token_type)
        if not (numpy.array_equal(block.lengths, lengths) and numpy.array_equal(found, ids)):
            pytest.fail(f"other ids in {differing(lines, (block.lengths, found), (lengths, ids))}")
        documents += len(lines)
    assert documents > (40_000 if is_whole else 4_000)


def blocks(file: Path) -> Iterator[list[bytes]]:
    """Yield the lines of a file in lists of about 4 MB."""
    with file.open("rb") as lines:
        while block := lines.readlines(BLOCK_BYTES):
            yield block


def expected(
    reference: sentencepiece.SentencePieceProcessor, texts: list[str]
) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Return the tokens of each document, its end included, and the ids of all of them."""
    encoded = reference.encode(texts, out_type=int, num_threads=2)
    for ids in encoded:
        ids.append(reference.eos_id())
    lengths = numpy.asarray([len(ids) for ids in encoded])
    return lengths, numpy.fromiter(itertools.chain.from_iterable(encoded), dtype=numpy.int64, count=lengths.sum())


def differing(lines: list[bytes], *sides: tuple[NDArray[Any], NDArray[Any]]) -> list[str]:
    """Return the sources of the documents whose ids are not the same on both sides."""
    ours, theirs = (numpy.split(ids, numpy.cumsum(lengths)[:-1]) for lengths, ids in sides)
    pairs = zip(lines, ours, theirs, strict=True)
    return [json.loads(line)["source"] for line, mine, other in pairs if not numpy.array_equal(mine, other)]
