"""Our own encoder of SentencePiece BPE models: the same ids as sentencepiece, at many times its speed.

Exactness rests on one argument, written down in native/encoder.hpp: no merge crosses a pair of characters
that no piece holds, so text may be cut there, and a word between cuts has always the same ids. It is checked
in tests/test_native_engine.py and tests/test_native_corpus.py, and while it runs: of the documents that an
engine encodes, the first and every thousandth after it are encoded by sentencepiece too.

JSON is read by native/json_line.hpp where a line is plainly right; all others are given to `records`, the
reference, which reads them or says why not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.tokenize.engine import BadRecord, EncodedBlock, EngineError
from orchestrator.tokenize.records import RefusedError, decode, text_of_line
from orchestrator.tokenize.sentencepiece_engine import SentencePieceEngine
from orchestrator.tokenize.sentencepiece_model import NotHonouredError, read_bpe_model
from orchestrator.tokenize.shard import token_type


class NativeEngine:
    """The compiled encoder, with sentencepiece beside it as the reference.

    Raises:
        NotHonouredError: the model has rules that it does not know, or it was not compiled here.
        DataError: the file is no SentencePiece model.
    """

    def __init__(self, file: Path) -> None:
        self._reference = SentencePieceEngine(file)
        model = read_bpe_model(file)
        try:
            import orchestrator.tokenize.native_encoder as native_encoder
        except ImportError as error:
            raise NotHonouredError(f"the compiled encoder is not installed ({error})") from error
        self.name = f"native {native_encoder.VERSION}, checked by {self._reference.name}"
        self.vocab_size = self._reference.vocab_size
        self.end_of_document = self._reference.end_of_document
        self.begin_of_document = self._reference.begin_of_document
        kind = {"uint16": native_encoder.Encoder16, "int32": native_encoder.Encoder32}[token_type(self.vocab_size)]
        self._encoder = kind(
            pieces=[(text.encode(), score) for text, score in model.pieces],
            user_defined=[(text.encode(), number) for text, number in model.user_defined],
            bytes=list(model.bytes),
            add_dummy_prefix=model.add_dummy_prefix,
            end_of_document=self.end_of_document,
        )

    def encode_lines(self, lines: bytes, text_key: str) -> EncodedBlock:
        """Encode a block of whole JSON lines."""
        bad: list[BadRecord] = []

        def decide(offset: int, line: bytes) -> bytes | None:
            try:
                return text_of_line(line, text_key)
            except RefusedError as refusal:
                bad.append(BadRecord(offset=offset, reason=str(refusal), content=line))
                return None

        return self._checked(self._encoder.encode_lines(lines, text_key, decide), bad)

    def encode_texts(self, texts: Sequence[bytes]) -> EncodedBlock:
        """Encode texts, each a record."""
        bad: list[BadRecord] = []

        def refuse(number: int) -> None:
            try:
                decode(texts[number])
            except RefusedError as refusal:
                bad.append(BadRecord(offset=number, reason=str(refusal), content=texts[number]))

        return self._checked(self._encoder.encode_texts(texts, refuse), bad)

    def _checked(self, result: tuple[Any, ...], bad: list[BadRecord]) -> EncodedBlock:
        ids, lengths, text_bytes, checksums, records, empty, checks = result
        for text, first, end in checks:
            expected = self._reference.ids(text.decode())
            expected = [*expected, self.end_of_document] if expected else []
            found = ids[first:end].tolist()
            if found != expected:
                place = next((k for k, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
                raise EngineError(
                    f"{self.name}: a document of {len(text)} bytes has other ids than sentencepiece gives, from token "
                    f"{place} on; use --engine sentencepiece, and report this with the document",
                    text,
                )
        if records != len(lengths) + empty + len(bad):
            raise AssertionError(f"{records} records, {len(lengths)} kept, {empty} empty, {len(bad)} bad")
        return EncodedBlock(
            ids=memoryview(ids).cast("B"),
            lengths=lengths,
            text_bytes=text_bytes,
            checksums=checksums,
            records=records,
            empty=empty,
            bad=tuple(bad),
        )
