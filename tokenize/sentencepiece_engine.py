"""SentencePiece's own library: the reference that the native encoder must equal."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.tokenize.text_engine import TextEngine


class SentencePieceEngine(TextEngine):
    """One thread; several processes share the work."""

    def __init__(self, file: Path) -> None:
        processor = open_model(file)
        if processor.eos_id() < 0:
            raise DataError(
                f"tokenizer {file} has no end-of-sentence piece, and documents need an end; use a model "
                "trained with eos_id"
            )
        begin = int(processor.bos_id())
        super().__init__(
            f"sentencepiece {version('sentencepiece')}",
            lambda texts: processor.encode(list(texts), out_type=int, num_threads=1),
            vocab_size=int(processor.get_piece_size()),
            end_of_document=int(processor.eos_id()),
            begin_of_document=begin if begin >= 0 else None,
        )


def open_model(file: Path) -> Any:
    """Return the library's processor of a model.

    Raises:
        DataError: the file is none.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"tokenizer {file} should be a SentencePiece model (tokenizer.model); the library says: {error}"
        ) from error
