"""One rank of a layout that loads several bases in turn and says what it computes of them; run by test_parity.py.

    python -m tests.parity_ranks RUN ATTEMPT --rank N

The run's folder has `bases.json` (names and folders) and `tokens.pt`, [micro-batches, batch, sequence + 1]. Each rank
leaves `found-N.pt` in the attempt: of each base the logits before a step, the losses of some steps, and what is left in
the rows that pad the vocabulary.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_solar import compat
from megatron_solar.model_folder import ModelFolder
from megatron_solar.one_step import forward_step
from megatron_solar.replica import Replica, build_replica, weight_source
from megatron_solar.weights import EMBEDDING, OUTPUT_LAYER, vocabulary_rows
from megatron_solar.worker import join
from orchestrator.files import read_json
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import RunDirectory

STEPS = 2


def main(arguments: Sequence[str]) -> int:
    """Run one rank."""
    parser = argparse.ArgumentParser(prog="parity_ranks")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args(arguments)
    run = RunDirectory(options.run)
    attempt = run.attempt(options.attempt)
    plan = read_plan(run.launched_plan)
    torch.set_num_threads(1)
    join(attempt, options.rank, plan.layout.world_size, "gloo", 60)
    compat.initialize_parallel(plan.layout, plan.settings.training.seed)
    tokens_MBS = torch.load(run.path / "tokens.pt")
    found = {name: _compute(plan, Path(base), tokens_MBS) for name, base in read_json(run.path / "bases.json").items()}
    torch.save(found, attempt.path / f"found-{options.rank}.pt")
    return 0


def _compute(plan: TrainingPlan, base: Path, tokens_MBS: Tensor) -> dict[str, Any]:
    shape = ModelFolder.open(base).shape
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, base=str(base), model=shape))
    replica = build_replica(plan, weight_source(plan))
    batches = [_batch(tokens_BS % shape.vocab_size) for tokens_BS in tokens_MBS]
    return {
        "logits": _logits(plan, replica, batches),
        "losses": [_step(plan, replica, batches) for _ in range(STEPS)],
        "padding": _padding(plan, replica),
    }


def _batch(tokens_BS: Tensor) -> dict[str, Tensor]:
    inputs_BS = tokens_BS[:, :-1].contiguous()
    positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS)
    return {"tokens": inputs_BS, "labels": tokens_BS[:, 1:].contiguous(), "position_ids": positions_BS}


def _logits(plan: TrainingPlan, replica: Replica, batches: list[dict[str, Tensor]]) -> Tensor | None:
    """Return this rank's columns of the logits of all micro-batches; nothing where it has no output layer."""
    kept: list[Tensor] = []

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)

        def keep(logits_BSV: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(logits_BSV.clone())
            return logits_BSV.sum(), logits_BSV.sum()

        return model(batch["tokens"], batch["position_ids"], None), keep

    with torch.no_grad():
        compat.run_schedule(
            forward_step, replica.chunks, batches, plan.layout, plan.settings.data.sequence_length, forward_only=True
        )
    return torch.stack(kept) if kept else None


def _step(plan: TrainingPlan, replica: Replica, batches: list[dict[str, Tensor]]) -> float:
    """Take one step on all micro-batches and return the loss before it, on the last stage."""
    for chunk in replica.chunks:
        chunk.zero_grad_buffer()
    replica.optimizer.zero_grad()
    length = plan.settings.data.sequence_length
    losses = compat.run_schedule(forward_step, replica.chunks, batches, plan.layout, length)
    compat.set_learning_rate(
        replica.optimizer, plan.settings.training.learning_rate, plan.settings.training.weight_decay
    )
    replica.optimizer.step()
    return float(torch.stack(list(losses)).mean()) if losses else float("nan")


def _padding(plan: TrainingPlan, replica: Replica) -> float:
    """Return the largest weight in the rows that pad the vocabulary."""
    rows = vocabulary_rows(plan.settings.model.vocab_size, compat.tensor_rank(), plan.layout.tensor_parallel)
    padding = [
        parameter[rows:].abs().flatten()
        for chunk in replica.chunks
        for name, parameter in chunk.module.named_parameters()
        if name in (EMBEDDING, OUTPUT_LAYER)
    ]
    return float(torch.cat([*padding, torch.zeros(1)]).max())
