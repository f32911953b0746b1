"""Checkpoints of a few numbers, written as ranks and supervisor write them, for tests that need no ranks."""

import json
import time
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import (
    Checkpoint,
    CheckpointFacts,
    FileFacts,
    Piece,
    RankPart,
    StoredTensor,
    checkpoint_name,
    mark_complete,
    part_file,
    part_record,
)
from orchestrator.files import sha256_of, write_json
from orchestrator.model_shape import TransformerShape
from orchestrator.run_directory import RunDirectory
from orchestrator.values import to_plain

SHAPE = TransformerShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    vocab_size=32,
    max_position_embeddings=16,
)
RANKS = 2
ROWS, COLUMNS = 4, 6


def facts(step: int, attempt: int = 1, **different: Any) -> CheckpointFacts:
    """Return what a marker says of a step, with what differs."""
    plain: dict[str, Any] = {
        "ancestry": (),
        "consumed_samples": step * 8,
        "data_fingerprint": "data",
        "tokenizer_sha256": "tokenizer",
        "model": SHAPE,
        "layout": "TP 1 × PP 1 × DP 2",
        "precision": "fp32",
        "validation_loss": None,
        "code_version": "0",
        "written": time.time(),
        **different,
    }
    return CheckpointFacts(step=step, attempt=attempt, **plain)


def write_parts(run: RunDirectory, step: int, attempt: int = 1) -> tuple[Path, list[RankPart]]:
    """Write the files of a checkpoint of two ranks, half of one tensor each, without index and marker."""
    path = run.checkpoint_path(checkpoint_name(step, attempt))
    path.mkdir(parents=True)
    parts = []
    for rank in range(RANKS):
        rows = ROWS // RANKS
        piece = Piece(file=part_file(rank), offset=(rank * rows, 0), size=(rows, COLUMNS))
        header = {f"weight/w[{rank * rows}:{(rank + 1) * rows},0:{COLUMNS}]": {
            "dtype": "F32", "shape": [rows, COLUMNS], "data_offsets": [0, rows * COLUMNS * 4]}}  # fmt: skip
        text = json.dumps(header).encode()
        (path / piece.file).write_bytes(len(text).to_bytes(8, "little") + text + bytes([rank]) * rows * COLUMNS * 4)
        file_facts = FileFacts(bytes=(path / piece.file).stat().st_size, sha256=sha256_of(path / piece.file))
        tensor = StoredTensor(shape=(ROWS, COLUMNS), dtype="F32", pieces=(piece,))
        part = RankPart(
            rank=rank,
            file=piece.file,
            facts=file_facts,
            tensors={"weight/w": tensor},
            write_seconds=0.1,
            hash_seconds=0.05,
        )
        write_json(path / part_record(rank), to_plain(part))
        parts.append(part)
    return path, parts


def write_checkpoint(run: RunDirectory, step: int, attempt: int = 1, **different: Any) -> Checkpoint:
    """Write a whole checkpoint."""
    path, parts = write_parts(run, step, attempt)
    return mark_complete(path, facts(step, attempt, **different), parts)
