"""How a rank's part of a tensor lies in the whole one: as rectangles.

A tensor-parallel rank holds rows or columns of a matrix (of gate-and-up two blocks of rows), and the
distributed optimizer gives each data-parallel rank a contiguous range of that part's flat elements. Such
a range is at most one broken row, a block of whole rows and another broken row in each block: a handful
of rectangles of the whole tensor. A checkpoint stores those, so that any layout can be read at any
other. Pure.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from megatron_solar.weights import PartOfTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A block of a whole tensor, and where its elements lie, in order, in the range that it was cut from."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    """Place of its first element in the range."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two rectangles share, as slices within each."""

    within_first: tuple[slice, ...]
    within_second: tuple[slice, ...]
    elements: int


def rectangles(part: PartOfTensor, start: int, stop: int) -> list[Rectangle]:
    """Cut the flat range [start, stop) of a rank's part into rectangles of the whole tensor."""
    if len(part.shape) == 1:
        (block,) = part.blocks
        return [Rectangle(offset=(block.first + start,), size=(stop - start,), start=0)]
    _, columns = part.shape
    found = []
    row = 0  # of the part, at which the block begins
    for block in part.blocks:
        low, high = max(start, row * columns), min(stop, (row + block.count) * columns)
        for first, last in _whole_and_broken_rows(low, high, columns):
            rows = -(-last // columns) - first // columns
            width = columns if rows > 1 else last - first
            found.append(
                Rectangle(
                    offset=(block.first + first // columns - row, part.first_column + first % columns),
                    size=(rows, width),
                    start=first - start,
                )
            )
        row += block.count
    return found


def _whole_and_broken_rows(low: int, high: int, columns: int) -> Iterator[tuple[int, int]]:
    """Split a flat range at the ends of its first and its last row, unless these are whole."""
    if low >= high:
        return
    first_end = min(high, -(-low // columns) * columns)  # end of a broken first row, or low
    if first_end > low:
        yield low, first_end
    last_start = max(first_end, high // columns * columns)
    if last_start > first_end:
        yield first_end, last_start
    if high > last_start:
        yield last_start, high


def overlap(
    first_offset: Sequence[int], first_size: Sequence[int], second_offset: Sequence[int], second_size: Sequence[int]
) -> Overlap | None:
    """Return what two rectangles of one tensor share, or None."""
    within_first, within_second, elements = [], [], 1
    for a, a_size, b, b_size in zip(first_offset, first_size, second_offset, second_size, strict=True):
        low, high = max(a, b), min(a + a_size, b + b_size)
        if low >= high:
            return None
        within_first.append(slice(low - a, high - a))
        within_second.append(slice(low - b, high - b))
        elements *= high - low
    return Overlap(within_first=tuple(within_first), within_second=tuple(within_second), elements=elements)
