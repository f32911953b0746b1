"""Turn text into token ids. One engine so far: SentencePiece, the reference that others must equal.

Special tokens written in the text stay text: SentencePiece never makes a CONTROL piece from text, so
a literal `</s>` in a web page becomes the pieces of its characters. Hugging Face's tokenizers make
the end-of-document id of it. The end of document is appended by its id, and only by us.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from orchestrator.errors import DataError


class Engine(Protocol):
    """Encodes text with one vocabulary."""

    name: str
    """Library and version, for the record."""
    vocab_size: int
    end_of_document: int
    begin_of_document: int | None

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return each text's ids, without begin or end of document; texts hold no lone surrogate."""


def load_engine(tokenizer: Path) -> tuple[Engine, Path]:
    """Return the engine for a tokenizer, and the tokenizer's file.

    Args:
        tokenizer: a SentencePiece model, or a model folder that has a `tokenizer.model`.

    Raises:
        DataError: it is none.
    """
    file = tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise DataError(
            f"tokenizer {file} does not exist; give the path of a SentencePiece model, "
            "such as the tokenizer.model of a Llama or Mistral folder"
        )
    return SentencePieceEngine(file), file


class SentencePieceEngine:
    """SentencePiece's own library, with as many threads as this process has cores."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"tokenizer {file} should be a SentencePiece model (tokenizer.model); the library says: "
                f"{error}. A tokenizer.json is not read yet"
            ) from error
        if self._processor.eos_id() < 0:
            raise DataError(
                f"tokenizer {file} has no end-of-sentence piece, and documents need an end; use a model "
                "trained with eos_id"
            )
        self.name = f"sentencepiece {version('sentencepiece')}"
        self.vocab_size = int(self._processor.get_piece_size())
        self.end_of_document = int(self._processor.eos_id())
        begin = int(self._processor.bos_id())
        self.begin_of_document = begin if begin >= 0 else None
        self._threads = len(os.sched_getaffinity(0))

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return each text's ids."""
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=self._threads)
        return ids
