"""Say what to do where a file system refuses."""

import errno
from pathlib import Path

from orchestrator.errors import DataError, DiskFullError, OrchestrateError
from orchestrator.files import free_room, is_full
from orchestrator.units import format_bytes


def explain(error: OSError, doing: str, folder: Path) -> OrchestrateError:
    """Return the error for a person, for a failure while something was done in the folder of the work under way."""
    kept = f"what is done is kept in {folder}, and the same command goes on"
    if is_full(error):
        there = mount_point(folder)
        room, inodes = free_room(there)
        return DiskFullError(
            f"{doing}: no room is left on the file system {there} ({error.strerror}): "
            f"{format_bytes(room)} and {inodes:.0f} files are free, a quota may leave less; make room; {kept}"
        )
    if error.errno == errno.EFBIG:
        return DiskFullError(
            f"{doing}: a file may not become so large ({error.strerror}); raise the limit (`ulimit -f`) or use another "
            f"file system; {kept}"
        )
    return DataError(f"{doing}: {error}; mend that; {kept}")


def mount_point(path: Path) -> Path:
    """Return where the file system of a path is mounted."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    while path != path.parent and path.parent.stat().st_dev == device:
        path = path.parent
    return path
