"""How long the documents are: counted while they pass, in bounded memory, and drawn at the end.

Bins are half octaves: a bin begins at 1.41 times the one before, so all are equally wide on a
logarithmic axis, and from 2 tokens on each has a whole number in it.
"""

import math
from pathlib import Path

from orchestrator.units import format_count

BINS = 64


class DocumentLengths:
    """Counts of documents and tokens by length."""

    def __init__(self) -> None:
        self.documents = [0] * BINS
        self.tokens = [0] * BINS
        self.longest = 0

    def add(self, length: int) -> None:
        """Count a document of `length` tokens, at least 1."""
        bin_ = bin_of(length)
        self.documents[bin_] += 1
        self.tokens[bin_] += length
        self.longest = max(self.longest, length)

    def draw(self, path: Path, title: str) -> None:
        """Write a PNG: documents by length, and where the tokens are."""
        # Figure itself, not pyplot: no window system and nothing global; a PNG is drawn by Agg.
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter

        used = [index for index, count in enumerate(self.documents) if count]
        shown = range(used[0], used[-1] + 1)
        starts = [bin_start(index) for index in shown]
        widths = [bin_start(index + 1) - bin_start(index) for index in shown]
        documents, tokens = sum(self.documents), sum(self.tokens)

        figure = Figure(figsize=(8, 5.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        style = {"align": "edge", "edgecolor": "white", "linewidth": 0.5}
        upper.bar(starts, [self.documents[index] for index in shown], widths, color="#3b6ea5", **style)
        lower.bar(starts, [100 * self.tokens[index] / tokens for index in shown], widths, color="#c8702a", **style)
        for axes in (upper, lower):
            axes.axvline(tokens / documents, color="black", linestyle="--", linewidth=1, label="mean length")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        mean, longest = format_count(tokens / documents), format_count(self.longest)
        upper.set_title(
            f"{title}: {documents:,} documents, {format_count(tokens)} tokens\n"
            f"tokens a document: {mean} on average, {longest} at most",
            fontsize=11,
        )
        upper.set_ylabel("documents")
        lower.set_ylabel("share of all tokens (%)")
        lower.set_xlabel("length of the document (tokens, end of document included)")
        lower.set_xscale("log")
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        lower.xaxis.set_minor_formatter(NullFormatter())
        upper.legend(loc="upper left", frameon=False)
        figure.savefig(path, dpi=110)


def bin_of(length: int) -> int:
    """Return the half octave of a length: 1 -> 0, 2 -> 2, 3 -> 3, 4 and 5 -> 4, 6 and 7 -> 5."""
    return math.floor(2 * math.log2(length))


def bin_start(index: int) -> float:
    """Return the length at which a bin begins."""
    return math.sqrt(2**index)
