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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.files import CHUNK_BYTES
from orchestrator.tokenize.manifest import TOKEN_BYTES, TokenShard, TokenType

INDEX_HEADER = b"MMIDIDX\x00\x00"
INDEX_LENGTHS_OFFSET = len(INDEX_HEADER) + struct.calcsize("<QBQQ")
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
            index, self._dtype, self.documents, lambda: _read_lengths(self.lengths_path, 0, self.documents)
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


def concatenate_shards(sources: Sequence[Path], folder: Path, name: str) -> TokenShard:
    """Write one shard of the documents of several, in their order, without decoding.

    Args:
        sources: path prefixes, without suffix, of at least one shard.
        folder: where the new .bin and .idx go; files of that name are written over.

    Raises:
        DataError: the shards have ids of different types, or one is no shard with a sequence a document.
    """
    heads = [read_index_head(source) for source in sources]
    types = {dtype for dtype, _ in heads}
    if len(types) > 1:
        raise DataError(
            f"shards to be put together should have ids of one type, found {' and '.join(sorted(types))} in "
            f"{sources[0].parent}; they were made with different tokenizers"
        )
    (dtype,) = types
    digest, size = hashlib.sha256(), 0
    with (folder / f"{name}.bin").open("wb") as target:
        for source in sources:
            with suffixed(source, ".bin").open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    documents = sum(count for _, count in heads)

    def lengths() -> Iterator[Lengths]:
        for source, (_, count) in zip(sources, heads, strict=True):
            yield from _read_lengths(suffixed(source, ".idx"), INDEX_LENGTHS_OFFSET, count)

    index_bytes, index_sha256 = write_index(folder / f"{name}.idx", dtype, documents, lengths)
    tokens = sum(int(part.sum(dtype=numpy.int64)) for part in lengths())
    if tokens * TOKEN_BYTES[dtype] != size:
        raise DataError(
            f"the indices of {len(sources)} shards from {sources[0]} on count {tokens} tokens, their .bin files hold "
            f"{size // TOKEN_BYTES[dtype]}; copy them again or tokenize again"
        )
    return TokenShard(
        name=name,
        documents=documents,
        tokens=tokens,
        dtype=dtype,
        bin_bytes=size,
        index_bytes=index_bytes,
        bin_sha256=digest.hexdigest(),
        index_sha256=index_sha256,
    )


def read_index_head(prefix: Path) -> tuple[TokenType, int]:
    """Return the type of a shard's ids and its documents.

    Raises:
        DataError: it is no index of this format with one sequence a document.
    """
    path = suffixed(prefix, ".idx")
    with path.open("rb") as stream:
        head = stream.read(INDEX_LENGTHS_OFFSET)
    if len(head) < INDEX_LENGTHS_OFFSET or not head.startswith(INDEX_HEADER):
        raise DataError(f"{path} should begin as Megatron's index, found {head[:9]!r}; give the prefix of a shard")
    version, code, sequences, boundaries = struct.unpack("<QBQQ", head[len(INDEX_HEADER) :])
    dtype = next((name for name, its in TYPE_CODES.items() if its == code), None)
    size = INDEX_LENGTHS_OFFSET + sequences * 12 + boundaries * 8
    if version != 1 or dtype is None or boundaries != sequences + 1 or path.stat().st_size != size:
        raise DataError(
            f"{path} should be an index of version 1 with ids of uint16 or int32, one sequence a document and {size} "
            f"bytes; found version {version}, type code {code}, {sequences} sequences, {boundaries - 1} documents, "
            f"{path.stat().st_size} bytes"
        )
    return dtype, sequences


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


def suffixed(prefix: Path, suffix: str) -> Path:
    """Return a shard's file; its name may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)


def _read_lengths(path: Path, offset: int, count: int) -> Iterator[Lengths]:
    for start in range(0, count, INDEX_CHUNK):
        taken = min(INDEX_CHUNK, count - start)
        yield numpy.fromfile(path, dtype="<i4", count=taken, offset=offset + 4 * start)
