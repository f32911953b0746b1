"""A small corpus of every kind of file, and data sets compared byte by byte."""

import gzip
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mistral_common
from backports import zstd

from orchestrator.tokenize.stage import tokenize_corpus

T = TypeVar("T")
TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"

SETTINGS: dict[str, Any] = {
    "validation_every": 10,
    "max_bad": 0.05,
    "unit_bytes": 100_000,
    "block_bytes": 10_000,
    "shard_tokens": 15_000,
    "commit_seconds": 0.0,
    "progress": False,
}
"""Many units, blocks, commits and shards of little text."""


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    """Write texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_corpus(folder: Path, kilobytes: int) -> Path:
    """Write plain and compressed JSON lines, parquet and plain text, with bad and empty records among them."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    chance = random.Random(5)
    words = [word for word in Path(__file__).read_text().split() if word] + ["한국어", "日本語", "</s>", "Ünï"]

    def texts() -> list[str]:
        made: list[str] = []
        while sum(map(len, made)) < kilobytes * 250:
            made.append(" ".join(chance.choices(words, k=chance.randint(0, 150))))
        return made

    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts()]
    for _ in range(len(lines) // 50):
        lines.insert(chance.randrange(len(lines)), chance.choice([b'{"text": 1}', b"half", b'{"text": "\xff"}', b""]))
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    compressed = "".join(json.dumps({"text": text}) + "\n" for text in texts()).encode()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(compressed, mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstd.compress(compressed + b'{"text": "half'))
    table = pyarrow.table({"text": [*texts(), None, ""]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=100)
    for number, text in enumerate(texts()[:60]):
        (folder / f"e{number:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    return folder


def contents(folder: Path, name: str) -> dict[str, bytes]:
    """Return every file of a data set and of its validation part by name, without what says when it was made."""
    found = {}
    for part in ("", "-validation"):
        for path in (folder / f"{name}{part}").rglob("*"):
            content = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(content)
                del manifest["created"]
                content = json.dumps(manifest).encode()
            # A picture has the folder's name in its title.
            if path.name != "documents.svg":
                found[f"{part}/{path.name}"] = content
    return found


def undisturbed(folder: Path) -> Path:
    """Write `corpus` into a folder, and as `expected` what one process makes of it."""
    write_corpus(folder / "corpus", 400)
    tokenize_corpus([folder / "corpus"], TOKENIZER, folder / "expected", workers=1, **SETTINGS)
    return folder


def wait_within(seconds: float, is_so: Callable[[], T]) -> T:
    """Return what is not false at last."""
    until = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found
