"""What workers and the supervisor tell, a line each in an attempt's events.jsonl.

The first pipeline stage's rank 0 writes a file of its own, the supervisor another; readers merge.
Times are Unix seconds, losses nats a token. FLOPs are forward and backward without recomputation,
attention counted by its causal half; MFU is against `StartEvent.peak_tflops` a device.
"""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.errors import OrchestrateError
from orchestrator.files import read_json_lines

FLOPS_CONVENTION = "causal_half"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartEvent:
    """The ranks stand and the state is loaded."""

    kind: ClassVar[str] = "start"
    time: float
    step: int
    """Steps done before; the next is step + 1."""
    world_size: int
    layout: str
    device: str
    loaded_from: str
    """`random`, the base folder, or the checkpoint's name."""
    ancestry: tuple[str, ...]
    """That checkpoint, the one that its start began from, and so on; empty for a base."""
    parameters: int
    flops_per_token: float
    flops_convention: str
    peak_tflops: float
    peak_source: str
    start_seconds: float
    """From the worker's first line to here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstLossEvent:
    """A start from a base computed the loss that was recorded when the base was written, or another one."""

    kind: ClassVar[str] = "first_loss"
    time: float
    step: int
    recorded_loss: float
    loss: float
    """On the same tokens, with the run's own layout, precision and kernels."""
    relative_difference: float
    token_difference: float
    """Mean absolute difference of single tokens' losses, as a share of the recorded loss."""
    tolerance: float
    """The run stops where the relative difference is above it."""
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step."""

    kind: ClassVar[str] = "step"
    time: float
    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    consumed_samples: int
    consumed_tokens: int
    step_seconds: float
    data_seconds: float
    """Part of the step that waited for data."""
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationEvent:
    """The loss on held-out data, with the weights after `step` steps."""

    kind: ClassVar[str] = "validation"
    time: float
    step: int
    loss: float
    samples: int
    consumed_tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """Rank 0 has copied its part of the state and trains on; the ranks are writing."""

    kind: ClassVar[str] = "save"
    time: float
    step: int
    name: str
    consumed_samples: int
    data_fingerprint: str
    tokenizer_sha256: str
    stall_seconds: float
    """How long training stood still for it, waiting for the save before included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointEvent:
    """The supervisor has marked a checkpoint as complete: from here on it exists."""

    kind: ClassVar[str] = "checkpoint"
    time: float
    step: int
    name: str
    bytes: int
    seconds: float
    """From the beginning of the save."""
    write_seconds: float
    """Of the slowest rank, hashing and flushing included."""
    hash_seconds: float
    """Of the same rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DamageEvent:
    """The ranks found a checkpoint damaged and took the one before."""

    kind: ClassVar[str] = "damage"
    time: float
    step: int
    name: str
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemovedEvent:
    """The supervisor has deleted a checkpoint, or what is left of one that was never complete."""

    kind: ClassVar[str] = "removed"
    time: float
    step: int
    name: str
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatEvent:
    """Steps that an earlier attempt had done already were done again, and their losses compared."""

    kind: ClassVar[str] = "repeat"
    time: float
    step: int
    """The step with the largest difference."""
    first_step: int
    last_step: int
    recorded_loss: float
    loss: float
    relative_difference: float
    noise: float
    """What the layouts and the device explain; 0 where the same bits are due."""
    is_beyond_noise: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndEvent:
    """The workers leave in good order."""

    kind: ClassVar[str] = "end"
    time: float
    step: int
    reason: str
    """`finished`, or the reason of the stop request."""


Event = (
    StartEvent
    | FirstLossEvent
    | StepEvent
    | ValidationEvent
    | SaveEvent
    | CheckpointEvent
    | DamageEvent
    | RemovedEvent
    | RepeatEvent
    | EndEvent
)

_KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in typing.get_args(Event)}


def event_record(event: Event) -> dict[str, Any]:
    """Return an event as one JSON object, its kind first."""
    return {"kind": event.kind, **dataclasses.asdict(event)}


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, Event]]:
    """Yield (offset after the event, event) for every whole line of a file from `offset` on.

    Raises:
        OrchestrateError: a line in the middle is damaged or of an unknown kind.
    """
    for after, record in read_json_lines(path, offset):
        try:
            yield after, _KINDS[record.pop("kind")](**record)
        except (KeyError, TypeError) as error:
            raise OrchestrateError(f"{path} holds an unknown event before byte {after}: {error}") from error
