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
    is_skipped: bool = False
    """Whether its gradients were dropped; its samples count as consumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationEvent:
    """The loss on held-out data, with the weights after `step` steps."""

    kind: ClassVar[str] = "validation"
    time: float
    step: int
    loss: float
    """Mean over the held-out data sets."""
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each of them by its name."""
    samples: int
    """Of all of them."""
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
    skipped: tuple[tuple[int, int], ...] = ()
    """First and last step of each span whose gradients the weights do not have."""
    recent_losses: tuple[float, ...] = ()
    """With which the next steps' are compared."""
    recent_norms: tuple[float, ...] = ()


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
class GuardEvent:
    """A step's loss or gradient norm was in doubt; it was computed again, and this came of it."""

    kind: ClassVar[str] = "guard"
    time: float
    step: int
    doubt: str
    """`loss_not_finite`, `norm_not_finite`, `loss_spike` or `norm_spike`."""
    score: float | None
    """Robust standard deviations above the median, of a spike."""
    loss: float
    gradient_norm: float
    again_loss: float
    """When it was computed again from the same state."""
    again_norm: float
    origin: str
    """`hardware` where the second result was another one, `data` where it was the same."""
    action: str
    """`repeat` (the second result was taken), `record`, `skip`, `rollback` or `stop`."""
    skipped: tuple[int, int] | None = None
    """First and last step whose gradients the weights do not have because of it."""
    checkpoint: str = ""
    """Whose state a rollback took."""
    first_sample: int
    """Of the step; the samples of what is skipped count as consumed."""
    samples: int
    ranks: tuple[int, ...] = ()
    """Whose own results differed."""
    hosts: tuple[str, ...] = ()
    differs: str = ""
    """`output` or `gradients`: what differed first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaEvent:
    """Data-parallel replicas do not hold the same weights."""

    kind: ClassVar[str] = "replicas"
    time: float
    step: int
    parameters: tuple[str, ...]
    """Names in the model of megatron-core."""
    ranks: tuple[int, ...]
    """Those that the others outvote; all that differ where there is no majority."""
    hosts: tuple[str, ...]
    is_majority: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankTimesEvent:
    """How long ranks computed in a step, without what they waited for others."""

    kind: ClassVar[str] = "rank_times"
    time: float
    step: int
    step_seconds: float
    """From the first micro-batch to the gradient norm, waiting included."""
    median_seconds: float
    slowest_seconds: float
    slowest_rank: int
    slowest_host: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileEvent:
    """Traces of some steps lie in the attempt's folder, one of each chosen rank."""

    kind: ClassVar[str] = "profile"
    time: float
    step: int
    first_step: int
    last_step: int
    ranks: tuple[int, ...]
    write_seconds: float
    """How long the slowest rank wrote; training stood still."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEvent:
    """The shards that a run reads lie on rank 0's node; each other node has its own copies."""

    kind: ClassVar[str] = "stage"
    time: float
    step: int
    """0; this comes before the state is loaded."""
    folder: str
    host: str
    files: int
    bytes: int
    copied_bytes: int
    """By rank 0; the rest was there, or another process of the node copied it."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataWaitEvent:
    """Ranks waited for their samples longer than `data.wait_alarm_share` of a step, in steps since the last telling."""

    kind: ClassVar[str] = "data_wait"
    time: float
    step: int
    """The last of these steps."""
    first_step: int
    steps: int
    """How many of them it was."""
    waiting_seconds: float
    """Over these steps, as the ranks that waited did on average."""
    step_seconds: float
    """What these steps took altogether."""
    most_ranks: int
    """Largest number of ranks that waited in one of them."""

    @property
    def message(self) -> str:
        """Return it in a line."""
        where = f"step {self.step}" if self.steps == 1 else f"{self.steps} of steps {self.first_step} to {self.step}"
        return (
            f"up to {self.most_ranks} ranks waited for their samples in {where}: {self.waiting_seconds:.1f} of "
            f"{self.step_seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8ProofEvent:
    """After its first applied step every rank of an attempt has shown that FP8 ran where it was asked for."""

    kind: ClassVar[str] = "fp8_proof"
    time: float
    step: int
    precision: str
    """As asked for: `fp8-tensorwise`."""
    recipes: tuple[str, ...]
    """As found in the modules: `Float8CurrentScaling HYBRID`."""
    fp8_linears: int
    """Linear parts of layers that ran in FP8, over all ranks."""
    bf16_linears: int
    """Those that should not and did not."""
    ranks: int
    seconds: float

    @property
    def message(self) -> str:
        """Return it in a line."""
        rest = f", {self.bf16_linears:,} stayed in bf16 as asked for" if self.bf16_linears else ""
        return (
            f"{self.fp8_linears:,} linear parts on {self.ranks:,} ranks ran in FP8 in step {self.step:,} "
            f"({', '.join(self.recipes)}){rest}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8GapEvent:
    """The same batch with the same weights, forward in bf16 and in FP8."""

    kind: ClassVar[str] = "fp8_gap"
    time: float
    step: int
    """The weights are those after it."""
    bf16_loss: float
    fp8_loss: float
    relative_difference: float
    """Absolute."""
    alarm_level: float
    is_alarm: bool
    samples: int
    seconds: float

    @property
    def message(self) -> str:
        """Return it in a line."""
        return (
            f"after step {self.step:,} the same batch has loss {self.fp8_loss:.5f} in FP8 and {self.bf16_loss:.5f} in "
            f"bf16: {self.relative_difference:.1e} apart, alarm at {self.alarm_level:.1e}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnInputsEvent:
    """How large the inputs of the second FFN matrices were in a step, over all micro-batches and ranks."""

    kind: ClassVar[str] = "ffn_inputs"
    time: float
    step: int
    largest: float
    """Magnitude; infinite where one was no number."""
    layer: int
    """Which has it, from 0."""
    values: tuple[float, ...]
    """Of every layer."""
    alarm_level: float
    is_alarm: bool

    @property
    def message(self) -> str:
        """Return it in a line."""
        return (
            f"step {self.step:,}: the largest input of a second FFN matrix was {self.largest:,.4g}, in layer "
            f"{self.layer}; alarm at {self.alarm_level:,.4g}"
        )


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
    | GuardEvent
    | ReplicaEvent
    | RankTimesEvent
    | ProfileEvent
    | StageEvent
    | DataWaitEvent
    | Fp8ProofEvent
    | Fp8GapEvent
    | FfnInputsEvent
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
