"""Split a corpus into units of work, by the sizes of its files alone: pure, and the same for any number of workers.

A unit is a few slices of files in the order of the inputs; one process reads it, and it becomes one shard. A large
file of JSON lines is cut at any byte: a line belongs to the slice in which it begins. A large parquet file is cut
between row groups. Other files are whole, so that a unit may be larger than was wanted.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import accumulate

SMALLEST_UNIT_BYTES = 32 << 20
LARGEST_UNIT_BYTES = 4 << 30
UNITS_WANTED = 1024

# A compressed file holds about so many times its size of text.
TEXT_OF_COMPRESSED = 4
# Opening a file takes about as long as reading so much, more on a network file system.
LEAST_FILE_BYTES = 8 << 10


class Kind(StrEnum):
    """How a file holds text."""

    LINES = "JSON lines"
    GZIP_LINES = "JSON lines, gzip"
    ZSTD_LINES = "JSON lines, zstd"
    PARQUET = "parquet"
    PLAIN_TEXT = "plain text"


SUFFIXES = {
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".jsonl.gz": Kind.GZIP_LINES,
    ".ndjson.gz": Kind.GZIP_LINES,
    ".json.gz": Kind.GZIP_LINES,  # C4 and Dolma name JSON lines so
    ".jsonl.zst": Kind.ZSTD_LINES,
    ".ndjson.zst": Kind.ZSTD_LINES,
    ".json.zst": Kind.ZSTD_LINES,
    ".parquet": Kind.PARQUET,
    ".txt": Kind.PLAIN_TEXT,
    ".py": Kind.PLAIN_TEXT,
    ".rst": Kind.PLAIN_TEXT,
    ".md": Kind.PLAIN_TEXT,
}


def is_read(name: str) -> bool:
    """Return whether a file is of a kind that is read: by its suffix, in any case."""
    return suffix_of(name) in SUFFIXES


def kind_of(name: str) -> Kind:
    """Return the kind of a file that `is_read`.

    Raises:
        KeyError: it is of none.
    """
    return SUFFIXES[suffix_of(name)]


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case, of a compressed file with the one before, or nothing where it has none."""
    stem, dot, last = name.lower().rpartition(".")
    if last in ("gz", "zst"):
        stem, dot, before = stem.rpartition(".")
        last = f"{before}.{last}"
    return f".{last}" if dot else ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file to read."""

    path: str
    """As it is opened; bytes of the name that are no UTF-8 are surrogates, as in `os.fsdecode`."""
    size_bytes: int
    row_groups: tuple[int, ...] = ()
    """Of parquet: bytes on disk of each row group."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A part of a file.

    Of plain JSON lines the bytes [start, stop): the lines that begin in it. Of parquet the row groups [start, stop).
    Of other kinds the whole file: 0 and its size.
    """

    file: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Slices that one process reads, in order."""

    number: int
    slices: tuple[Slice, ...]
    source_bytes: int
    """On disk."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Position:
    """Where in a unit to go on reading."""

    slice: int
    """Index into the unit's slices; their number is the end."""
    offset: int
    """Of lines the byte in the file, decompressed; of parquet the row in the file. What lies before the slice, such
    as 0, is its beginning."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    slice: Slice
    source_bytes: int
    text_bytes: int


def plan_units(files: Sequence[SourceFile], unit_bytes: int | None = None) -> tuple[Unit, ...]:
    """Split files into units, in their order; each line, row and file is in exactly one.

    Args:
        unit_bytes: text of a unit, at least 1; by default `choose_unit_bytes`.
    """
    wanted = choose_unit_bytes(files) if unit_bytes is None else unit_bytes
    units: list[Unit] = []
    pieces: list[_Piece] = []
    filled = 0
    for file in files:
        for piece in _pieces(file, wanted):
            if pieces and filled + piece.text_bytes > wanted:
                units.append(_unit(len(units), pieces))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.text_bytes
    if pieces:
        units.append(_unit(len(units), pieces))
    return tuple(units)


def choose_unit_bytes(files: Sequence[SourceFile]) -> int:
    """Return the text of a unit, in bytes: about a thousand units, none tiny, and shards that can be handled."""
    text_bytes = sum(_text_bytes(kind_of(file.path), file.size_bytes) for file in files)
    return min(max(text_bytes // UNITS_WANTED, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


def _text_bytes(kind: Kind, source_bytes: int) -> int:
    factor = 1 if kind in (Kind.LINES, Kind.PLAIN_TEXT) else TEXT_OF_COMPRESSED
    return max(factor * source_bytes, LEAST_FILE_BYTES)


def _unit(number: int, pieces: Sequence[_Piece]) -> Unit:
    slices = tuple(piece.slice for piece in pieces)
    return Unit(number=number, slices=slices, source_bytes=sum(piece.source_bytes for piece in pieces))


def _pieces(file: SourceFile, wanted: int) -> Iterator[_Piece]:
    kind = kind_of(file.path)
    for start, stop, source_bytes in _cuts(kind, file, wanted):
        slice_ = Slice(file=file.path, start=start, stop=stop)
        yield _Piece(slice_, source_bytes, _text_bytes(kind, source_bytes))


def _cuts(kind: Kind, file: SourceFile, wanted: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, bytes on disk) of a file's slices."""
    size = file.size_bytes
    if kind is Kind.LINES and size > wanted:
        for start in range(0, size, wanted):
            stop = min(start + wanted, size)
            yield start, stop, stop - start
    elif kind is Kind.PARQUET:
        start = 0
        ends = [0, *accumulate(file.row_groups)]
        for group in range(1, len(ends)):
            is_last = group == len(file.row_groups)
            if is_last or (ends[group + 1] - ends[start]) * TEXT_OF_COMPRESSED > wanted:
                yield start, group, ends[group] - ends[start]
                start = group
    else:
        yield 0, size, size
