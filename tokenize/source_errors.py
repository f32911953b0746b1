"""What can be wrong with a file that is read, told as one error that names the file and what to do."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import DataError


def printable(path: str | Path) -> str:
    """Return a path as text that UTF-8 can hold, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def reading(path: str, *damage: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one error.

    Args:
        damage: what a library raises where the file is damaged; an OSError without a number means it as well.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *damage)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{printable(path)} cannot be read: {os.strerror(error.errno)}; make it readable or leave it out"
            ) from error
        reason = " ".join(str(error).split())
        raise DataError(
            f"{printable(path)} is damaged, cut off, or of a make that is not read: {reason}; "
            "get it anew or leave it out"
        ) from error


def changed(path: str, before: str, now: str) -> DataError:
    """Return the error for a file that is another one than when the work was planned."""
    return DataError(
        f"{printable(path)} should have {before}, as when the work was planned, and has {now}; "
        "restore it, or begin anew with another output"
    )
