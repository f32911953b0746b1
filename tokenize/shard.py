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

Checked against megatron-core 0.16.1 in tests/test_tokenize.py. Ids go straight to the file; only the
lengths stay in memory, 4 bytes a document.
"""

import array
import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy
from numpy.typing import NDArray

from orchestrator.tokenize.manifest import TokenShard, TokenType

INDEX_HEADER = b"MMIDIDX\x00\x00"
TYPE_CODES: dict[TokenType, int] = {"uint16": 8, "int32": 4}
INDEX_CHUNK = 1 << 20

# More than this, and Megatron's own choice is int32 (DType.optimal_dtype).
UINT16_VOCABULARY = 65_500


def token_type(vocab_size: int) -> TokenType:
    """Return the type that megatron-core stores the ids of a vocabulary with."""
    return "uint16" if vocab_size < UINT16_VOCABULARY else "int32"


class ShardWriter:
    """Write one shard, document by document; `finish` writes its index.

    Args:
        folder: where the two files go.
        name: their name without suffix.
        dtype: type of the ids.
    """

    def __init__(self, folder: Path, name: str, dtype: TokenType) -> None:
        self._folder = folder
        self._name = name
        self._dtype: TokenType = dtype
        self._lengths = array.array("i")
        self._bin = _HashedFile(folder / f"{name}.bin")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add_document(self, ids: Iterable[int]) -> int:
        """Append a document, its end included, and return its length in tokens.

        Raises:
            OverflowError: an id does not fit the type.
        """
        tokens = numpy.asarray(ids, dtype=self._dtype)
        self._bin.write(tokens.tobytes())
        self._lengths.append(tokens.size)
        self.tokens += tokens.size
        return tokens.size

    def close(self) -> None:
        """Give up: close the file without an index."""
        self._bin.close()

    def finish(self) -> TokenShard:
        """Write the index, flush both files to disk, and return the shard's record."""
        self._bin.finish()
        index = _HashedFile(self._folder / f"{self._name}.idx")
        try:
            self._write_index(index)
            index.finish()
        finally:
            index.close()
        return TokenShard(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            dtype=self._dtype,
            bin_bytes=self._bin.size,
            index_bytes=index.size,
            bin_sha256=self._bin.sha256,
            index_sha256=index.sha256,
        )

    def _write_index(self, index: "_HashedFile") -> None:
        lengths: NDArray[numpy.int32] = numpy.frombuffer(self._lengths, dtype=numpy.int32)
        index.write(INDEX_HEADER)
        index.write(struct.pack("<QBQQ", 1, TYPE_CODES[self._dtype], len(lengths), len(lengths) + 1))
        index.write(lengths.tobytes())
        offset = 0
        for start in range(0, len(lengths), INDEX_CHUNK):
            sizes = lengths[start : start + INDEX_CHUNK].astype(numpy.int64) * numpy.dtype(self._dtype).itemsize
            ends = offset + numpy.cumsum(sizes)
            index.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, len(lengths) + 1, INDEX_CHUNK):
            stop = min(start + INDEX_CHUNK, len(lengths) + 1)
            index.write(numpy.arange(start, stop, dtype=numpy.int64).tobytes())


class _HashedFile:
    """A new file whose checksum and size are known when it is written."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def close(self) -> None:
        self._stream.close()
