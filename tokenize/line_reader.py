"""Cut a stream of JSON lines into pieces of whole lines, about a block each, without looking at single lines.

A block is read and searched from behind for its last line end. What lies after it is moved to the front of the same
buffer; a line longer than the buffer makes it grow, up to a limit beyond which the line is passed over.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Of a line that is too long so much is shown.
SAMPLE_BYTES = 1000


class Stream(Protocol):
    """What a plain file and the readers of compressed ones have in common."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a buffer, perhaps in part; 0 is the end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Whole lines with their line ends, or the beginning of one that is too long."""

    content: bytes
    start: int
    """Byte of the stream at which they begin."""
    end: int
    """Byte of the stream behind them."""
    is_too_long: bool


def read_lines(
    stream: Stream, offset: int, stop: int | None, *, is_line_start: bool, block_bytes: int, record_bytes: int
) -> Iterator[Lines]:
    """Yield the lines that begin from `offset` on and before `stop`, in pieces; a byte order mark at 0 is left out.

    Args:
        stream: stands at `offset`.
        stop: None reads to the end.
        is_line_start: a line begins at `offset`; otherwise what stands there belongs to a line that is not wanted.
        block_bytes: of a piece, about; a longer line is a piece of its own.
        record_bytes: a line that is longer, without its line end, is given as too long; at least `block_bytes`.
    """
    window = _Window(stream, offset, block_bytes)
    if not is_line_start:
        window.skip_line(stop)
    elif offset == 0:
        window.fill()
        if window.buffer.startswith(BYTE_ORDER_MARK):
            window.drop(len(BYTE_ORDER_MARK))
            # The first line begins at byte 0, mark and all, and so is of a slice that ends within the mark.
            stop = stop if stop is None else max(stop, window.offset + 1)
    while stop is None or window.offset < stop:
        window.fill()
        end = _end_of_lines(window, stop)
        start = window.offset
        if end:
            content = window.take(end)
            yield Lines(content=content, start=start, end=window.offset, is_too_long=False)
        elif window.is_at_end:
            return
        elif window.filled <= record_bytes:
            window.grow(record_bytes + 1)
        else:
            sample = bytes(window.buffer[:SAMPLE_BYTES])
            window.skip_line(None)
            yield Lines(content=sample, start=start, end=window.offset, is_too_long=True)


def _end_of_lines(window: "_Window", stop: int | None) -> int:
    """Return how much of the window is whole lines that are wanted."""
    if stop is not None and window.offset + window.filled >= stop:
        # The last line wanted is the one that holds the byte before `stop`.
        end = window.find_line_end(stop - 1 - window.offset)
        if end:
            return end
    if window.is_at_end:
        return window.filled
    return window.buffer.rfind(b"\n", 0, window.filled) + 1


class _Window:
    """The bytes of a stream from `offset` on, as many as `filled`."""

    def __init__(self, stream: Stream, offset: int, block_bytes: int) -> None:
        self._stream = stream
        self._block_bytes = max(block_bytes, len(BYTE_ORDER_MARK))
        self.buffer = bytearray(self._block_bytes)
        self.offset = offset
        self.filled = 0
        self.is_at_end = False

    def fill(self) -> None:
        """Read until the buffer is full or the stream ends."""
        with memoryview(self.buffer) as view:
            while self.filled < len(view) and not self.is_at_end:
                count = self._stream.readinto(view[self.filled :])
                self.filled += count or 0
                self.is_at_end = not count

    def grow(self, limit: int) -> None:
        """Make room for a line that is longer than the buffer: twice as much, up to a limit."""
        self.buffer.extend(bytes(min(len(self.buffer), limit - len(self.buffer))))

    def find_line_end(self, start: int) -> int:
        """Return the index behind the first line end from `start` on, or 0."""
        return self.buffer.find(b"\n", start, self.filled) + 1

    def take(self, count: int) -> bytes:
        """Return the first bytes and drop them."""
        with memoryview(self.buffer) as view:
            content = bytes(view[:count])
        self.drop(count)
        return content

    def drop(self, count: int) -> None:
        """Go on behind the first bytes; a buffer that grew for a long line is let go."""
        rest = self.buffer[count : self.filled]
        if len(self.buffer) > self._block_bytes >= len(rest):
            self.buffer = bytearray(self._block_bytes)
        self.buffer[: len(rest)] = rest
        self.offset += count
        self.filled = len(rest)

    def skip_line(self, stop: int | None) -> None:
        """Go on behind the next line end, or at `stop` where none comes before, or at the end of the stream."""
        self.fill()
        while not (end := self.find_line_end(0)):
            self.drop(self.filled)
            if self.is_at_end or (stop is not None and self.offset >= stop):
                return
            self.fill()
        self.drop(end)
