"""The corpus as a file of each kind that is read.

    python -m benchmarks.tokenize_inputs FOLDER [--corpus FILE] [--megabytes N] [--documents N]

Run as a process of its own, so that the benchmark stays small: a child's peak memory begins with its parent's.
"""

import argparse
import gzip
import itertools
import json
import math
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests import text_corpus

KINDS = ("jsonl", "jsonl.zst", "jsonl.gz", "parquet")


def input_files(folder: Path) -> dict[str, Path]:
    """Return the files by kind."""
    return {kind: folder / f"corpus.{kind}" for kind in KINDS}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--megabytes", type=float, default=math.inf)
    parser.add_argument("--documents", type=int)
    options = parser.parse_args()
    options.folder.mkdir()
    files = input_files(options.folder)
    corpus = options.corpus or text_corpus.corpus()
    with files["jsonl"].open("wb") as file:
        file.writelines(itertools.islice(text_corpus.first_lines(corpus, options.megabytes), options.documents))
    with files["jsonl"].open("rb") as file, pyarrow.CompressedOutputStream(files["jsonl.zst"], "zstd") as target:
        shutil.copyfileobj(file, target)
    with files["jsonl"].open("rb") as file, gzip.open(files["jsonl.gz"], "wb", compresslevel=6) as target:
        shutil.copyfileobj(file, target)
    with files["jsonl"].open("rb") as file:
        texts = [json.loads(line)["text"] for line in file]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), files["parquet"], row_group_size=2000)


if __name__ == "__main__":
    main()
