"""Find text files and read their documents; what cannot be read becomes a record that says why.

Nothing is dropped in silence. Readers elsewhere stop at the first bad line and report success
(measured: gigatoken's JSON reader, and so Megatron's fast script); here every line that is not blank
and every plain file gives either a Document or a BadRecord with its byte offset.

JSON is read strictly: UTF-8, no NaN, no key twice in one object, since parsers differ on which
counts. A byte order mark at the start of a file is skipped. Line ends inside a plain text file are
kept as they are.
"""

import dataclasses
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.errors import DataError

JSON_LINES = frozenset({".jsonl"})
PLAIN_TEXT = frozenset({".txt", ".py", ".rst", ".md"})
KINDS = ".jsonl (JSON lines), and .txt, .py, .rst, .md (one document a file)"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and how long it is."""

    text: str
    text_bytes: int
    """In UTF-8."""
    source_bytes: int
    """What it took in its file."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """A line or a file that gives no text."""

    file: Path
    offset: int
    """Byte in the file at which the record begins."""
    reason: str
    content: bytes

    @property
    def source_bytes(self) -> int:
        """What it took in its file."""
        return len(self.content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files to read, in order, and how many were left out."""

    files: tuple[Path, ...]
    skipped: dict[str, int]
    """Files of other kinds by suffix, and hidden files and folders as 'hidden'."""

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.stat().st_size for file in self.files)


def find_files(inputs: Sequence[Path]) -> FoundFiles:
    """Return the text files of files, folders and glob patterns: in the order given, a folder's sorted.

    Names that begin with a dot are left out of folders, and a file that is named twice is read once.

    Raises:
        DataError: an input does not exist, a named file is of another kind, or no text was found.
    """
    unique: dict[Path, Path] = {}
    skipped: Counter[str] = Counter()
    for given in inputs:
        named = given.exists()
        if not named and not glob.has_magic(str(given)):
            raise DataError(f"input {given} does not exist; give a file, a folder or a glob of {KINDS}")
        for path in [given] if named else sorted(_glob(given)):
            if path.is_dir():
                for file in _walk(path, skipped):
                    unique.setdefault(file.resolve(), file)
            elif path.suffix.lower() in JSON_LINES | PLAIN_TEXT:
                unique.setdefault(path.resolve(), path)
            elif named:
                raise DataError(f"input {path} is of a kind that is not read; kinds are {KINDS}")
            else:
                skipped[path.suffix.lower() or "no suffix"] += 1
    if not unique:
        names = ", ".join(map(str, inputs)) or "no input"
        other = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
        raise DataError(
            f"no text found in {names}; kinds that are read are {KINDS}; found instead: {other or 'nothing'}"
        )
    return FoundFiles(files=tuple(unique.values()), skipped=dict(sorted(skipped.items())))


def read_documents(file: Path, text_key: str) -> Iterator[Document | BadRecord]:
    """Yield what a file holds, in its order; blank lines of JSON lines are no records.

    Raises:
        DataError: the file cannot be opened or read.
    """
    try:
        with file.open("rb") as stream:
            if file.suffix.lower() in PLAIN_TEXT:
                yield _read_text(file, stream.read())
                return
            offset = 0
            for line in stream:
                start = len(BYTE_ORDER_MARK) if offset == 0 and line.startswith(BYTE_ORDER_MARK) else 0
                if line[start:].strip():
                    yield _read_line(file, offset + start, line[start:], text_key)
                offset += len(line)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; make it readable or leave it out") from error


def _glob(pattern: Path) -> list[Path]:
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
    return [Path(name) for name in names]


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        hidden = [name for name in [*folders, *names] if name.startswith(".")]
        if hidden:
            skipped["hidden"] += len(hidden)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(set(names) - set(hidden)):
            path = Path(root, name)
            if path.suffix.lower() not in JSON_LINES | PLAIN_TEXT:
                skipped[path.suffix.lower() or "no suffix"] += 1
            elif path.is_file():
                yield path
            else:
                skipped["no file"] += 1


class _RefusedError(ValueError):
    """A record that is refused; the text is the reason."""


def _read_text(file: Path, content: bytes) -> Document | BadRecord:
    try:
        text = _decode(content.removeprefix(BYTE_ORDER_MARK))
    except _RefusedError as refusal:
        return BadRecord(file=file, offset=0, reason=str(refusal), content=content)
    text_bytes = len(content.removeprefix(BYTE_ORDER_MARK))
    return Document(text=text, text_bytes=text_bytes, source_bytes=len(content))


def _read_line(file: Path, offset: int, line: bytes, text_key: str) -> Document | BadRecord:
    try:
        text = _text_of(_parse(_decode(line)), text_key)
        text_bytes = _utf8_size(text)
    except _RefusedError as refusal:
        return BadRecord(file=file, offset=offset, reason=str(refusal), content=line)
    return Document(text=text, text_bytes=text_bytes, source_bytes=len(line))


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RefusedError(f"invalid UTF-8 at byte {error.start} of the record: {error.reason}") from error


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _RefusedError(f"lone surrogate at character {error.start} of the text") from error


def _parse(line: str) -> object:
    try:
        return _DECODER.decode(line)
    except _RefusedError:
        raise
    except json.JSONDecodeError as error:
        raise _RefusedError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise _RefusedError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise _RefusedError(f"not JSON that can be read: {error}") from error


def _text_of(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        raise _RefusedError(f"{_json_name(record)} where an object was wanted")
    if text_key not in record:
        raise _RefusedError(f"no key {text_key!r}")
    text = record[text_key]
    if not isinstance(text, str):
        raise _RefusedError(f"key {text_key!r} holds {_json_name(text)}, not text")
    return text


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RefusedError(f"duplicate key {twice!r}")
    return record


def _refuse_constant(name: str) -> object:
    raise _RefusedError(f"not JSON: {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
