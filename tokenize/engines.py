"""Which engine serves a tokenizer."""

import logging
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.tokenize.engine import Engine, EngineChoice
from orchestrator.tokenize.native_engine import NativeEngine
from orchestrator.tokenize.sentencepiece_engine import SentencePieceEngine
from orchestrator.tokenize.sentencepiece_model import NotHonouredError
from orchestrator.tokenize.tokenizers_engine import TokenizersEngine

log = logging.getLogger(__name__)


def load_engine(
    tokenizer: Path, choice: EngineChoice = "auto", notice: Callable[[str], object] = log.warning
) -> tuple[Engine, Path]:
    """Return the engine for a tokenizer, and the tokenizer's file.

    Args:
        tokenizer: a SentencePiece model or a tokenizer.json, or a model folder that has one of them.
        notice: told where a SentencePiece model is not served by the native encoder, and why.

    Raises:
        DataError: it is none, or the engine chosen does not serve it.
    """
    file = tokenizer_file(tokenizer)
    is_json = file.suffix.lower() == ".json"
    if is_json != (choice == "tokenizers") and choice != "auto":
        serves = (
            "a tokenizer.json; use --engine tokenizers" if is_json else "a SentencePiece model; use --engine native"
        )
        raise DataError(f"engine {choice} was asked for, and {file} is {serves}, or leave the engine out")
    if is_json:
        return TokenizersEngine(file), file
    if choice == "sentencepiece":
        return SentencePieceEngine(file), file
    try:
        return NativeEngine(file), file
    except NotHonouredError as refusal:
        if choice == "native":
            raise DataError(
                f"the native encoder does not serve {file}: {refusal}; use --engine sentencepiece"
            ) from refusal
        notice(f"sentencepiece serves {file}, much slower than the native encoder, which does not: {refusal}")
        return SentencePieceEngine(file), file


def tokenizer_file(tokenizer: Path) -> Path:
    """Return the file of a tokenizer that was given as a file or as a model folder.

    Raises:
        DataError: there is none.
    """
    if tokenizer.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (tokenizer / name).is_file():
                return tokenizer / name
        raise DataError(f"tokenizer folder {tokenizer} should have a tokenizer.model or a tokenizer.json, has neither")
    if not tokenizer.is_file():
        raise DataError(
            f"tokenizer {tokenizer} does not exist; give the path of a SentencePiece model, such as the "
            "tokenizer.model of a Llama or Mistral folder, or of a tokenizer.json"
        )
    return tokenizer
