"""Progress bars on stderr, for work that takes long."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from orchestrator.screen import console
from orchestrator.units import format_count


@contextlib.contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with what is done and the total; the bar stays on the screen at the end."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=console(notices=True),
    ) as progress:
        task = progress.add_task(title, detail="")

        def show(done: int, total: int) -> None:
            detail = f"{format_count(done)} of {format_count(total)} {unit}"
            progress.update(task, completed=done, total=total, detail=detail)

        yield show
