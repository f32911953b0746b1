"""What a tokenization would do, from the sizes of the files and a few blocks of their text; nothing is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from orchestrator.tokenize.begin import absolute_files
from orchestrator.tokenize.blocks import read_unit
from orchestrator.tokenize.engine import Engine, EngineChoice
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.manifest import TOKEN_BYTES
from orchestrator.tokenize.shard import token_type
from orchestrator.tokenize.units import SourceFile, Unit, choose_unit_bytes, kind_of, plan_units
from orchestrator.tokenize.work_folder import BEGINNING

SAMPLES = 8
SAMPLE_BYTES = 1 << 18
INDEX_BYTES = 20  # a document


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindOfFiles:
    """The files of one kind."""

    kind: str
    files: int
    source_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Counts that are known, and those that a sample suggests."""

    engine: str
    kinds: tuple[KindOfFiles, ...]
    skipped_files: dict[str, int]
    units: int
    unit_bytes: int
    sampled_documents: int
    sampled_bad: int
    documents: int
    """About, as the two that follow."""
    tokens: int
    disk_bytes: int


def estimate(
    inputs: Sequence[Path],
    tokenizer: Path,
    *,
    text_key: str,
    engine: EngineChoice = "auto",
    leave_out: Sequence[Path] = (),
) -> Estimate:
    """Find the files, cut them into units and encode a block of a few of these.

    Raises:
        DataError: as `tokenize_corpus`, for inputs and tokenizer.
    """
    found = find_files(inputs, text_key=text_key, leave_out=leave_out)
    files = absolute_files(found)
    loaded, _ = load_engine(tokenizer, engine)
    units = plan_units(files)
    sample = _encode_samples(loaded, units, text_key)
    tokens = round(sample.tokens * found.size_bytes / max(1, sample.source_bytes))
    documents = round(sample.documents * found.size_bytes / max(1, sample.source_bytes))
    return Estimate(
        engine=loaded.name,
        kinds=_kinds(files),
        skipped_files=found.skipped,
        units=len(units),
        unit_bytes=choose_unit_bytes(files),
        sampled_documents=sample.documents,
        sampled_bad=sample.bad,
        documents=documents,
        tokens=tokens,
        disk_bytes=tokens * TOKEN_BYTES[token_type(loaded.vocab_size)] + documents * INDEX_BYTES,
    )


@dataclasses.dataclass(kw_only=True)
class _Sample:
    source_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad: int = 0


def _encode_samples(engine: Engine, units: Sequence[Unit], text_key: str) -> _Sample:
    """Encode the first block of units that are spread over all."""
    sample = _Sample()
    for index in range(min(SAMPLES, len(units))):
        unit = units[index * len(units) // min(SAMPLES, len(units))]
        block = next(read_unit(unit, text_key, BEGINNING, block_bytes=SAMPLE_BYTES), None)
        if block is None:
            continue
        encoded = (
            engine.encode_lines(block.lines, text_key) if block.texts is None else engine.encode_texts(block.texts)
        )
        sample.source_bytes += block.source_bytes
        sample.documents += encoded.lengths.size
        sample.tokens += int(encoded.lengths.sum())
        sample.bad += len(encoded.bad) + len(block.bad)
    return sample


def _kinds(files: Sequence[SourceFile]) -> tuple[KindOfFiles, ...]:
    counts: dict[str, tuple[int, int]] = {}
    for file in files:
        kind = str(kind_of(file.path))
        count, source_bytes = counts.get(kind, (0, 0))
        counts[kind] = (count + 1, source_bytes + file.size_bytes)
    return tuple(
        KindOfFiles(kind=kind, files=count, source_bytes=source_bytes)
        for kind, (count, source_bytes) in sorted(counts.items())
    )
