"""What depth up-scaling does to a small model, and how soon training mends it: evidence for docs/depth.md.

    python benchmarks/depth_recovery.py --output FOLDER [--seeds 3] [--minutes N] [--report DOCUMENT]

A base of 8 layers is trained on English documentation, deepened by each strategy of `orchestrate upscale`, and trained
on with all weights or with the new layers alone; beside it the base trained on for equal FLOPs, and the deeper model
from scratch for all those FLOPs together. Then other courses of the rate, and text of another kind with and without
replay.

One core is used. Each run is a line of FOLDER/results.jsonl once it is whole, so that a killed command, started again,
does only the rest. --report puts the tables of what there is into a document, such as docs/depth.md, and the picture
beside it; it trains nothing.
"""

import argparse
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import depth_cases, depth_model, depth_report
from benchmarks.depth_cases import BASE, CASES, Case, new_layers
from benchmarks.depth_model import (
    BATCH,
    EVALUATED,
    SEQUENCE_LENGTH,
    SHAPE,
    Point,
    held_out_loss,
    sequences_of,
    spread,
    train,
)
from benchmarks.depth_text import KINDS, Text, open_text
from megatron_solar.depth import depth_map, is_measured
from megatron_solar.evaluate import evaluate, layer_cosines
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.model_writer import write_model_folder
from megatron_solar.upscale import plan_upscale, write_upscaled
from megatron_solar.weights import RandomWeights
from orchestrator.files import JsonLines, read_json_lines
from orchestrator.values import to_plain

WIDENED = 5  # deviation 0.1 in place of the 0.02 of models that are 64 times as wide: these learn sooner
MEASURED = 64  # sequences for the cosines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to begin with, and which of their layers are copies of one before."""

    parameters: dict[str, torch.Tensor]
    sources: tuple[int, ...] = ()


def main() -> None:
    """Do the runs that are missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--report", type=Path, metavar="DOCUMENT", help="has a place for each table")
    options = parser.parse_args()
    results = options.output / "results.jsonl"
    if options.report:
        depth_report.write(options.report, [record for _, record in read_json_lines(results)])
        return
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    text = open_text(options.output / "text")
    setting = setting_of(text)
    done = {(record["seed"], record["case"]) for _, record in read_json_lines(results) if _is_of(record, setting)}
    missing = [(seed, case) for seed in range(options.seeds) for case in CASES if (seed, case.name) not in done]
    deadline = time.monotonic() + 60 * options.minutes
    lines = JsonLines(results)
    for number, (seed, case) in enumerate(missing, start=1):
        if time.monotonic() > deadline:
            print(f"{len(missing) - number + 1} runs are left; the same command goes on", file=sys.stderr)
            break
        before = time.process_time()
        sources, points = run(options.output, text, seed, case)
        seconds = round(time.process_time() - before, 1)
        record = {"seed": seed, "case": case.name, "setting": setting, "sources": sources, "points": to_plain(points)}
        lines.append({**record, "cpu_seconds": seconds})
        last = ", ".join(f"{kind} {loss:.4f}" for kind, loss in points[-1].losses.items())
        print(f"{number}/{len(missing)}  seed {seed}  {case.name:<40} {last}  {seconds:.0f} CPU-s", flush=True)
    lines.close()


def run(output: Path, text: Text, seed: int, case: Case) -> tuple[tuple[int, ...], list[Point]]:
    """Do one run; return the source of each of its layers and its points. A base is kept in `output`."""
    kinds = KINDS if case.kind == "Python" else (case.kind,)
    held_out = {kind: _held_out(text, kind) for kind in kinds}
    base = output / f"base-{seed}"
    start = _start(base, case, seed, held_out)
    points = train(
        start.parameters,
        case.shape,
        batches_of(text, seed, case),
        steps=case.steps,
        rate=case.rate,
        layers=new_layers(start.sources) if case.trained == "new" else None,
        evaluate_after=case.evaluated_after,
        held_out=held_out,
    )
    if case == BASE:
        shutil.rmtree(base, ignore_errors=True)  # of a command killed before its line was written
        write_model_folder(base, SHAPE, start.parameters.items(), dtype=torch.float32)
    return start.sources, points


def batches_of(text: Text, seed: int, case: Case) -> Iterator[torch.Tensor]:
    """Return the run's batches, of sequences in the seed's order; English from where the base's training ended."""
    order = torch.Generator().manual_seed(seed)
    english = _shuffled(text, "English", order)
    seen = depth_cases.BASE_STEPS * BATCH
    if case.kind == "English":
        fresh = english if case.start == "nothing" else english[seen:]
    else:
        fresh = _shuffled(text, case.kind, order)
    replayed = english[:seen][torch.randperm(seen, generator=order)]
    is_replayed = torch.rand(case.steps * BATCH, generator=order) < case.replay
    rows = torch.where(is_replayed[:, None], replayed[: len(is_replayed)], fresh[: len(is_replayed)])
    return iter(torch.split(rows, BATCH))


