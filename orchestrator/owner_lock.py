"""A lock of one process among several, also of several hosts: a file made in one step that names its owner.

The file has the owner's process, host and the time. One that its owner left behind is taken over: on the
owner's host when that process is gone, on another when the file was not touched for a while, since
processes of other hosts cannot be seen. So an owner that lives longer than that renews it.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from orchestrator.processes import living_process

log = logging.getLogger(__name__)

FOREIGN_LOCK_SECONDS = 600.0
"""Age at which another host's lock is stale; its owner renews it more often."""


@contextlib.contextmanager
def hold(path: Path, role: str) -> Iterator[str]:
    """Hold a lock and yield nothing; or yield who holds it, for the block to leave.

    Args:
        role: what its owners are, for the messages: a `shipper`.
    """
    other = "" if _create_lock(path) else take_over(path, role)
    try:
        yield other
    finally:
        if not other:
            path.unlink(missing_ok=True)


def renew(path: Path) -> None:
    """Show other hosts that a held lock's owner lives."""
    os.utime(path)


def take_over(path: Path, role: str) -> str:
    """Make a dead owner's lock ours, or return who holds it.

    Of several that find it stale one gets it: it is rewritten in place, under a file lock, by who
    sees it stale still.
    """
    try:
        stream = path.open("r+")
    except FileNotFoundError:
        return "" if _create_lock(path) else f"another {role}"
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.fstat(stream.fileno()).st_ino == path.stat().st_ino
        except OSError:
            return f"another {role}"
        owner = _living_owner(stream.read(), os.fstat(stream.fileno()).st_mtime)
        if owner or not is_current:
            return owner or f"another {role}"
        stream.seek(0)
        stream.truncate()
        stream.write(_owner_record())
    log.info("took over the lock of a %s that is gone", role)
    return ""


def _living_owner(text: str, touched: float) -> str:
    """Return who holds a lock, or nothing where its owner is gone."""
    try:
        record = json.loads(text)
        host, process, created = record["host"], int(record["process"]), float(record["created"])
    except (ValueError, KeyError, TypeError):
        return ""
    if host == socket.gethostname():
        alive = living_process(process, created) is not None
    else:
        alive = time.time() - touched < FOREIGN_LOCK_SECONDS
    return f"process {process} on {host}" if alive else ""


def _create_lock(path: Path) -> bool:
    """Make the lock with its owner's name in one step, or say that it is there."""
    own = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    own.write_text(_owner_record())
    try:
        path.hardlink_to(own)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def _owner_record() -> str:
    me = psutil.Process()
    record = {
        "process": me.pid,
        "created": me.create_time(),
        "host": socket.gethostname(),
        "time": time.time(),
    }
    return json.dumps(record)
