"""A checkpoint of a model in training, written while training goes on and loaded into a new one."""

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check_model import Found, Trial
from benchmarks.gpu_check_sizes import Size, settings_of
from megatron_solar.checkpoint import CheckpointWriter
from megatron_solar.run_state import load_state
from orchestrator.checkpoints import CheckpointFacts, checkpoint_name, mark_complete, read_checkpoint, read_parts
from orchestrator.plan import TrainingPlan
from orchestrator.settings import PrecisionSettings
from orchestrator.units import format_bytes
from orchestrator.version import VERSION


def checkpoint_round_trip(size: Size, precision: PrecisionSettings, device: str, folder: Path) -> Iterator[Found]:
    """Save while training goes on, load into a new replica, and want every bit and the next two losses again."""
    settings = settings_of(size, precision, device)
    trial = Trial(settings, folder / "before")
    for _ in range(2):
        trial.step()
    kept = [piece.values.detach().to("cpu", copy=True) for piece in trial.replica.pieces]
    path = trial.run.checkpoint_path(checkpoint_name(2, 1))
    writer = CheckpointWriter(0)
    waited = writer.save(path, trial.replica.pieces)
    wanted = [trial.step()[0]]
    parts = read_parts(path, 1)
    was_written_aside = parts is None  # a step went by, and the file was not whole yet
    wanted.append(trial.step()[0])
    writer.wait()
    parts = read_parts(path, 1)
    if parts is None:
        raise FileNotFoundError(f"{path} should have the record of rank 0")
    mark_complete(path, _facts(trial.plan), parts)
    del trial
    gc.collect()
    again = Trial(settings, folder / "after", is_filled_later=True)
    with torch.no_grad():
        for piece in again.replica.pieces:
            piece.values.fill_(math.nan)  # so that nothing but the checkpoint can make them right
    began = time.perf_counter()
    damage: list[Any] = []
    tell: Any = damage.append
    load_state([read_checkpoint(path)], again.replica, tell)
    again.wait()
    load_seconds = time.perf_counter() - began
    again.done = 2
    wrong = [f"{event}" for event in damage]
    wrong += [
        f"{piece.name} is not what was saved"
        for before, piece in zip(kept, again.replica.pieces, strict=True)
        if not torch.equal(before, piece.values.to("cpu"))
    ][:5]
    found = [again.step()[0] for _ in wanted]
    # Equal weights give an equal forward pass; the backward pass of a GPU's attention adds in any order.
    limits = (1e-6, 1e-3) if device == "cuda" else (0.0, 0.0)
    for number, (a, b, limit) in enumerate(zip(wanted, found, limits, strict=True), 3):
        if not abs(b - a) <= limit * abs(a):
            wrong.append(f"the loss of step {number} should be {a!r}, found {b!r}")
    part = parts[0]
    size_bytes = part.facts.bytes
    told = (
        f"{len(kept)} pieces, {format_bytes(size_bytes)} equal bit for bit; training waited {waited:.2f} s, written in "
        f"{part.write_seconds:.1f} s ({part.hash_seconds:.1f} s of it hashing), loaded in {load_seconds:.1f} s; "
        f"next losses differ by {max(abs(b - a) for a, b in zip(wanted, found, strict=True)):.1e}"
    )
    figures = {
        "bytes": size_bytes,
        "waited_seconds": waited,
        "write_seconds": part.write_seconds,
        "hash_seconds": part.hash_seconds,
        "load_seconds": load_seconds,
        "training_went_on_meanwhile": was_written_aside,
        "losses": wanted,
        "losses_after_loading": found,
    }
    yield "checkpoint", precision.label, wrong, told, figures


def _facts(plan: TrainingPlan) -> CheckpointFacts:
    return CheckpointFacts(
        step=2,
        attempt=1,
        ancestry=(),
        consumed_samples=plan.consumed_samples(2),
        data_fingerprint="drawn",
        tokenizer_sha256="none",
        model=plan.settings.model,
        layout=plan.layout.describe(),
        precision=plan.settings.precision.label,
        validation_loss=None,
        code_version=VERSION,
        written=time.time(),
    )
