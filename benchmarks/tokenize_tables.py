"""Measure engines and commands in interleaved rounds, and print the tables; see tokenize.py."""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
import numpy

from benchmarks import tokenize_commands
from benchmarks.tokenize_commands import ROOT, Usage
from benchmarks.tokenize_engines import ENGINES
from benchmarks.tokenize_inputs import input_files
from orchestrator.tokenize.hugging_face import tokenizer_files

TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
CPUS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A ratio or a size, and what issue 7 asks of it, where it names a number."""

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether it is what the issue asks for."""
        low = self.at_least is None or self.measured >= self.at_least
        return low and (self.at_most is None or self.measured <= self.at_most)


def main(description: str) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="JSON lines with a text each")
    parser.add_argument("--megabytes", type=float, help="of text; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    with tempfile.TemporaryDirectory(prefix="benchmark-tokenize-") as name:
        folder = Path(name)
        say("writing the corpus as a file of each kind")
        corpus = [] if options.corpus is None else ["--corpus", str(options.corpus.absolute())]
        size = [] if options.megabytes is None else ["--megabytes", str(options.megabytes)]
        child("tokenize_inputs", str(folder / "all"), *corpus, *size)
        child("tokenize_inputs", str(folder / "one"), *corpus, "--documents", "1")
        engines = measure_engines(folder, options.rounds)
        commands = measure_commands(folder, options.rounds, options.megatron)
    findings = find(engines, commands)
    if options.json:
        plain = [dataclasses.asdict(finding) | {"is_met": finding.is_met} for finding in findings]
        print(json.dumps({"engines": engines, "commands": commands, "findings": plain}, indent=2))
        return
    print_tables(engines, commands, options.rounds)
    print_findings(findings)


def say(text: str) -> None:
    """Tell what is under way."""
    print(text, file=sys.stderr, flush=True)


def child(module: str, *arguments: str) -> str:
    """Run a module beside this one, with one thread a library, and return what it prints."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_engines(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each engine medians of seconds, and how many documents have other ids than sentencepiece's."""
    peers = [name for name in ENGINES if name.startswith("native") or importlib.util.find_spec(name)]
    if missing := [name for name in ENGINES if name not in peers]:
        say(f"left out, since {sys.executable} cannot import them: {', '.join(missing)}")
    corpus = str(input_files(folder / "all")["jsonl"])
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for number in range(rounds):
        for name in peers:
            say(f"round {number + 1} of {rounds}: engine {name}")
            ids_file = str(folder / f"{name}.ids")
            measured[name].append(json.loads(child("tokenize_engines", name, corpus, str(TOKENIZER), ids_file)))
    reference = numpy.fromfile(folder / "sentencepiece.ids", dtype=numpy.uint32)
    return {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        | {"documents": len(reference)}
        | {"differing": differing(numpy.fromfile(folder / f"{name}.ids", dtype=numpy.uint32), reference)}
        for name, found in measured.items()
    }


def measure_commands(folder: Path, rounds: int, megatron: Path | None) -> dict[str, dict[str, Any]]:
    """Return for each command medians of seconds, peak memory, CPU-seconds of a start, and documents that differ."""
    commands = tokenize_commands.our_commands(TOKENIZER)
    if megatron is not None:
        hugging_face = folder / "hugging_face"
        hugging_face.mkdir()
        for name, content in tokenizer_files(TOKENIZER).items():
            (hugging_face / name).write_text(content, encoding="utf-8")
        commands += tokenize_commands.megatron_commands(megatron.absolute(), TOKENIZER, hugging_face)
    outputs = {command.name: folder / f"output-{number}" for number, command in enumerate(commands)}
    starts: dict[str, list[Usage]] = {command.name: [] for command in commands}
    measured: dict[str, list[Usage]] = {command.name: [] for command in commands}
    for number in range(rounds):
        for command in commands:
            say(f"round {number + 1} of {rounds}: {command.name}")
            output = outputs[command.name]
            starts[command.name].append(tokenize_commands.run(command, input_files(folder / "one"), output))
            measured[command.name].append(tokenize_commands.run(command, input_files(folder / "all"), output))
    # Last, since reading the shards makes this process large, and its children with it.
    found = {
        name: tokenize_commands.checksums(tokenize_commands.output_prefixes(output)) for name, output in outputs.items()
    }
    reference = found["orchestrate, 2, sentencepiece"]
    return {
        name: {
            "cpu_seconds": statistics.median(usage.cpu_seconds for usage in usages),
            "start_cpu_seconds": statistics.median(usage.cpu_seconds for usage in starts[name]),
            "wall_seconds": statistics.median(usage.wall_seconds for usage in usages),
            "largest_process_bytes": max(usage.largest_process_bytes for usage in usages),
            "documents": len(reference),
            "differing": differing(found[name], reference),
        }
        for name, usages in measured.items()
    }


def differing(found: Any, reference: Any) -> int:
    """Return how many documents have other checksums; all, where there are not as many."""
    return int((found != reference).sum()) if len(found) == len(reference) else len(reference)


def find(engines: dict[str, dict[str, float]], commands: dict[str, dict[str, Any]]) -> list[Finding]:
    """Return what issue 7 asks for, as far as it could be measured."""

    def engine(name: str) -> float:
        return engines[name]["cpu_seconds"]

    def cpu(name: str) -> float:
        return float(commands[name]["cpu_seconds"])

    def work(name: str) -> float:
        return cpu(name) - float(commands[name]["start_cpu_seconds"])

    def wall(name: str) -> float:
        return float(commands[name]["wall_seconds"])

    ours, reference, base = "orchestrate, 2 workers", "orchestrate, 2, sentencepiece", engine("sentencepiece")
    parsed = base / engine("native, JSON lines")
    findings = [
        Finding(what="engines, CPU: sentencepiece / native", measured=base / engine("native"), at_least=18),
        Finding(what="engines, CPU: sentencepiece / native that parses JSON too", measured=parsed, at_least=18),
        Finding(what="commands, CPU: ours by sentencepiece / ours", measured=cpu(reference) / cpu(ours), at_least=18),
        Finding(what="  without the start of each", measured=work(reference) / work(ours), at_least=18),
    ]
    for script, ratio, wall_ratio in (("preprocess_data.py", 12, None), ("preprocess_data_fast.py", 2.5, 2.5)):
        if script in commands:
            findings += [
                Finding(what=f"commands, CPU: {script} / ours", measured=cpu(script) / cpu(ours), at_least=ratio),
                Finding(what="  without the start of each", measured=work(script) / work(ours), at_least=ratio),
                Finding(what="  wall", measured=wall(script) / wall(ours), at_least=wall_ratio),
            ]
    largest = max(row["largest_process_bytes"] for name, row in commands.items() if name.startswith("orchestrate"))
    return [
        *findings,
        Finding(what="wall: 1 worker / 2 workers", measured=wall("orchestrate, 1 worker") / wall(ours)),
        Finding(what="wall: zst / plain", measured=wall("orchestrate, 2 workers, zst") / wall(ours)),
        Finding(what="memory of our largest process, MB", measured=largest / 1e6, at_most=500),
    ]


def print_tables(engines: dict[str, dict[str, float]], commands: dict[str, dict[str, Any]], rounds: int) -> None:
    """Print what was measured."""
    text_bytes = engines["sentencepiece"]["text_bytes"]
    documents = engines["sentencepiece"]["documents"]
    print(f"{text_bytes / 1e6:.1f} MB of text in {documents:,.0f} documents, {TOKENIZER.name}")
    print(f"on {CPUS} CPUs, medians of {rounds}")
    print(f"\n{'engine, one thread':<34}{'CPU-s':>9}{'MB/CPU-s':>10}{'ratio':>8}{'wall s':>9}{'differ':>9}")
    base = engines["sentencepiece"]["cpu_seconds"]
    for name, row in engines.items():
        rate = text_bytes / 1e6 / row["cpu_seconds"]
        print(
            f"{name:<34}{row['cpu_seconds']:>9.2f}{rate:>10.1f}{base / row['cpu_seconds']:>8.1f}"
            f"{row['wall_seconds']:>9.2f}{row['differing']:>9,}"
        )
    print(
        f"\n{'command':<34}{'CPU-s':>9}{'of start':>9}{'MB/CPU-s':>10}{'wall s':>8}{'MB/s':>7}"
        f"{'peak MB':>9}{'differ':>9}"
    )
    for name, row in commands.items():
        print(
            f"{name:<34}{row['cpu_seconds']:>9.2f}{row['start_cpu_seconds']:>9.2f}"
            f"{text_bytes / 1e6 / row['cpu_seconds']:>10.1f}{row['wall_seconds']:>8.2f}"
            f"{text_bytes / 1e6 / row['wall_seconds']:>7.0f}{row['largest_process_bytes'] / 1e6:>9.0f}"
            f"{row['differing']:>9,}"
        )
    print("differ: documents with other ids than sentencepiece's; peak: the largest process of the command")


def print_findings(findings: list[Finding]) -> None:
    """Print measured against wanted."""
    print(f"\n{'issue 7 asks for':<62}{'measured':>10}{'wanted':>14}")
    for finding in findings:
        wanted = ""
        if finding.at_least is not None:
            wanted = f"at least {finding.at_least:g}"
        if finding.at_most is not None:
            wanted = f"at most {finding.at_most:g}"
        print(f"{finding.what:<62}{finding.measured:>10.1f}{wanted:>14}{'' if finding.is_met else '  NOT MET'}")
