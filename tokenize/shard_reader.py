"""Read a shard's documents from its .bin/.idx (format in shard.py), by number, without megatron."""

import struct
from pathlib import Path

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.tokenize.manifest import TokenShard
from orchestrator.tokenize.shard import INDEX_HEADER, TYPE_CODES

HEADER_BYTES = len(INDEX_HEADER) + 8 + 1 + 8 + 8


class ShardReader:
    """The documents of a shard; its files are mapped, not read.

    Attributes:
        lengths: int32, tokens of each document, its end included.
        offsets: int64, byte of each document in the .bin.
        order: int64, document indices from 0 to the count.
        tokens: all ids of the shard.

    Raises:
        DataError: the index is not one of this shard.
    """

    def __init__(self, folder: Path, shard: TokenShard) -> None:
        index, count = folder / f"{shard.name}.idx", shard.documents
        with index.open("rb") as stream:
            header = stream.read(HEADER_BYTES)
        expected = INDEX_HEADER + struct.pack("<QBQQ", 1, TYPE_CODES[shard.dtype], count, count + 1)
        size = HEADER_BYTES + 4 * count + 8 * count + 8 * (count + 1)
        if header != expected or index.stat().st_size != size:
            raise DataError(
                f"{index} should be the index of {count} documents of {shard.dtype} in {size} bytes, found the header "
                f"{header.hex()} and {index.stat().st_size} bytes; copy it again or tokenize again"
            )
        parts = numpy.memmap(index, numpy.uint8, "r", HEADER_BYTES)
        self.lengths: NDArray[numpy.int32] = parts[: 4 * count].view("<i4")
        self.offsets: NDArray[numpy.int64] = parts[4 * count : 12 * count].view("<i8")
        self.order: NDArray[numpy.int64] = parts[12 * count :].view("<i8")
        self.tokens: NDArray[numpy.integer] = numpy.memmap(folder / f"{shard.name}.bin", shard.dtype, "r")

    def document(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[numpy.int64]:
        """Return tokens [start, stop) of a document, by default all with its end."""
        first = int(self.offsets[number]) // self.tokens.itemsize
        last = first + (int(self.lengths[number]) if stop is None else stop)
        return numpy.asarray(self.tokens[first + start : last], dtype=numpy.int64)
