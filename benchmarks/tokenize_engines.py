"""One engine on documents in memory, in one thread of a process of its own.

    python -m benchmarks.tokenize_engines NAME CORPUS TOKENIZER_MODEL IDS_FILE

Prints {"cpu_seconds", "wall_seconds", "text_bytes"} of the encoding alone: reading the corpus, loading the tokenizer
and turning the result into an array are not in it. IDS_FILE gets a CRC-32 of each document's ids. Peers are called in
the fastest way that they have, and with their switch that leaves special tokens in the text alone where there is one.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

BLOCK_BYTES = 4_000_000

Encode = Callable[[Any], Any]
Documents = Callable[[Any], Iterable[Any]]


def sentencepiece(model: Path) -> tuple[str, Encode, Documents]:
    """Google's library."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    return "str", lambda texts: processor.encode(texts, out_type=int, num_threads=1), list


def native(model: Path) -> tuple[str, Encode, Documents]:
    """Ours, on texts."""
    from orchestrator.tokenize.engines import load_engine

    engine = load_engine(model, "native")[0]
    return "bytes", engine.encode_texts, _without_ends


def native_lines(model: Path) -> tuple[str, Encode, Documents]:
    """Ours, on JSON lines, which it parses."""
    from orchestrator.tokenize.engines import load_engine

    engine = load_engine(model, "native")[0]
    return "lines", lambda lines: engine.encode_lines(lines, "text"), _without_ends


def tokenizers(model: Path) -> tuple[str, Encode, Documents]:
    """Hugging Face's library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_tokenizer_json(model))
    tokenizer.encode_special_tokens = True
    return (
        "str",
        lambda texts: [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        list,
    )


def kitoken(model: Path) -> tuple[str, Encode, Documents]:
    """github.com/Systemcluster/kitoken."""
    from kitoken import Kitoken

    tokenizer = Kitoken.from_sentencepiece_file(str(model))
    return "str", lambda texts: tokenizer.encode_all(texts, False), list


def fastokens(model: Path) -> tuple[str, Encode, Documents]:
    """github.com/crusoecloud/fastokens."""
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_json_str(_tokenizer_json(model))

    def documents(result: tuple[bytes, bytes]) -> list[NDArray[numpy.uint32]]:
        ids, offsets = numpy.frombuffer(result[0], numpy.uint32), numpy.frombuffer(result[1], numpy.uint64)
        return numpy.split(ids, offsets[1:-1].astype(int))

    return "str", lambda texts: tokenizer.encode_batch_flat(texts, False, True), documents


def gigatoken(model: Path) -> tuple[str, Encode, Documents]:
    """The engine of Megatron-LM's fast script."""
    from gigatoken import Tokenizer

    tokenizer = Tokenizer.from_sentencepiece(model)
    return "bytes", lambda texts: tokenizer.encode_batch(texts, parallel=False), lambda result: result


ENGINES = {
    "sentencepiece": sentencepiece,
    "native": native,
    "native, JSON lines": native_lines,
    "tokenizers": tokenizers,
    "kitoken": kitoken,
    "fastokens": fastokens,
    "gigatoken": gigatoken,
}


def _without_ends(block: Any) -> list[NDArray[numpy.integer]]:
    ids = numpy.frombuffer(block.ids, dtype=numpy.uint8)
    width = len(ids) // int(block.lengths.sum())
    ends = numpy.cumsum(block.lengths)
    return [part[:-1] for part in numpy.split(ids.view(f"<u{width}"), ends[:-1])]


def _tokenizer_json(model: Path) -> str:
    from orchestrator.tokenize.hugging_face import tokenizer_files

    return tokenizer_files(model)["tokenizer.json"]


def blocks(corpus: Path) -> Iterator[tuple[bytes, list[str]]]:
    """Yield about 4 MB of lines at a time, and their texts."""
    with corpus.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            yield b"".join(lines), [json.loads(line)["text"] for line in lines]


def measure(name: str, corpus: Path, model: Path, ids_file: Path) -> dict[str, float]:
    """Encode the corpus, and keep a checksum of each document's ids."""
    wants, encode, documents = ENGINES[name](model)
    cpu_seconds = wall_seconds = text_bytes = 0.0
    checksums: list[int] = []
    for lines, texts in blocks(corpus):
        encoded = [text.encode() for text in texts]
        given = {"str": texts, "bytes": encoded, "lines": lines}[wants]
        wall, cpu = time.perf_counter(), time.process_time()
        result = encode(given)
        cpu_seconds += time.process_time() - cpu
        wall_seconds += time.perf_counter() - wall
        text_bytes += sum(map(len, encoded))
        checksums += [zlib.crc32(numpy.asarray(ids, dtype=numpy.uint32).tobytes()) for ids in documents(result)]
    numpy.asarray(checksums, dtype=numpy.uint32).tofile(ids_file)
    return {"cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "text_bytes": text_bytes}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(Path, sys.argv[2:]))))
