"""What turns text into token ids, a block of documents at a time, and what it gives.

    native         our own encoder of SentencePiece BPE models (native_engine.py); ids equal sentencepiece's
    sentencepiece  Google's library: the reference, and for models whose rules the native one does not honour
    tokenizers     Hugging Face's library, for a tokenizer.json

Special tokens written in the text stay text, with each of them. The end of document is appended by its id,
and only by us.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError

EngineChoice = Literal["auto", "native", "sentencepiece", "tokenizers"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """A record of a block that gives no text."""

    offset: int
    """Byte in the block of lines at which it begins; of a block of texts, the number of the text."""
    reason: str
    content: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """What became of a block. `records == len(lengths) + empty + len(bad)`."""

    ids: bytes | memoryview
    """Of the documents kept, one after another, each with its end; little-endian, in the engine's token type."""
    lengths: NDArray[numpy.int32]
    """Tokens of each document kept, its end included."""
    text_bytes: NDArray[numpy.int64]
    """UTF-8 bytes of each document kept."""
    checksums: NDArray[numpy.uint32]
    """CRC-32 of each document kept, as zlib.crc32 of its UTF-8."""
    records: int
    empty: int
    """Documents that give no token; not among those kept."""
    bad: tuple[BadRecord, ...]


class EngineError(DataError):
    """The native encoder and sentencepiece disagree; `document` is the text."""

    def __init__(self, message: str, document: bytes) -> None:
        super().__init__(message)
        self.document = document


class Engine(Protocol):
    """Encodes blocks of documents with one vocabulary."""

    name: str
    """Library and version, for the record."""
    vocab_size: int
    end_of_document: int
    begin_of_document: int | None

    def encode_lines(self, lines: bytes, text_key: str) -> EncodedBlock:
        """Encode a block of whole JSON lines; the last may lack its line end. Blank lines are no records.

        Raises:
            EngineError: a document that was checked has other ids by the reference.
        """

    def encode_texts(self, texts: Sequence[bytes]) -> EncodedBlock:
        """Encode texts, each a record; one that is no UTF-8 is bad. Raises as `encode_lines`."""