def setting_of(text: Text) -> str:
    """Return a fingerprint of what a result depends on beside seed and case: the text, and every constant."""
    numbers: dict[str, object] = {
        name: value
        for names in (vars(depth_cases), vars(depth_model), globals())
        for name, value in names.items()
        if name.isupper() and isinstance(value, int | float | tuple) and name != "CASES"
    }
    numbers["shape"] = (SHAPE.parameters(), SHAPE.flops_per_token(SEQUENCE_LENGTH))
    return hashlib.sha256(f"{text.checksum} {sorted(numbers.items())}".encode()).hexdigest()[:12]


def _start(base: Path, case: Case, seed: int, held_out: dict[str, torch.Tensor]) -> Start:
    if case.start == "nothing":
        new = RandomWeights(case.shape, seed)
        drawn = {name: new.tensor(name) for name in expected_tensors(case.shape)}
        return Start(parameters={name: value * (WIDENED if value.dim() > 1 else 1) for name, value in drawn.items()})
    folder = ModelFolder.open(base)
    if case.start == "base":
        return Start(parameters=_weights(folder))
    tokens = held_out["English"].int().numpy()
    cosines = layer_cosines(folder, tokens[:MEASURED]) if is_measured(case.start) else ()
    plan = plan_upscale(folder, depth_map(case.start, SHAPE.num_layers, case.layers, cosines=cosines), cosines=cosines)
    with tempfile.TemporaryDirectory(prefix="depth-recovery-") as name:
        write_upscaled(folder, plan, Path(name) / "deeper")
        start = Start(parameters=_weights(ModelFolder.open(Path(name) / "deeper")), sources=plan.layers.sources)
    told = float(evaluate(folder, plan.layers, plan.dtype, tokens).result_losses.mean())
    found = held_out_loss(start.parameters, case.shape, held_out["English"])
    if abs(told - found) > 1e-4:
        raise RuntimeError(f"`upscale --evaluate` says the deepened model's loss is {told:.5f}, here it is {found:.5f}")
    return start


def _weights(folder: ModelFolder) -> dict[str, torch.Tensor]:
    return {name: folder.tensor(name).clone() for name in expected_tensors(folder.shape)}


def _held_out(text: Text, kind: str) -> torch.Tensor:
    return spread(sequences_of(text.held_out[kind]), EVALUATED)


def _shuffled(text: Text, kind: str, order: torch.Generator) -> torch.Tensor:
    sequences = sequences_of(text.training[kind])
    return sequences[torch.randperm(len(sequences), generator=order)]


def _is_of(record: dict[str, object], setting: str) -> bool:
    if record["setting"] != setting:
        raise SystemExit(
            f"results.jsonl has runs of the setting {record['setting']}, this is {setting}; name another --output"
        )
    return True


if __name__ == "__main__":
    main()
