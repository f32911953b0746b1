"""Real text as tokens for depth_recovery.py: English documentation, and Python for a change of kind.

English: manual pages with their roff, Git's and Perl's documentation, LibreOffice's and GNOME's help, Debian's
installation guide; not WordNet, whose files are records. Python: Django and SymPy. A file of a package is held out
whole or not at all. The vocabulary is made from English alone: a base's is made before anybody knows what follows.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import sentencepiece
from numpy.typing import NDArray

from orchestrator.files import new_folder
from tests.text_corpus import corpus

KINDS = ("English", "Python")
LEFT_OUT = ("wordnet-base",)
HELD_OUT_ONE_IN = 25
VOCABULARY = 1024
VOCABULARY_BYTES = 4_000_000
END_OF_DOCUMENT = 2


Ids = NDArray[numpy.uint16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Documents of each kind, each with its end token: to train on and to be judged by; the SHA-256 of all."""

    training: dict[str, Ids]
    held_out: dict[str, Ids]
    checksum: str


def open_text(folder: Path) -> Text:
    """Return the tokens kept in `folder`; they are made where it does not exist yet.

    Raises:
        RuntimeError: the corpus cannot be built on this system.
    """
    if not folder.exists():
        with new_folder(folder) as building:
            _build(building)
    found: dict[str, dict[str, Ids]] = {
        part: {kind: numpy.load(folder / f"{kind}-{part}.npy") for kind in KINDS} for part in ("training", "held_out")
    }
    checksum = hashlib.sha256()
    for kinds in found.values():
        for ids in kinds.values():
            checksum.update(ids.tobytes())
    return Text(**found, checksum=checksum.hexdigest())


def _build(folder: Path) -> None:
    documents: dict[tuple[str, str], list[str]] = {
        (kind, part): [] for kind in KINDS for part in ("training", "held_out")
    }
    for kind, source, text in _documents(corpus()):
        file = source.rpartition("#")[0]
        held_out = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0
        documents[kind, "held_out" if held_out else "training"].append(text)
    model = folder / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(documents["English", "training"], VOCABULARY_BYTES),
        model_prefix=str(model.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\t"],
        num_threads=1,
        minloglevel=2,
    )
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for (kind, part), texts in documents.items():
        ids = [numpy.array([*encoder.encode(text), END_OF_DOCUMENT], numpy.uint16) for text in texts]
        numpy.save(folder / f"{kind}-{part}.npy", numpy.concatenate(ids))


def _documents(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield kind, source and text of the documents that are used, in the corpus's order."""
    with file.open("rb") as lines:
        for line in lines:
            record = json.loads(line)
            if record["lang"] in KINDS and not record["source"].startswith(LEFT_OUT):
                yield record["lang"], record["source"], record["text"]


def _lines(texts: list[str], most_bytes: int) -> Iterator[str]:
    size = 0
    for text in texts:
        size += len(text.encode())
        if size > most_bytes:
            return
        yield from (line for line in text.split("\n") if line)
