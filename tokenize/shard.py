"""Write Megatron's .bin/.idx, byte for byte as megatron-core's IndexedDatasetBuilder does.

`.bin` holds the token ids of all documents, one after another. `.idx` (little-endian):

    9 bytes   "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     type of the ids: 8 uint16, 4 int32
    uint64    sequences; here one a document
    uint64    documents + 1
    int32[]   length of each sequence, in tokens
    int64[]   offset of each sequence in .bin, in bytes
    int64[]   index of the first sequence of each document, and after them the count

Checked against megatron-core 0.16.1 in tests/test_tokenize.py. While a shard is written its lengths lie in
a file of their own, from which the index is made at the end: memory stays the same however many documents
there are, and who goes on after a kill cuts both files to the sizes that it knows.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.files import CHUNK_BYTES
from orchestrator.tokenize.manifest import TOKEN_BYTES, TokenShard, TokenType

INDEX_HEADER = b"MMIDIDX\x00\x00"
TYPE_CODES: dict[TokenType, int] = {"uint16": 8, "int32": 4}
INDEX_CHUNK = 1 << 20

# More than this, and Megatron's own choice is int32 (DType.optimal_dtype).
UINT16_VOCABULARY = 65_500

Lengths = NDArray[numpy.int32]


def token_type(vocab_size: int) -> TokenType:
    """Return the type that megatron-core stores the ids of a vocabulary with."""
    return "uint16" if vocab_size < UINT16_VOCABULARY else "int32"


class ShardWriter:
    """Write one shard, or go on with one of which a part is known to be on disk.

    Args:
        folder: where .bin and .idx go.
        name: their name without suffix.
        dtype: type of the ids.
        lengths: file for the lengths while the shard grows; the caller removes it.
        documents: how many are on disk; what the files hold beyond them is cut off.
        tokens: how many these documents have.

    Raises:
        DataError: the files hold less.
    """

    def __init__(
        self, folder: Path, name: str, dtype: TokenType, *, lengths: Path, documents: int = 0, tokens: int = 0
    ) -> None:
        self._folder = folder
        self._name = name
        self._dtype: TokenType = dtype
        self.lengths_path = lengths
        self._hash = hashlib.sha256()
        self.documents = documents
        self.tokens = tokens
        self._bin = open_at(folder / f"{name}.bin", tokens * TOKEN_BYTES[dtype], self._hash.update)
        self._lengths = open_at(lengths, documents * 4)

    def add(self, ids: bytes | memoryview, lengths: Lengths) -> None:
        """Append documents, their ends included: ids one after another in the shard's type, and their lengths."""
        self._bin.write(ids)
        self._hash.update(ids)
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        self.documents += lengths.size
        self.tokens += int(lengths.sum(dtype=numpy.int64))

    def sync(self) -> None:
        """Flush what was added to disk."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files as they are; what a full disk did not take is left."""
        for stream in (self._bin, self._lengths):
            with contextlib.suppress(OSError):
                stream.close()

    def finish(self) -> TokenShard:
        """Write the index, flush both files to disk, and return the shard's record."""
        self.sync()
        self.close()
        index = self._folder / f"{self._name}.idx"
        index_bytes, index_sha256 = write_index(
            index, self._dtype, self.documents, lambda: _read_lengths(self.lengths_path, self.documents)
        )
        return TokenShard(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            dtype=self._dtype,
            bin_bytes=self.tokens * TOKEN_BYTES[self._dtype],
            index_bytes=index_bytes,
            bin_sha256=self._hash.hexdigest(),
            index_sha256=index_sha256,
        )


def write_index(
    path: Path, dtype: TokenType, documents: int, lengths: Callable[[], Iterator[Lengths]]
) -> tuple[int, str]:
    """Write an index, a piece at a time, flush it to disk, and return its bytes and their SHA-256.

    Args:
        lengths: begins to yield the lengths of all documents, in pieces; called twice.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def write(data: bytes) -> None:
            stream.write(data)
            digest.update(data)

        write(INDEX_HEADER + struct.pack("<QBQQ", 1, TYPE_CODES[dtype], documents, documents + 1))
        for part in lengths():
            write(part.tobytes())
        offset = 0
        for part in lengths():
            sizes = part.astype("<i8") * TOKEN_BYTES[dtype]
            ends = offset + numpy.cumsum(sizes)
            write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, documents + 1, INDEX_CHUNK):
            write(numpy.arange(start, min(start + INDEX_CHUNK, documents + 1), dtype="<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell(), digest.hexdigest()


def open_at(path: Path, size: int, reread: Callable[[bytes], object] | None = None) -> BinaryIO:
    """Open a file, made where it is not there, cut to a size at which writing goes on.

    Args:
        reread: gets what the file holds up to there.

    Raises:
        DataError: the file is shorter.
    """
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        found = os.fstat(stream.fileno()).st_size
        if found < size:
            raise DataError(
                f"{path} should have at least {size} bytes that were written to disk, found {found}; it was cut or "
                "its file system lost them"
            )
        stream.truncate(size)
        while reread is not None and (chunk := stream.read(CHUNK_BYTES)):
            reread(chunk)
        stream.seek(size)
    except BaseException:
        stream.close()
        raise
    return stream


def _read_lengths(path: Path, count: int) -> Iterator[Lengths]:
    for start in range(0, count, INDEX_CHUNK):
        taken = min(INDEX_CHUNK, count - start)
        yield numpy.fromfile(path, dtype="<i4", count=taken, offset=4 * start)
