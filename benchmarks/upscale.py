"""Depth up-scaling and export at full size: memory, and time beside a plain copy of the result.

    python benchmarks/upscale.py [--output DIR] [--small] [--mergekit PATH]

A seeded base of Mistral 7B's true shape (7.24 B, 14.5 GB of bf16) is written, `orchestrate upscale` makes the 10.73 B
model of it with a cold cache, and `cp` and fsync of the result's files are timed on the same disk, also cold. With
--mergekit, the program `mergekit-yaml` of an installation, its passthrough does the same to the same base. Then a
checkpoint of the full size is exported; its file is sparse, since 43 GB of fp32 weights would not fit beside the rest:
its time says nothing of a disk. Memory is the largest anonymous part of a process (RssAnon), looked at 20 times a
second; mapped files are the kernel's to drop. Each output is removed as soon as it is not needed: 45 GB suffice, and
are checked first. Dropping caches needs root. --small tries it all with 8 narrow layers.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_solar.checkpoint_files import ELEMENT_BYTES, WEIGHT, StagedPiece, header_of, stored_tensors, tensor_name
from megatron_solar.export import export
from megatron_solar.model_folder import expected_tensors
from megatron_solar.model_writer import write_model_folder
from megatron_solar.pieces import Rectangle
from megatron_solar.weights import canonical_keys, canonical_shape
from orchestrator.checkpoints import CheckpointFacts, FileFacts, RankPart, mark_complete, part_file, read_checkpoint
from orchestrator.config import compose
from orchestrator.demo import find_vocabulary
from orchestrator.model_shape import TransformerShape
from orchestrator.plan import TrainingPlan, make_plan

NEEDED_BYTES = 45e9
LARGEST_MEMORY_GB = 2.0
LARGEST_RATIO = 1.5
LOOK_SECONDS = 0.05
BLOCK = 1 << 25  # numbers drawn once, of which each tensor takes a stretch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """What a command took."""

    seconds: float
    processor_seconds: float
    anonymous_bytes: int


def main() -> None:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure"
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--export", nargs=3, type=Path, help=argparse.SUPPRESS)  # one part, in a process of its own
    options = parser.parse_args()
    if options.export is not None:
        checkpoint = read_checkpoint(options.export[0])
        plan = plan_of(checkpoint.facts.model, options.export[2])
        export(checkpoint, plan, options.export[1], run_name="benchmark")
        return
    shape = base_shape(options.small)
    free = shutil.disk_usage(options.output).free
    if not options.small and free < NEEDED_BYTES:
        sys.exit(f"{options.output} should have {NEEDED_BYTES / 1e9:.0f} GB free, found {free / 1e9:.1f}; name another")
    with tempfile.TemporaryDirectory(prefix="upscale-", dir=options.output) as name:
        measure(Path(name), shape, options.mergekit, options.small)


def base_shape(is_small: bool) -> TransformerShape:
    """Return Mistral 7B's shape, or a narrow one with the same rule to deepen it."""
    full = make_plan(compose("solar-10.7b", ["data.train=unused", "data.validation=[]"])).settings.model
    if is_small:
        return dataclasses.replace(full, num_layers=8, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8)
    return dataclasses.replace(full, num_layers=32)


