"""Read a unit of work as blocks of records, from any position on, in memory of a few blocks whatever the files' size.

A block is either whole JSON lines of one file or texts, and knows where each of its records stands and from where
reading goes on behind it. What was read before a position and what is read from it on are together the unit, each
record once. A file that is another one than when the work was planned, that is damaged or was cut off, stops the
reading with an error: a compressed file that ends early is never taken for a shorter one.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from io import FileIO

from backports import zstd
from isal import igzip, isal_zlib

from orchestrator.tokenize.engine import BadRecord
from orchestrator.tokenize.line_reader import BYTE_ORDER_MARK, SAMPLE_BYTES, Stream, read_lines
from orchestrator.tokenize.source_errors import changed, printable, reading
from orchestrator.tokenize.units import Kind, Position, Slice, Unit, kind_of

# Compressed files are passed over in pieces of this size where reading goes on in their middle.
PASSED_BYTES = 1 << 20
# The largest window, 2 GiB, as of `zstd --long=31`; a file takes only what it was made with.
ZSTD_WINDOW_LOG = 31


# Text of a block, about; a longer record is a block of its own.
BLOCK_BYTES = 4 << 20
BLOCK_TEXTS = 4096
# A longer record is a bad one: engines take less than 2 GiB.
RECORD_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Records that are encoded together: lines, or texts where these are not None."""

    lines: bytes = b""
    """Whole JSON lines of one file; the last of the file may lack its line end."""
    texts: list[bytes] | None = None
    bad: tuple[BadRecord, ...] = ()
    """Records that gave no text already: a null of parquet, or one that is too long. They are in neither of the two
    above, and count as read."""
    end: Position
    """From where reading goes on behind this block."""
    source_bytes: int
    """On disk; of compressed files about."""
    files: Sequence[str]
    """As printable text: of each text with its number, or one for all."""
    offsets: Sequence[int]
    """In the file, of each byte of the lines or of each text: a byte, or a row of parquet."""

    def place(self, offset: int) -> tuple[str, int]:
        """Return file, and byte or row in it, of a BadRecord's offset, the engine's or one of `bad`."""
        return self.files[offset if len(self.files) > 1 else 0], self.offsets[offset]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Limits:
    block_bytes: int
    block_texts: int
    record_bytes: int


def read_unit(
    unit: Unit,
    text_key: str,
    start: Position,
    *,
    block_bytes: int = BLOCK_BYTES,
    block_texts: int = BLOCK_TEXTS,
    record_bytes: int = RECORD_BYTES,
) -> Iterator[Block]:
    """Yield what a unit holds from a position on, in its order.

    Args:
        text_key: the column of parquet files.
        start: `Position(slice=0, offset=0)`, or the `end` of a block, read with any limits.
        block_bytes: text of a block, about.
        record_bytes: a record that is longer is a bad one; at least `block_bytes`.

    Raises:
        DataError: a file cannot be read, is damaged, is another one than was planned, or has no column of text.
    """
    limits = _Limits(block_bytes=block_bytes, block_texts=block_texts, record_bytes=record_bytes)
    number, offset = start.slice, start.offset
    while number < len(unit.slices):
        part = unit.slices[number]
        kind = kind_of(part.file)
        stop = number + 1
        if kind is Kind.PLAIN_TEXT:
            # A run of plain files, so that a block holds many.
            while stop < len(unit.slices) and kind_of(unit.slices[stop].file) is kind:
                stop += 1
            yield from _read_texts(unit.slices, range(number, stop), limits)
        elif kind is Kind.PARQUET:
            yield from _read_parquet(part, number, offset, text_key, limits)
        else:
            yield from _read_lines(part, number, offset, limits)
        number, offset = stop, 0


def _read_lines(part: Slice, number: int, offset: int, limits: _Limits) -> Iterator[Block]:
    file = (printable(part.file),)
    is_plain = kind_of(part.file) is Kind.LINES
    is_line_start = part.start == 0 or offset > part.start
    # Whether a line begins at the slice's first byte is told by the byte before it.
    begin = max(offset, part.start) if is_line_start else part.start - 1
    with _opened(part) as raw:
        stream = _stream_at(part.file, raw, begin)
        before = raw.tell()
        for lines in read_lines(
            stream,
            begin,
            part.stop if is_plain else None,
            is_line_start=is_line_start,
            block_bytes=limits.block_bytes,
            record_bytes=limits.record_bytes,
        ):
            now = raw.tell()
            yield Block(
                lines=b"" if lines.is_too_long else lines.content,
                bad=(_too_long(0, lines.content, limits),) if lines.is_too_long else (),
                end=Position(slice=number, offset=lines.end),
                source_bytes=lines.end - lines.start if is_plain else now - before,
                files=file,
                offsets=range(lines.start, lines.end),
            )
            before = now


