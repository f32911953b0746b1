"""Find the files to read: files, folders and glob patterns, each file once, and all problems at once.

Every file is opened here, so that one that cannot be read is told of before the work and not hours into it; of a
compressed file the first bytes are looked at, of parquet the footer.
"""

import dataclasses
import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.tokenize.source_errors import printable
from orchestrator.tokenize.units import Kind, SourceFile, is_read, kind_of

KINDS = (
    "JSON lines (.jsonl, .ndjson, also with .gz or .zst; .json.gz, .json.zst), .parquet, "
    "and plain text (.txt, .py, .rst, .md; one document a file)"
)
PROBLEMS_TOLD = 20

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # its first byte is 0x50 to 0x5f; RFC 8878, 3.1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files to read, in order, and how many were left out."""

    files: tuple[SourceFile, ...]
    skipped: dict[str, int]
    """Files of other kinds by suffix; hidden files and folders as 'hidden', pipes and the like as 'no file', folders
    that were to be left out as 'left out'."""

    @property
    def size_bytes(self) -> int:
        """All files together, on disk."""
        return sum(file.size_bytes for file in self.files)


def find_files(inputs: Sequence[Path], *, text_key: str | None = None, leave_out: Sequence[Path] = ()) -> FoundFiles:
    """Return the text files of files, folders and glob patterns: in the order given, a folder's sorted.

    Names that begin with a dot are left out of folders, links to folders are followed, and a file that is named twice
    is read once.

    Args:
        text_key: the column that each parquet file should have; None: not looked for.
        leave_out: folders that are not searched, such as an output that lies within an input.

    Raises:
        DataError: an input does not exist, a named file is of another kind, a file cannot be opened or is damaged, or
            no text was found.
    """
    search = _Search(text_key, leave_out)
    for given in inputs:
        search.add_input(os.fspath(given))
    names = ", ".join(printable(given) for given in inputs) or "no input"
    if search.problems:
        told = search.problems[:PROBLEMS_TOLD]
        if len(search.problems) > len(told):
            told.append(f"and {len(search.problems) - len(told)} more")
        raise DataError(f"inputs should be readable text; {len(search.problems)} are not; mend or leave out", told)
    if not search.files:
        other = ", ".join(f"{count} {suffix}" for suffix, count in search.skipped.most_common(5))
        raise DataError(
            f"no text found in {names}; kinds that are read are {KINDS}; found instead: {other or 'nothing'}"
        )
    return FoundFiles(files=tuple(search.files.values()), skipped=dict(sorted(search.skipped.items())))


class _Search:
    """What was found so far; files and folders by their real path."""

    def __init__(self, text_key: str | None, leave_out: Sequence[Path]) -> None:
        self._text_key = text_key
        self._left_out = {os.path.realpath(folder) for folder in leave_out}
        self._folders: set[str] = set()
        self._real_folders: dict[str, str] = {}
        self.files: dict[str, SourceFile] = {}
        self.skipped: Counter[str] = Counter()
        self.problems: list[str] = []

    def add_input(self, given: str) -> None:
        try:
            os.lstat(given)
        except PermissionError as error:
            self.problems.append(f"{printable(given)} cannot be read: {error.strerror}")
        except OSError:
            self._add_pattern(given)
        else:
            self._add(given, is_named=True)

    def _add_pattern(self, given: str) -> None:
        if not glob.has_magic(given):
            self.problems.append(f"{printable(given)} does not exist; give a file, a folder or a glob")
            return
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
        if not matches:
            self.problems.append(f"{printable(given)} matches no file")
        for match in matches:
            self._add(match, is_named=False)

    def _add(self, path: str, *, is_named: bool) -> None:
        real = self._real(path)
        if os.path.isdir(path):  # noqa: PTH112, a hundred thousand Paths take longer than the search
            self._add_folder(path, real)
        elif is_named and not is_read(path):
            self.problems.append(f"{printable(path)} is of a kind that is not read; kinds are {KINDS}")
        else:
            self._add_file(path, real, is_named=is_named)

    def _real(self, path: str) -> str:
        """Return the path without links; those of many files of a folder, as a glob gives them, in little time."""
        folder, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):  # noqa: PTH114
            return os.path.realpath(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return f"{self._real_folders[folder].rstrip('/')}/{name}"

    def _add_folder(self, folder: str, real: str) -> None:
        if real in self._left_out:
            self.skipped["left out"] += 1
            return
        if real in self._folders:
            return
        self._folders.add(real)
        folders: list[tuple[str, str]] = []
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append(f"{printable(folder)} cannot be read: {error.strerror}")
            return
        for entry in entries:
            if entry.name.startswith("."):
                self.skipped["hidden"] += 1
                continue
            is_link = entry.is_symlink()
            real_path = os.path.realpath(entry.path) if is_link else f"{real}/{entry.name}"
            if os.path.isdir(real_path) if is_link else entry.is_dir():  # noqa: PTH112
                folders.append((entry.path, real_path))
            else:
                self._add_file(entry.path, real_path, is_named=False)
        for path, real_path in folders:
            self._add_folder(path, real_path)

    def _add_file(self, path: str, real: str, *, is_named: bool) -> None:
        """Add a file, or count what it is instead."""
        if any(real.startswith(f"{folder}/") for folder in self._left_out):
            self.skipped["left out"] += 1
            return
        if not is_read(path):
            self.skipped[os.path.splitext(path)[1].lower() or "no suffix"] += 1  # noqa: PTH122
            return
        if real in self.files:
            return
        try:
            # Without waiting: a pipe would be waited for until somebody writes.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                facts = os.fstat(descriptor)
                if stat.S_ISREG(facts.st_mode):
                    self.files[real] = self._checked(path, descriptor, facts.st_size)
                elif is_named:
                    self.problems.append(f"{printable(path)} is no file, such as a pipe; write the text into a file")
                else:
                    self.skipped["no file"] += 1
            finally:
                os.close(descriptor)
        except OSError as error:
            reason = "is a link to nothing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
            self.problems.append(f"{printable(path)} {reason}")
        except DataError as error:
            self.problems.append(str(error))

    def _checked(self, path: str, descriptor: int, size_bytes: int) -> SourceFile:
        kind = kind_of(path)
        row_groups: tuple[int, ...] = ()
        if kind is Kind.PARQUET:
            from orchestrator.tokenize.parquet_reader import read_row_groups

            row_groups = read_row_groups(path, self._text_key)
        elif kind is Kind.GZIP_LINES and os.read(descriptor, 2) != GZIP_MAGIC:
            raise DataError(f"{printable(path)} is no gzip file, or empty")
        elif kind is Kind.ZSTD_LINES:
            magic = os.read(descriptor, 4)
            if magic != ZSTD_MAGIC and magic[1:] != ZSTD_SKIPPABLE_MAGIC:
                raise DataError(f"{printable(path)} is no zstd file, or empty")
        return SourceFile(path=path, size_bytes=size_bytes, row_groups=row_groups)
