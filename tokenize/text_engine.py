"""An engine around a library that takes Python strings; lines are read by `records`."""

import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy

from orchestrator.tokenize.engine import BadRecord, EncodedBlock
from orchestrator.tokenize.records import RefusedError, decode, text_of_line
from orchestrator.tokenize.shard import token_type

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


class TextEngine:
    """Encodes blocks by a function from texts to ids.

    Args:
        encode: returns each text's ids, without begin or end of document.
    """

    def __init__(
        self, name: str, encode: Encode, *, vocab_size: int, end_of_document: int, begin_of_document: int | None
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        self.begin_of_document = begin_of_document
        self._encode = encode
        self._type = token_type(vocab_size)

    def encode_lines(self, lines: bytes, text_key: str) -> EncodedBlock:
        """Encode a block of whole JSON lines."""
        return self._encoded(_lines(lines), lambda line: decode(text_of_line(line, text_key)))

    def encode_texts(self, texts: Sequence[bytes]) -> EncodedBlock:
        """Encode texts, each a record."""
        return self._encoded(enumerate(texts), decode)

    def ids(self, text: str) -> Sequence[int]:
        """Return a text's ids, without begin or end of document."""
        return self._encode([text])[0]

    def _encoded(self, records: Iterable[tuple[int, bytes]], text_of: Callable[[bytes], str]) -> EncodedBlock:
        texts: list[str] = []
        bad: list[BadRecord] = []
        for offset, content in records:
            try:
                texts.append(text_of(content))
            except RefusedError as refusal:
                bad.append(BadRecord(offset=offset, reason=str(refusal), content=content))
        encoded = self._encode(texts)
        kept = [(text.encode(), ids) for text, ids in zip(texts, encoded, strict=True) if ids]
        return EncodedBlock(
            ids=b"".join(numpy.asarray([*ids, self.end_of_document], dtype=self._type).tobytes() for _, ids in kept),
            lengths=numpy.asarray([len(ids) + 1 for _, ids in kept], dtype=numpy.int32),
            text_bytes=numpy.asarray([len(text) for text, _ in kept], dtype=numpy.int64),
            checksums=numpy.asarray([zlib.crc32(text) for text, _ in kept], dtype=numpy.uint32),
            records=len(texts) + len(bad),
            empty=len(texts) - len(kept),
            bad=tuple(bad),
        )


def _lines(lines: bytes) -> Iterable[tuple[int, bytes]]:
    offset = 0
    for line in lines.split(b"\n"):
        if line.strip():
            yield offset, line
        offset += len(line) + 1