def _stream_at(file: str, raw: FileIO, offset: int) -> Stream:
    """Return a file's lines, decompressed, from a byte on."""
    kind = kind_of(file)
    if kind is Kind.LINES:
        raw.seek(offset)
        return raw
    stream: Stream
    if kind is Kind.GZIP_LINES:
        stream = igzip.IGzipFile(fileobj=raw)
    else:
        stream = zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})
    passed = 0
    with memoryview(bytearray(PASSED_BYTES)) as piece:
        while passed < offset:
            count = stream.readinto(piece[: offset - passed])
            if not count:
                raise changed(file, f"at least {offset} bytes of text", str(passed))
            passed += count
    return stream


def _read_parquet(part: Slice, number: int, offset: int, text_key: str, limits: _Limits) -> Iterator[Block]:
    # Here, since only a corpus with parquet should wait for pyarrow's import.
    from orchestrator.tokenize.parquet_reader import read_rows

    file = [printable(part.file)]
    for rows in read_rows(
        part.file,
        range(part.start, part.stop),
        offset,
        text_key,
        block_bytes=limits.block_bytes,
        block_texts=limits.block_texts,
        record_bytes=limits.record_bytes,
    ):
        first = len(rows.texts)
        bad = [BadRecord(offset=first + index, reason="null", content=b"") for index in range(len(rows.nulls))]
        first += len(bad)
        bad += [_too_long(first + index, content, limits) for index, (_, content) in enumerate(rows.too_long)]
        yield Block(
            texts=rows.texts,
            bad=tuple(bad),
            end=Position(slice=number, offset=rows.end),
            source_bytes=rows.source_bytes,
            files=file,
            offsets=[*rows.rows, *rows.nulls, *(row for row, _ in rows.too_long)],
        )


def _read_texts(slices: Sequence[Slice], numbers: range, limits: _Limits) -> Iterator[Block]:
    """Read plain files, each a text, many a block."""
    texts: list[bytes] = []
    files: list[str] = []
    long: list[tuple[str, bytes]] = []
    source_bytes = 0
    for number in numbers:
        part = slices[number]
        content = _read_text(part, limits)
        if part.stop > limits.record_bytes:
            long.append((printable(part.file), content))
        else:
            texts.append(content)
            files.append(printable(part.file))
        source_bytes += part.stop
        count = len(texts) + len(long)
        if source_bytes >= limits.block_bytes or count >= limits.block_texts or number == numbers[-1]:
            yield Block(
                texts=texts,
                bad=tuple(_too_long(len(texts) + index, sample, limits) for index, (_, sample) in enumerate(long)),
                end=Position(slice=number + 1, offset=0),
                source_bytes=source_bytes,
                files=[*files, *(file for file, _ in long)],
                offsets=[0] * count,
            )
            texts, files, long, source_bytes = [], [], [], 0


def _read_text(part: Slice, limits: _Limits) -> bytes:
    """Return a whole file without its byte order mark, or the beginning of one that is too long."""
    if part.stop > limits.record_bytes:
        with _opened(part) as raw:
            return raw.read(SAMPLE_BYTES) or b""
    # In few calls: there may be millions of small files.
    with reading(part.file), open(part.file, "rb", buffering=0) as raw:  # noqa: PTH123
        content = raw.readall() or b""
    if len(content) != part.stop:
        raise changed(part.file, f"{part.stop} bytes", str(len(content)))
    return content.removeprefix(BYTE_ORDER_MARK)


def _too_long(offset: int, sample: bytes, limits: _Limits) -> BadRecord:
    reason = f"longer than {limits.record_bytes:,} bytes; its first {len(sample):,} are kept"
    return BadRecord(offset=offset, reason=reason, content=sample)


@contextlib.contextmanager
def _opened(part: Slice) -> Iterator[FileIO]:
    """Open a file that must be as long as it was when the work was planned, before the reading and after it."""
    with (
        reading(part.file, EOFError, isal_zlib.error, zstd.ZstdError),  # type: ignore[arg-type]  # isal's stub is wrong
        open(part.file, "rb", buffering=0) as raw,  # noqa: PTH123, a path as text, perhaps of many small files
    ):
        _check_size(part, raw)
        yield raw
        _check_size(part, raw)


def _check_size(part: Slice, raw: FileIO) -> None:
    size = os.fstat(raw.fileno()).st_size
    is_plain = kind_of(part.file) is Kind.LINES
    if size < part.stop or (size > part.stop and not is_plain):
        raise changed(part.file, f"{'at least ' if is_plain else ''}{part.stop} bytes", str(size))
    if size == 0 and kind_of(part.file) in (Kind.GZIP_LINES, Kind.ZSTD_LINES):
        raise EOFError("0 bytes, not even a header")
