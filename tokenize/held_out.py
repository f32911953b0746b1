"""The token ids on which a base and what was made of it are compared: cut from a text or from a data set.

Documents follow one another with their ends between them, as in training, and are cut into sequences wherever these
end. A sequence has one token more than it has predictions.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.tokenize.blocks import read_unit
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.manifest import MANIFEST, read_manifest, tokenizers_of
from orchestrator.tokenize.shard import token_type
from orchestrator.tokenize.shard_reader import ShardReader
from orchestrator.tokenize.units import Position, plan_units

TEXT_KEY = "text"
BLOCK_BYTES = 1 << 18


def held_out_tokens(source: Path, model: Path, *, sequences: int, length: int, vocab_size: int) -> NDArray[numpy.int32]:
    """Return token ids of [sequences, length + 1]: of a text its beginning, of a data set evenly over the whole.

    Args:
        source: files of text as `orchestrate tokenize` reads them, or a data set folder.
        model: folder with the tokenizer.
        vocab_size: how many ids the model knows.

    Raises:
        DataError: the text cannot be read or is too short, or the data set was made with another tokenizer.
    """
    wanted = sequences * (length + 1)
    is_data_set = (source / MANIFEST).is_file()
    ids = _of_data_set(source, model, sequences, length + 1) if is_data_set else _of_text(source, model, wanted)
    if ids.size < wanted:
        raise DataError(
            f"{source} should have {wanted:,} tokens for {sequences} sequences of {length}, found {ids.size:,}; "
            "give more text, or ask for fewer or shorter sequences"
        )
    if ids.max() >= vocab_size:
        raise DataError(
            f"{source} gives token id {ids.max()}, the model knows {vocab_size}; its tokenizer is not the model's own"
        )
    return ids.astype(numpy.int32).reshape(sequences, length + 1)


def _of_text(source: Path, model: Path, wanted: int) -> NDArray[numpy.integer]:
    """Encode a text from its beginning until there are enough tokens, or no more text."""
    engine, _ = load_engine(model)
    dtype = token_type(engine.vocab_size)
    found: list[NDArray[numpy.integer]] = []
    reasons: list[str] = []
    for unit in plan_units(find_files([source], text_key=TEXT_KEY).files):
        for block in read_unit(unit, TEXT_KEY, Position(slice=0, offset=0), block_bytes=BLOCK_BYTES):
            texts = block.texts
            encoded = engine.encode_lines(block.lines, TEXT_KEY) if texts is None else engine.encode_texts(texts)
            reasons += [bad.reason for bad in (*block.bad, *encoded.bad)]
            found.append(numpy.frombuffer(encoded.ids, dtype=dtype))
            if sum(ids.size for ids in found) >= wanted:
                beginning: NDArray[numpy.integer] = numpy.concatenate(found)[:wanted]
                return beginning
    if reasons and not any(ids.size for ids in found):
        raise DataError(f"{source} should be text, and none of its {len(reasons)} records is: {reasons[0]}")
    return numpy.concatenate(found) if found else numpy.empty(0, dtype=dtype)


def _of_data_set(source: Path, model: Path, sequences: int, size: int) -> NDArray[numpy.integer]:
    """Return sequences that begin evenly over a data set; all of it, where it has fewer tokens than they."""
    manifest = read_manifest(source)
    own = tokenizers_of(model)
    if own and manifest.tokenizer_sha256 not in own:
        raise DataError(
            f"{source} was made with another tokenizer than that of {model}; give a text, or a data set of "
            f"`orchestrate tokenize --tokenizer {model}`"
        )
    shards = [ShardReader(source, shard).tokens for shard in manifest.shards]
    if manifest.tokens < sequences * size:
        return numpy.concatenate(shards)
    starts = [number * (manifest.tokens - size) // max(1, sequences - 1) for number in range(sequences)]
    return numpy.concatenate([part for start in starts for part in _window(shards, start, size)])


def _window(shards: list[NDArray[numpy.integer]], start: int, size: int) -> Iterator[NDArray[numpy.integer]]:
    """Yield the parts of a window over shards that follow one another."""
    for tokens in shards:
        part = tokens[max(0, start) : max(0, start + size)]
        start -= tokens.size
        if part.size:
            yield part
