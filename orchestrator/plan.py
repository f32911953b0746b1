"""The frozen plan of a run: settings, rank grid, steps, memory, and what it would cost. Pure.

Standard library only: supervisor and workers read it from the run folder.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from orchestrator.checks import build_layout
from orchestrator.errors import OrchestrateError
from orchestrator.files import read_json, write_json
from orchestrator.layout import ParallelLayout
from orchestrator.schedule import BatchSpan, batch_spans, consumed_samples, span_of, total_steps
from orchestrator.settings import RunSettings
from orchestrator.values import from_plain, to_plain

MFU_SCENARIOS = (0.35, 0.45, 0.55)
"""Shares of the peak for which the time is told; a prediction of the share itself is not made here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything about a run that is decided before it starts."""

    settings: RunSettings
    layout: ParallelLayout
    tokens_per_step: int
    """With the final batch; `consumed_tokens` knows of the ramp before it."""
    total_steps: int
    parameters: int
    flops_per_token: float
    """Forward and backward, causal half of the attention, no recomputation."""
    static_bytes_per_rank: int
    """Weights, gradients and optimizer on the rank that holds most, without activations."""
    checkpoint_bytes: int
    """Of one checkpoint: fp32 weights and two moments, whatever the precision."""
    fingerprint: str

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps, the last one whole."""
        return self.consumed_tokens(self.total_steps)

    @property
    def batch_spans(self) -> tuple[BatchSpan, ...]:
        """The global batch from which step on; one entry without a ramp."""
        return batch_spans(self.settings)

    def batch_size(self, step: int) -> int:
        """Sequences of a step, counted from 1, over all ranks."""
        return span_of(self.batch_spans, step).batch_size

    def num_microbatches(self, step: int) -> int:
        """Micro-batches that one pipeline works through in a step, counted from 1."""
        return self.batch_size(step) // (self.layout.micro_batch_size * self.layout.data_parallel)

    def consumed_samples(self, step: int) -> int:
        """Training samples that the first `step` steps read; the next step begins with this one."""
        return consumed_samples(self.batch_spans, step)

    def consumed_tokens(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        return self.consumed_samples(step) * self.settings.data.sequence_length

    def seconds_at(self, mfu: float) -> float | None:
        """Return the training time at a share of the cluster's peak, or None where no peak is known."""
        peak = self.settings.cluster.peak_tflops
        if peak is None:
            return None
        return self.total_tokens * self.flops_per_token / (self.layout.world_size * peak * 1e12 * mfu)


def make_plan(settings: RunSettings) -> TrainingPlan:
    """Return the plan of checked settings."""
    layout = build_layout(settings)
    shape = settings.model
    length = settings.data.sequence_length
    fingerprint = hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()
    return TrainingPlan(
        settings=settings,
        layout=layout,
        tokens_per_step=layout.global_batch_size * length,
        total_steps=total_steps(batch_spans(settings), settings.training.tokens, length),
        parameters=shape.parameters(),
        flops_per_token=shape.flops_per_token(length),
        static_bytes_per_rank=static_bytes(settings, layout),
        checkpoint_bytes=shape.parameters() * 12,
        fingerprint=fingerprint,
    )


def static_bytes(settings: RunSettings, layout: ParallelLayout) -> int:
    """Return the bytes of weights, gradients and optimizer on the rank that holds most.

    A parameter takes 6 bytes (bf16 weight, fp32 gradient) and 12 of optimizer (fp32 master and two
    moments) over DP x CP ranks with the distributed optimizer; in fp32 8 and 8, since megatron's master is the
    weight itself there (0.16.1: a view of it).
    """
    shape = settings.model
    embedding = shape.vocab_size * shape.hidden_size
    layers = shape.num_layers // layout.pipeline_parallel * shape.layer_parameters()
    if layout.pipeline_parallel == 1:
        held = layers + embedding * (1 if shape.tie_embeddings else 2) + shape.hidden_size
    else:
        held = layers + embedding + shape.hidden_size
    held //= layout.tensor_parallel
    resident, shared = (8, 8) if settings.precision.dtype == "fp32" else (6, 12)
    return int(held * (resident + shared / layout.weight_replicas))


def write_plan(path: Path, plan: TrainingPlan) -> None:
    """Freeze a plan in a run folder."""
    write_json(path, to_plain(plan))


def _renewed(record: Any) -> Any:
    """Return a plan as this version writes it: up to 0.5 `precision.dtype` was `training.precision`."""
    settings = record.get("settings", {}) if isinstance(record, dict) else {}
    training = settings.get("training", {})
    if "precision" not in training or "precision" in settings:
        return record
    kept = {field: value for field, value in training.items() if field != "precision"}
    return record | {"settings": settings | {"training": kept, "precision": {"dtype": training["precision"]}}}


def read_plan(path: Path) -> TrainingPlan:
    """Read a frozen plan.

    Raises:
        OrchestrateError: the file is none, or was written by another version.
    """
    problems: list[str] = []
    plan = from_plain(TrainingPlan, _renewed(read_json(path)), "", problems)
    if plan is None:
        raise OrchestrateError(f"{path} is no plan of this version:", problems)
    return plan
