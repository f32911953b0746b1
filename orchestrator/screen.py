"""What the terminal shows: one console for results, one for notices, tables within 100 columns."""

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100

_STYLES = {
    "RUNNING": "green",
    "FINISHED": "bold green",
    "PENDING": "yellow",
    "FAILED": "bold red",
    "CANCELLED": "magenta",
    "STOPPED": "yellow",
    "UNKNOWN": "dim",
}


def console(*, notices: bool = False) -> Console:
    """Return the console of stdout, or of stderr for notices."""
    stream = sys.stderr if notices else sys.stdout
    found = Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=min(found.width, WIDTH) if stream.isatty() else WIDTH)


def print_json(value: object) -> None:
    """Print a value as JSON on stdout, for programs."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Print a title and lines of name and value."""
    facts = list(facts)
    width = max((len(name) for name, _ in facts), default=0)
    out = console()
    if title:
        out.print(Text(title, style="bold"))
    for name, value in facts:
        lines = textwrap.wrap(value, WIDTH - width - 2, break_on_hyphens=False, break_long_words=False) or [""]
        out.print(Text.assemble((f"{name:{width}}  ", "dim"), lines[0]), soft_wrap=True)
        for line in lines[1:]:
            out.print(Text(" " * (width + 2) + line), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows under headings; `right` are the columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console().print(table)


def print_next(command: str) -> None:
    """Print the next useful command as the last line."""
    console().print(Text.assemble(("next: ", "dim"), (command, "bold")), soft_wrap=True)


def notice(text: str) -> None:
    """Print a notice on stderr."""
    console(notices=True).print(Text(text), soft_wrap=True)
