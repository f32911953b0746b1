from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

Encoded = tuple[
    NDArray[Any],  # ids
    NDArray[numpy.int32],  # lengths
    NDArray[numpy.int64],  # text_bytes
    NDArray[numpy.uint32],  # checksums
    int,  # records
    int,  # empty
    list[tuple[bytes, int, int]],  # text, first id and end of the documents that the reference shall encode too
]

VERSION: int

class _Encoder:
    def __init__(
        self,
        *,
        pieces: Sequence[tuple[bytes, float]],
        user_defined: Sequence[tuple[bytes, int]],
        bytes: Sequence[int],  # noqa: A002
        add_dummy_prefix: bool,
        end_of_document: int,
    ) -> None: ...
    def encode_lines(self, lines: bytes, text_key: str, decide: Callable[[int, bytes], bytes | None]) -> Encoded: ...
    def encode_texts(self, texts: Sequence[bytes], refuse: Callable[[int], None]) -> Encoded: ...

class Encoder16(_Encoder): ...
class Encoder32(_Encoder): ...
