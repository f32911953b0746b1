"""How long the documents are: counted while they pass, in bounded memory, and drawn at the end.

Bins are half octaves: a bin begins at 1.41 times the one before, so all are equally wide on a
logarithmic axis, and from 2 tokens on each has a whole number in it.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

from orchestrator.units import format_count

BINS = 64
WIDTH, LEFT, RIGHT, PANEL_HEIGHT = 800, 70, 20, 190

# The smallest whole number in each bin: n*n >= 2**index, in whole numbers so that no bin edge is off by one.
_SMALLEST = numpy.array([math.isqrt(2**index - 1) + 1 if index else 1 for index in range(BINS)], dtype=numpy.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentLengths:
    """Counts of documents and tokens by length."""

    documents: tuple[int, ...] = (0,) * BINS
    tokens: tuple[int, ...] = (0,) * BINS
    longest: int = 0

    def __add__(self, other: "DocumentLengths") -> "DocumentLengths":
        return DocumentLengths(
            documents=tuple(a + b for a, b in zip(self.documents, other.documents, strict=True)),
            tokens=tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
            longest=max(self.longest, other.longest),
        )


def count_lengths(lengths: NDArray[numpy.int32]) -> DocumentLengths:
    """Count documents of these lengths in tokens, each at least 1."""
    if not lengths.size:
        return DocumentLengths()
    bins = bins_of(lengths)
    documents = numpy.bincount(bins, minlength=BINS)
    tokens = numpy.bincount(bins, weights=lengths, minlength=BINS)  # floats, exact below 2**53
    return DocumentLengths(
        documents=tuple(documents.tolist()),
        tokens=tuple(tokens.astype(numpy.int64).tolist()),
        longest=int(lengths.max()),
    )


def draw_lengths(path: Path, title: str, lengths: DocumentLengths) -> None:
    """Write an SVG: documents by length, and where the tokens are. At least one document was counted.

    Drawn by hand: matplotlib takes 1.4 CPU-seconds for it, as much as the encoder for 100 MB of text.
    """
    used = [index for index, count in enumerate(lengths.documents) if count]
    shown = range(used[0], used[-1] + 1)
    documents, tokens = sum(lengths.documents), sum(lengths.tokens)
    mean = tokens / documents
    heading = (
        f"{title}: {documents:,} documents, {format_count(tokens)} tokens",
        f"tokens a document: {format_count(mean)} on average, {format_count(lengths.longest)} at most",
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 560" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="560" fill="white"/>',
        *(_text(WIDTH / 2, 24 + 20 * row, line, "middle") for row, line in enumerate(heading)),
        *_panel(70, "documents", [lengths.documents[index] for index in shown], shown, mean, "#3b6ea5"),
        *_panel(
            300, "share of all tokens (%)", [100 * lengths.tokens[i] / tokens for i in shown], shown, mean, "#c8702a"
        ),
        _text(WIDTH / 2, 548, "length of the document (tokens, end of document included)", "middle"),
        "</svg>\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _panel(top: float, name: str, heights: Sequence[float], shown: range, mean: float, color: str) -> Iterator[str]:
    """Yield a histogram, its axes and the line of the mean; bins are equally wide, so x counts half octaves."""
    bin_width = (WIDTH - LEFT - RIGHT) / len(shown)
    highest = max(heights)
    step = _round_step(max(1, highest / 6))

    def x(length: float) -> float:
        return LEFT + bin_width * (2 * math.log2(length) - shown.start)

    def y(height: float) -> float:
        return top + PANEL_HEIGHT * (1 - height / highest)

    for mark in range(int(highest / step) + 1):
        at = y(mark * step)
        yield f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield _text(LEFT - 6, at + 4, format_count(mark * step), "end")
    for index, height in zip(shown, heights, strict=True):
        place = f'x="{x(bin_start(index)):.1f}" y="{y(height):.1f}"'
        size = f'width="{bin_width - 1:.1f}" height="{y(0) - y(height):.1f}"'
        yield f'<rect {place} {size} fill="{color}"/>'
    octaves = range(math.ceil(shown.start / 2), shown.stop // 2 + 1)
    for octave in octaves[:: 1 + len(octaves) // 12]:
        at = x(2**octave)
        yield f'<path d="M{at:.1f} {y(0):.1f}v4" stroke="black"/>'
        yield _text(at, top + PANEL_HEIGHT + 18, f"{2**octave:,}" if octave < 17 else format_count(2**octave), "middle")
    yield f'<path d="M{x(mean):.1f} {top}v{PANEL_HEIGHT}" stroke="black" stroke-dasharray="5 3"/>'
    yield f'<path d="M{LEFT} {top}v{PANEL_HEIGHT}H{WIDTH - RIGHT}" stroke="black" fill="none"/>'
    yield _text(LEFT, top - 6, f"{name}; dashed: the mean length", "start")


def _round_step(least: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def bins_of(lengths: NDArray[numpy.int32]) -> NDArray[numpy.int64]:
    """Return the half octave of each length: 1 -> 0, 2 -> 2, 3 -> 3, 4 and 5 -> 4, 6 and 7 -> 5."""
    return numpy.searchsorted(_SMALLEST, lengths, side="right") - 1


def bin_start(index: int) -> float:
    """Return the length at which a bin begins."""
    return math.sqrt(2**index)