def measure(folder: Path, shape: TransformerShape, mergekit: Path | None, is_small: bool) -> None:
    """Do all parts, one after another."""
    base, result, copy = folder / "base", folder / "result", folder / "copy"
    print(f"base: {shape.parameters():,} parameters", flush=True)
    write_base(base, shape)
    command = [sys.executable, "-m", "orchestrator.commands.main", "upscale", str(base), "--output", str(result)]
    upscaled = used(command)
    total = sum(file.stat().st_size for file in result.iterdir())
    report("orchestrate upscale", upscaled, total)
    deep = dataclasses.replace(shape, num_layers=shape.num_layers * 3 // 2)
    if not is_small and deep.parameters() != 10_731_524_096:
        sys.exit(f"the result should have SOLAR's 10,731,524,096 parameters, its shape has {deep.parameters():,}")
    shutil.rmtree(base)  # room for the copy
    copied = used(["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh", str(result), str(copy)])
    report("cp and fsync of the result", copied, total)
    ratio = upscaled.seconds / copied.seconds
    print(f"upscale / cp: {ratio:.2f} of the time, wanted at most {LARGEST_RATIO}", flush=True)
    shutil.rmtree(copy)
    companions = folder / "companions"  # what an export takes from its base beside the weights
    companions.mkdir()
    for file in result.iterdir():
        if not file.name.startswith("model"):
            shutil.copyfile(file, companions / file.name)
    shutil.rmtree(result)
    if mergekit is not None:
        write_base(base, shape)
        peer = used([str(mergekit), str(peer_config(folder, base, shape)), str(result)])
        report("mergekit passthrough", peer, total)
        shutil.rmtree(base)
        shutil.rmtree(result)
    checkpoint = write_checkpoint(folder / "step_0000001.attempt_0001", deep)
    exported = used([sys.executable, __file__, "--export", str(checkpoint), str(folder / "exported"), str(companions)])
    report("export of a sparse checkpoint", exported, total)
    largest = max(upscaled.anonymous_bytes, exported.anonymous_bytes) / 1e9
    print(f"largest anonymous memory: {largest:.2f} GB, wanted at most {LARGEST_MEMORY_GB}")


def report(what: str, use: Use, total: int) -> None:
    """Print a line of the table."""
    print(
        f"{what:32} {use.seconds:7.1f} s  {use.processor_seconds:7.1f} CPU-s  "
        f"{total / 1e6 / use.seconds:7.0f} MB/s of the result  {use.anonymous_bytes / 1e9:6.2f} GB anonymous",
        flush=True,
    )


def used(command: Sequence[str]) -> Use:
    """Run a command with a cold cache, and return what it took, its children included."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        print("not root: the cache stays warm", flush=True)
    before, started, largest = os.times(), time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            largest = max(largest, anonymous_bytes(process.pid))
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Use(seconds=time.monotonic() - started, processor_seconds=spent, anonymous_bytes=largest)


def anonymous_bytes(process: int) -> int:
    """Return a process's anonymous memory in bytes; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def write_base(output: Path, shape: TransformerShape) -> None:
    """Write a base whose tensors are stretches of one block of seeded numbers."""
    block = torch.empty(BLOCK).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(7)).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in expected_tensors(shape).items():
            count, first = torch.Size(size).numel(), int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "big")
            repeats = -(-(first + count) // BLOCK)
            yield name, block.repeat(repeats)[first : first + count].view(size)

    write_model_folder(output, shape, tensors(), dtype=torch.bfloat16, tokenizer_files=[find_vocabulary()])


def peer_config(folder: Path, base: Path, shape: TransformerShape) -> Path:
    """Write mergekit's passthrough of the same two slices."""
    drop = shape.num_layers // 4
    slices = "".join(
        f"  - sources:\n      - model: {base}\n        layer_range: [{first}, {stop}]\n"
        for first, stop in ((0, shape.num_layers - drop), (drop, shape.num_layers))
    )
    path = folder / "mergekit.yaml"
    path.write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")
    return path


def plan_of(shape: TransformerShape, base: Path) -> TrainingPlan:
    """Return the plan of a run of that shape."""
    fields = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    words = [f"model.{name}={getattr(shape, name)}" for name in fields]
    return make_plan(compose("solar-10.7b", [f"base={base}", "data.train=unused", "data.validation=[]", *words]))


def write_checkpoint(path: Path, shape: TransformerShape) -> Path:
    """Write a checkpoint of one rank with the fp32 weights of a shape, all zero and without blocks on the disk."""
    path.mkdir()
    pieces, first = [], 0
    for key in canonical_keys(shape):
        size = canonical_shape(key, shape)
        rectangle = Rectangle(offset=(0,) * len(size), size=size, start=0)
        pieces.append(StagedPiece(name=tensor_name(WEIGHT, key), shape=size, rectangle=rectangle, first_byte=first))
        first += rectangle.elements * ELEMENT_BYTES
    header = header_of(pieces)
    file = path / part_file(0)
    with file.open("xb") as stream:
        stream.write(header)
        stream.truncate(len(header) + first)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = FileFacts(bytes=file.stat().st_size, sha256=digest)
    tensors = stored_tensors(pieces, file.name)
    part = RankPart(rank=0, file=file.name, facts=facts, tensors=tensors, write_seconds=0.0, hash_seconds=0.0)
    mark_complete(
        path,
        CheckpointFacts(
            step=1, attempt=1, ancestry=(), consumed_samples=0, data_fingerprint="", tokenizer_sha256="", model=shape,
            layout="", precision="bf16", validation_loss=None, code_version="", written=0.0,
        ),
        [part],
    )  # fmt: skip
    return path


if __name__ == "__main__":
    main()
