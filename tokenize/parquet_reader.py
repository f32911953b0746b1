"""Read the text column of parquet files, row group by row group, in bounded memory; the owner of pyarrow.

A column of strings or bytes of any Arrow type becomes one buffer of bytes with offsets; a text is a slice of it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet

from orchestrator.errors import DataError
from orchestrator.tokenize.line_reader import SAMPLE_BYTES
from orchestrator.tokenize.source_errors import changed, printable, reading

# Pages are read through a buffer of this size, not a whole column of a row group at once; checksums of pages are
# verified where the file has them.
READING = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Texts of consecutive rows of a file."""

    texts: list[bytes]
    rows: list[int]
    """The row in the file of each text."""
    nulls: list[int]
    """Rows without a text."""
    too_long: list[tuple[int, bytes]]
    """Rows whose text is too long, with its beginning."""
    end: int
    """The row behind the last."""
    source_bytes: int
    """On disk, all columns: the rows' share of their row group."""


def read_row_groups(path: str, text_key: str | None) -> tuple[int, ...]:
    """Return the bytes on disk of each row group: its share of the file.

    Args:
        text_key: the column that should hold text; None: not looked for.

    Raises:
        DataError: the file cannot be read, is damaged, or has no such column of text.
    """
    with _open(path) as file:
        if text_key is not None:
            _check_column(path, file, text_key)
        return _row_group_bytes(path, file)


def read_rows(
    path: str, groups: range, first_row: int, text_key: str, *, block_bytes: int, block_texts: int, record_bytes: int
) -> Iterator[Rows]:
    """Yield the rows of row groups, from row `first_row` of the file on where that is later, about a block at a time.

    Raises:
        DataError: the file cannot be read, is damaged, is another one than was planned, or has no such column of text.
    """
    with _open(path) as file:
        _check_column(path, file, text_key)
        if file.num_row_groups < groups.stop:
            raise changed(path, f"at least {groups.stop} row groups", str(file.num_row_groups))
        group_bytes = _row_group_bytes(path, file)
        row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for group in groups:
            facts = file.metadata.row_group(group)
            if row + facts.num_rows <= first_row:
                row += facts.num_rows
                continue
            batch_rows = max(1, min(block_texts, block_bytes // _mean_text_bytes(facts, text_key)))
            row_bytes = group_bytes[group] / max(1, facts.num_rows)
            for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[text_key], use_threads=False):
                passed = min(max(first_row - row, 0), batch.num_rows)
                yield from _cut(batch.column(0)[passed:], row + passed, row_bytes, block_bytes, record_bytes)
                row += batch.num_rows
        if first_row > row:
            raise changed(path, f"at least {first_row} rows up to row group {groups.stop}", str(row))


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    # OSFile takes a name of any bytes; ParquetFile itself takes UTF-8 only.
    with (
        reading(path, pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError),
        pyarrow.OSFile(os.fsencode(path)) as source,
        pyarrow.parquet.ParquetFile(source, **READING) as file,
    ):
        yield file


def _check_column(path: str, file: Any, text_key: str) -> None:
    schema = file.schema_arrow
    found = [field.type for field in schema if field.name == text_key]
    if len(found) != 1:
        names = ", ".join(repr(name) for name in schema.names)
        raise DataError(
            f"{printable(path)} should have one column {text_key!r} and has {len(found)}; its columns are {names}; "
            "name the one with the text by --text-key, or leave the file out"
        )
    type_ = found[0].value_type if pyarrow.types.is_dictionary(found[0]) else found[0]
    if type_ not in _text_types():
        raise DataError(
            f"{printable(path)} should have text in column {text_key!r}, a string or binary, and has {type_}; "
            "name another column by --text-key, or leave the file out"
        )


def _text_types() -> tuple[Any, ...]:
    return (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
    )


def _row_group_bytes(path: str, file: Any) -> tuple[int, ...]:
    # Footers count compressed bytes by column; by row group only before compression.
    sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    total = max(1, sum(sizes))
    file_bytes = os.path.getsize(path)  # noqa: PTH202, a path as text
    return tuple(file_bytes * size // total for size in sizes)


def _mean_text_bytes(facts: Any, text_key: str) -> int:
    """Return the bytes of a text of a row group, on average, at least 1; a dictionary hides repeated texts."""
    columns = (facts.column(index) for index in range(facts.num_columns))
    size: int = next(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
    rows: int = facts.num_rows
    return max(1, size // max(1, rows))


def _cut(column: Any, first_row: int, row_bytes: float, block_bytes: int, record_bytes: int) -> Iterator[Rows]:
    """Cut a column of consecutive rows into blocks; a text is copied once."""
    array = column.cast(pyarrow.large_binary())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = numpy.frombuffer(offsets_buffer, dtype=numpy.int64)[array.offset : array.offset + len(array) + 1]
    data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    is_too_long = numpy.diff(offsets) > record_bytes
    bounds = offsets.tolist()
    start = 0
    while start < len(array):
        fitting = int(numpy.searchsorted(offsets, bounds[start] + block_bytes, side="right")) - 1
        stop = max(start + 1, fitting)
        part = slice(start, stop)
        kept = numpy.flatnonzero(~(is_null[part] | is_too_long[part])) + start
        nulls = numpy.flatnonzero(is_null[part]) + start
        long = (numpy.flatnonzero(is_too_long[part]) + start).tolist()
        yield Rows(
            texts=[bytes(data[bounds[row] : bounds[row + 1]]) for row in kept.tolist()],
            rows=(kept + first_row).tolist(),
            nulls=(nulls + first_row).tolist(),
            too_long=[(row + first_row, bytes(data[bounds[row] : bounds[row] + SAMPLE_BYTES])) for row in long],
            end=first_row + stop,
            source_bytes=round((stop - start) * row_bytes),
        )
        start = stop
