"""Copies of shards on a disk of the node, from which its ranks read (`data.stage_to`).

    STAGE_TO/
      .copying                              locked by the one process of this node that copies
      9f2c.../shard_00000.bin  .idx         of the data set with this fingerprint; whole since it has its name
      9f2c.../.shard_00001.bin.partial      being written, or left by a kill; written anew

A data set's fingerprint says which bytes it has, so that runs share a folder, and each byte is compared with the
manifest's SHA-256 on its way. A file has its name only when it was whole and flushed: a kill leaves nothing that is
taken for a copy, and the next start copies what is missing. The lock is the kernel's, which gives it up when its holder
dies; it holds within one node, as the disk does. Which rank copies does not matter: the first that has the lock.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_solar.shard_files import ShardFile
from megatron_solar.stacks import waits_for_others
from orchestrator.errors import DataError, DiskFullError
from orchestrator.files import CHUNK_BYTES, free_room, is_full, sync_folder
from orchestrator.units import format_bytes

LOCK = ".copying"
LOOK_SECONDS = 0.2
"""How often a rank that waits looks how far the one that copies is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """What was done on a node until all shards were there."""

    prefixes: dict[str, str]
    """Of each shard in its data set's folder: of its copy."""
    copied_bytes: int
    """By this rank."""
    seconds: float


def stage(files: Sequence[ShardFile], folder: Path, alive: Callable[[], None]) -> Staged:
    """Have whole copies of shards in a folder of this node; one rank copies what is missing, the others wait.

    Args:
        alive: called whenever something was copied, by this rank or by the one that it waits for.

    Raises:
        DataError: a shard is not what its manifest says.
        DiskFullError: the folder has no room for what is missing.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    copied = 0
    while missing_of(files, folder):
        with lock_of(folder) as is_ours:
            missing = missing_of(files, folder)  # another may have copied until it was ours
            if is_ours:
                check_room(missing, folder)
                for file in missing:
                    copy_verified(file, copy_of(file, folder), alive)
                    copied += file.bytes
        if not is_ours:
            wait_for_the_copier(files, folder, alive)
    return Staged(
        prefixes={file.prefix: str(copy_of(file, folder).with_suffix("")) for file in files},
        copied_bytes=copied,
        seconds=time.monotonic() - started,
    )


def copy_of(file: ShardFile, folder: Path) -> Path:
    """Return where the copy of a shard's file lies."""
    return folder / file.data_set / f"{file.shard}{file.ending}"


def missing_of(files: Sequence[ShardFile], folder: Path) -> list[ShardFile]:
    """Return the files that have no whole copy."""
    return [file for file in files if _size(copy_of(file, folder)) != file.bytes]


def check_room(missing: Sequence[ShardFile], folder: Path) -> None:
    """Refuse to begin a copy that has no room.

    Raises:
        DiskFullError: too few bytes or inodes are free.
    """
    needed = sum(file.bytes - _size(_partial(copy_of(file, folder))) for file in missing)
    free_bytes, inodes = free_room(folder)
    if free_bytes < needed or inodes < len(missing):
        raise no_room(folder, f"{format_bytes(needed)} in {len(missing)} files", format_bytes(free_bytes))


def no_room(folder: Path, needed: str, free: str) -> DiskFullError:
    """Return the error of a folder that is too small."""
    return DiskFullError(
        f"data.stage_to={folder} on {socket.gethostname()} needs room for {needed} more, {free} are free; remove "
        "copies of other data sets, name a folder of a larger disk, or leave data.stage_to empty"
    )


def copy_verified(file: ShardFile, copy: Path, alive: Callable[[], None]) -> None:
    """Copy a file whole, comparing its bytes with the manifest's checksum, or not at all.

    Raises:
        DataError: it is not what the manifest says.
        DiskFullError: the disk became full meanwhile.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(copy)
    digest = hashlib.sha256()
    try:
        with file.path.open("rb") as source, partial.open("wb") as stream:
            while chunk := source.read(CHUNK_BYTES):
                alive()
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_full(error):
            raise no_room(copy.parent.parent, format_bytes(file.bytes), "too few bytes") from error
        raise
    if digest.hexdigest() != file.sha256:
        partial.unlink()
        raise DataError(
            f"{file.path} should have SHA-256 {file.sha256[:16]} as its data set's manifest says, found "
            f"{digest.hexdigest()[:16]} while copying it to {copy.parent}; put the shard back as it was, or tokenize "
            "again"
        )
    partial.rename(copy)
    sync_folder(copy.parent)


@contextlib.contextmanager
def lock_of(folder: Path) -> Iterator[bool]:
    """Yield whether this process is the one of its node that copies into a folder, for the block."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@waits_for_others
def wait_for_the_copier(files: Sequence[ShardFile], folder: Path, alive: Callable[[], None]) -> None:
    """Wait until all is there, or the lock is free because its holder has failed."""
    before = _progress(files, folder)
    while missing_of(files, folder):
        time.sleep(LOOK_SECONDS)
        with lock_of(folder) as is_free:
            if is_free:
                return
        now = _progress(files, folder)
        if now != before:
            alive()
        before = now


def _progress(files: Sequence[ShardFile], folder: Path) -> int:
    """Return how many bytes are there, those being written included."""
    copies = [copy_of(file, folder) for file in files]
    return sum(_size(path) + _size(_partial(path)) for path in copies)


def _partial(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.partial")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
