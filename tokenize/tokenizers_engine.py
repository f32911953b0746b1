"""Hugging Face's tokenizers library, for a tokenizer.json.

It makes the id of a special token of the same characters in a text, so that a web page that says `</s>` would end
its document; `encode_special_tokens` keeps them text.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.tokenize.text_engine import TextEngine

CONFIG = "tokenizer_config.json"


class TokenizersEngine(TextEngine):
    """One thread; several processes share the work. The end of document is the eos_token of tokenizer_config.json."""

    def __init__(self, file: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch
        tokenizer = open_tokenizer(file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        config = _config_of(file)
        end = _id_of(tokenizer, config, "eos_token")
        if end is None:
            raise DataError(
                f"documents need an end, and {file} does not say which token that is; put a {CONFIG} beside it "
                'that names its "eos_token"'
            )

        def encode(texts: Any) -> list[list[int]]:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

        highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        super().__init__(
            f"tokenizers {version('tokenizers')}",
            encode,
            vocab_size=highest + 1,
            end_of_document=end,
            begin_of_document=_id_of(tokenizer, config, "bos_token"),
        )


def open_tokenizer(file: Path) -> Any:
    """Return the library's tokenizer of a tokenizer.json.

    Raises:
        DataError: the file is none.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing narrower
        raise DataError(
            f"tokenizer {file} should be a tokenizer.json of Hugging Face; the library says: {error}"
        ) from error


def _config_of(file: Path) -> dict[str, Any]:
    path = file.with_name(CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} should hold JSON: {error}; restore it") from error
    return config if isinstance(config, dict) else {}


def _id_of(tokenizer: Any, config: dict[str, Any], name: str) -> int | None:
    """Return the id of a token that the configuration names as a text or as an object with its content."""
    token = config.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return None
    number: int | None = tokenizer.token_to_id(content)
    if number is None:
        raise DataError(f"{CONFIG} names {content!r} as {name}, and the tokenizer has no such token; mend one of them")
    return number
