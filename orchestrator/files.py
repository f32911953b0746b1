"""Writing that is whole or not there: atomic files, atomic folders, JSON lines, checksums.

A file is written under a temporary name in its own folder, flushed to disk and renamed. A line of
JSONL is appended by one write; a reader skips a torn last line and refuses a torn middle.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import DiskFullError, OrchestrateError
from orchestrator.units import format_bytes

CHUNK_BYTES = 1 << 22


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave what was there."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_json(path: Path, value: object) -> None:
    """Write a JSON file whole under a name that nobody has; of several hosts that try, one does.

    Raises:
        FileExistsError: the name is taken.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    write_json(temporary, value)
    try:
        path.hardlink_to(temporary)
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def write_json(path: Path, value: object, *, indent: int | None = 2) -> bytes:
    """Write a JSON file atomically, its keys in the order given, with a final newline; return what was written.

    Args:
        indent: None writes it in one line, for large ones that programs read.
    """
    content = (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
    write_atomic(path, content)
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OrchestrateError: the file is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OrchestrateError(f"{path} should hold JSON: {error}; restore it or remove it") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        OrchestrateError: `path` exists already.
    """
    if path.exists():
        raise OrchestrateError(f"output {path} exists already; name another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                with (Path(root) / name).open("rb") as stream:
                    os.fsync(stream.fileno())
            sync_folder(Path(root))
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def is_full(error: BaseException) -> bool:
    """Return whether a file system had no space, no quota or no inode left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_room(folder: Path) -> tuple[int, float]:
    """Return the bytes and the inodes that are free where a folder lies; a quota shows in neither.

    Some file systems have no fixed number of inodes: infinity.
    """
    facts = os.statvfs(folder)
    return shutil.disk_usage(folder).free, facts.f_favail if facts.f_files else math.inf


def check_room(output: Path, needed_bytes: int, files: int, what: str) -> None:
    """Refuse to write what a disk has no room for, before a byte is written; a quota shows only when writing.

    Args:
        output: to be made; its folder need not be there yet.

    Raises:
        DiskFullError: too few bytes or inodes are free.
    """
    there = next(folder for folder in output.absolute().parents if folder.exists())
    free_bytes, inodes = free_room(there)
    if free_bytes < needed_bytes or inodes < files:
        raise DiskFullError(
            f"{what} {output} needs {format_bytes(needed_bytes)} in {files:,} files, {there} has "
            f"{format_bytes(free_bytes)} and {inodes:,} inodes free; free space, or choose another --output"
        )


def _umask() -> int:
    """Return the process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def file_mask(mask: int) -> Iterator[None]:
    """Make files with a mode mask of their own for the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never written again a second name, or copy it where the file system has none."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def sha256_of(path: Path, read: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Args:
        read: told of the bytes read so far, every few megabytes.
    """
    with path.open("rb") as stream:
        if read is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest, size = hashlib.sha256(), 0
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            read(size)
        return digest.hexdigest()


class JsonLines:
    """Append records to a JSON-lines file of one writer; each record is one write of one whole line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one record as one line, or nothing.

        Raises:
            OSError: such as a full disk; what was written of the line is taken back.
        """
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=True).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_json_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the record, record) for every whole line from `offset` on.

    A torn last line is left for the next reading.

    Raises:
        OrchestrateError: a line that is not the last is no JSON object; the message has its offset.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise OrchestrateError(f"{path} is damaged at byte {offset}: {error}") from error
            offset += len(line)
            yield offset, record
