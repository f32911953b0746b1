"""Random strings for the native encoder, compared with sentencepiece.

    python -m tests.encoder_fuzz --strings 10000000

Drawn over the characters and pieces of the vocabulary, in kinds that stress different rules; every string
depends on the seed alone.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import mistral_common
import numpy
import sentencepiece

from orchestrator.tokenize.native_engine import NativeEngine

DATA = Path(mistral_common.__file__).parent / "data"
VOCABULARIES = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
BATCH = 20_000


def main() -> None:
    """Compare as many strings as asked for, half of them with each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name, model in VOCABULARIES.items():
        started = time.monotonic()
        compared = 0
        for batch in strings(model, arguments.strings // len(VOCABULARIES), arguments.seed):
            compared += compare(model, batch)
            if compared % (50 * BATCH) == 0:
                print(f"{name}: {compared:,} strings equal", flush=True)
        print(f"{name}: all {compared:,} strings equal, seed {arguments.seed}, {time.monotonic() - started:.0f} s")


def compare(model: Path, texts: list[str], engines: dict[Path, tuple[NativeEngine, object]] | None = None) -> int:
    """Assert that native ids equal sentencepiece's for each text, and return how many there were."""
    known = _ENGINES if engines is None else engines
    if model not in known:
        known[model] = (NativeEngine(model), sentencepiece.SentencePieceProcessor(model_file=str(model)))
    native, reference = known[model]
    block = native.encode_texts([text.encode() for text in texts])
    expected = [ids for ids in reference.encode(texts, num_threads=2) if ids]
    ends = numpy.cumsum(block.lengths)
    ids = numpy.frombuffer(block.ids, dtype=numpy.uint16 if native.vocab_size < 65_500 else numpy.int32)
    wanted = numpy.fromiter(
        (number for document in expected for number in (*document, native.end_of_document)), dtype=ids.dtype
    )
    if not numpy.array_equal(ids, wanted):
        kept = [text for text in texts if text]
        for text, end, length, right in zip(kept, ends, block.lengths, expected, strict=True):
            found = ids[end - length : end - 1].tolist()
            assert found == right, f"{text!r}: native {found}, sentencepiece {right}"
    assert block.empty == sum(not text for text in texts)
    return len(texts)


_ENGINES: dict[Path, tuple[NativeEngine, object]] = {}


def strings(model: Path, count: int, seed: int) -> Iterator[list[str]]:
    """Yield batches of random strings over a vocabulary's characters and pieces."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [reference.id_to_piece(number).replace("▁", " ") for number in range(reference.vocab_size())]
    characters = sorted({character for piece in pieces for character in piece} | {"▁"})
    ascii_only = [character for character in characters if character < "\x7f"]
    often = [character for piece in pieces for character in piece]  # as often as pieces hold them
    draw = random.Random(seed)
    alphabets: list[list[str]] = [
        characters,
        often,
        ascii_only + [" "] * 20,
        [*draw.sample(ascii_only, 4), " "],
        [*characters, *map(chr, [0, 1, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF, 0x200D, 0xFEFF, 0xFFFD])],
    ]
    numbers = numpy.random.default_rng(seed)
    left = count
    while left:
        size = min(BATCH, left)
        kind = draw.randrange(len(alphabets) + 3)
        lengths = numbers.integers(1, 40, size)
        if kind < len(alphabets):
            yield _drawn(alphabets[kind], lengths, numbers)
        elif kind == len(alphabets):
            yield _drawn(pieces, lengths // 3 + 1, numbers)
        elif kind == len(alphabets) + 1:  # a few characters over and over: ties and long words
            few = [draw.sample(often, draw.randint(1, 3)) for _ in range(size)]
            yield ["".join(draw.choices(part, k=length)) for part, length in zip(few, lengths.tolist(), strict=True)]
        else:  # any character of Unicode but surrogates
            points = numbers.integers(0, 0x110000 - 0x800, int(lengths.sum()))
            points[points >= 0xD800] += 0x800
            yield _split("".join(map(chr, points.tolist())), lengths)
        left -= size


def _drawn(parts: list[str], lengths: numpy.ndarray, numbers: numpy.random.Generator) -> list[str]:
    chosen = numbers.integers(0, len(parts), int(lengths.sum())).tolist()
    ends = numpy.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return ["".join([parts[k] for k in chosen[start:end]]) for start, end in zip(starts, ends, strict=True)]


def _split(text: str, lengths: numpy.ndarray) -> list[str]:
    ends = numpy.cumsum(lengths).tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


if __name__ == "__main__":
    main()
