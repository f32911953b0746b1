"""Whole commands from a file to a Megatron data set: ours on each kind of file, and Megatron-LM's two scripts."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command, with the places that are filled in: {input} and {output}."""

    name: str
    kind: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process and all its children took."""

    cpu_seconds: float
    wall_seconds: float
    largest_process_bytes: int
    """Peak memory of the largest of them."""


def our_commands(model: Path) -> list[Command]:
    """Return `orchestrate tokenize` by one and two workers, on each kind of file, and with sentencepiece."""

    def ours(name: str, kind: str, workers: int, engine: str = "native") -> Command:
        options = ("--tokenizer", str(model), "--workers", str(workers), "--engine", engine)
        program = (sys.executable, "-m", "orchestrator.commands.main", "tokenize", "{input}", "--output", "{output}")
        return Command(name=name, kind=kind, arguments=(*program, *options))

    return [
        ours("orchestrate, 1 worker", "jsonl", 1),
        ours("orchestrate, 2 workers", "jsonl", 2),
        ours("orchestrate, 2 workers, zst", "jsonl.zst", 2),
        ours("orchestrate, 2 workers, gz", "jsonl.gz", 2),
        ours("orchestrate, 2 workers, parquet", "parquet", 2),
        ours("orchestrate, 2, sentencepiece", "jsonl", 2, "sentencepiece"),
    ]


def megatron_commands(checkout: Path, model: Path, hugging_face: Path) -> list[Command]:
    """Return Megatron-LM's two scripts, with two workers, as its documentation calls them."""
    environment = {"PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "true"}

    def script(name: str, *options: str) -> Command:
        program = (sys.executable, str(checkout / "tools" / name), "--input", "{input}", "--output-prefix", "{output}")
        return Command(name=name, kind="jsonl", arguments=(*program, "--append-eod", *options), environment=environment)

    return [
        script(
            "preprocess_data.py", "--workers", "2", "--tokenizer-type", "Llama2Tokenizer",
            "--tokenizer-model", str(model),
        ),
        script(
            "preprocess_data_fast.py", "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", str(hugging_face), "--use-gigatoken",
        ),
    ]  # fmt: skip


def run(command: Command, inputs: dict[str, Path], output: Path) -> Usage:
    """Run a command to a new output.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    for old in output.parent.glob(f"{output.name}*"):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
    arguments = [part.format(input=inputs[command.kind], output=output) for part in command.arguments]
    said = output.with_name(f"{output.name}.said")
    started = time.perf_counter()
    with said.open("wb") as file:
        environment = os.environ | command.environment
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    wall_seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(
            f"{command.name} ended with {process.returncode}: {said.read_text(errors='replace')[-2000:]}"
        )
    return Usage(
        cpu_seconds=used.ru_utime + used.ru_stime,
        wall_seconds=wall_seconds,
        largest_process_bytes=used.ru_maxrss * 1024,
    )


def checksums(prefixes: Sequence[Path]) -> NDArray[numpy.uint32]:
    """Return a CRC-32 of each document's ids, of shards one after another."""
    found: list[int] = []
    for prefix in prefixes:
        with Path(f"{prefix}.idx").open("rb") as file:
            head = file.read(34)
            sequences = int.from_bytes(head[18:26], "little")
            lengths = numpy.fromfile(file, dtype="<i4", count=sequences)
        width = {8: "<u2", 4: "<i4"}[head[17]]
        ids = numpy.fromfile(f"{prefix}.bin", dtype=width)
        if sequences:
            found += [zlib.crc32(part.tobytes()) for part in numpy.split(ids, numpy.cumsum(lengths)[:-1])]
    return numpy.asarray(found, dtype=numpy.uint32)


def output_prefixes(output: Path) -> list[Path]:
    """Return the prefixes of the shards that a command has written."""
    if output.is_dir():
        from orchestrator.tokenize.manifest import read_manifest

        return [Path(prefix) for prefix in read_manifest(output).shard_prefixes(output)]
    return [Path(f"{output}_text_document")]
