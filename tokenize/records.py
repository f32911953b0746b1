"""Read one JSON line strictly: its text, or why it gives none. The reference that the compiled reader must equal.

UTF-8, no NaN, no key twice in one object, since parsers differ on which counts, no lone surrogate. A record
that is refused is kept apart by the caller with this module's reason; none is dropped in silence.
"""

import json
from collections import Counter


class RefusedError(ValueError):
    """A record that is refused; the text is the reason."""


def text_of_line(line: bytes, text_key: str) -> bytes:
    """Return the text of a JSON line in UTF-8.

    Raises:
        RefusedError: the line is no JSON object with a text under that key.
    """
    text = _text_of(_parse(decode(line)), text_key)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(f"lone surrogate at character {error.start} of the text") from error


def decode(content: bytes) -> str:
    """Return text from UTF-8.

    Raises:
        RefusedError: it is none.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"invalid UTF-8 at byte {error.start} of the record: {error.reason}") from error


def _parse(line: str) -> object:
    try:
        return _DECODER.decode(line)
    except RefusedError:
        raise
    except json.JSONDecodeError as error:
        raise RefusedError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise RefusedError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise RefusedError(f"not JSON that can be read: {error}") from error


def _text_of(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        raise RefusedError(f"{_json_name(record)} where an object was wanted")
    if text_key not in record:
        raise RefusedError(f"no key {text_key!r}")
    text = record[text_key]
    if not isinstance(text, str):
        raise RefusedError(f"key {text_key!r} holds {_json_name(text)}, not text")
    return text


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RefusedError(f"duplicate key {twice!r}")
    return record


def _refuse_constant(name: str) -> object:
    raise RefusedError(f"not JSON: {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
