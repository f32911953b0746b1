"""One pass over a run's attempts: what of its events becomes what in MLflow, each exactly once.

One MLflow run holds all attempts of a training run, each step once: what is repeated after a restart
is not logged again. Checkpoints are logged models that name a path; nothing is uploaded.

`mlflow.json` is written after each batch, so that at most one batch is ever sent twice; MLflow keeps a
metric of the same step, time and value once, and all times are the events' own, so that sending again
changes nothing.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.errors import OrchestrateError, TrackingError
from orchestrator.events import (
    CheckpointEvent,
    Event,
    FfnInputsEvent,
    Fp8GapEvent,
    GuardEvent,
    RankTimesEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
    read_events,
)
from orchestrator.files import read_json, write_json
from orchestrator.owner_lock import renew
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.spikes import skipped_steps
from orchestrator.tracking_store import artifact_location

log = logging.getLogger(__name__)

BATCH_METRICS = 1000
BATCH_PARAMS = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
"""MLflow's own limits: a batch's metrics, its parameters and tags, and the length of their values."""

STEP_METRICS: dict[str, Callable[[StepEvent], float]] = {
    "train/loss": lambda event: event.loss,
    "train/gradient_norm": lambda event: event.gradient_norm,
    "train/learning_rate": lambda event: event.learning_rate,
    "train/tokens_billions": lambda event: event.consumed_tokens / 1e9,
    "throughput/tokens_per_second": lambda event: event.tokens_per_second,
    "throughput/tokens_per_second_per_gpu": lambda event: event.tokens_per_second_per_gpu,
    "throughput/tflops_per_gpu": lambda event: event.tflops_per_gpu,
    "throughput/mfu": lambda event: event.mfu,
    "time/step_seconds": lambda event: event.step_seconds,
    "time/data_seconds": lambda event: event.data_seconds,
}
VALIDATION_LOSS = "validation/loss"
CHECKPOINT_STALL = "checkpoint/stall_seconds"
SKIPPED_STEPS = "numerics/skipped_steps"
"""Of which the saved weights do not have the gradients."""
SPIKE_SCORE = "numerics/spike_score"
SLOWEST_RANK = "numerics/slowest_rank_over_median"
"""Of the seconds that ranks computed."""

FP8_GAP = "numerics/fp8_gap"
"""Relative difference of the losses of one batch in FP8 and in bf16."""
LARGEST_FFN_INPUT = "numerics/largest_ffn_input"
"""Of all layers' second FFN matrices."""

RUN_ID_TAG = "orchestrate.run_id"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShipReport:
    """What one pass sent."""

    run_id: str = ""
    """MLflow's; empty where there is nothing to ship yet, or another shipper is at it."""
    events: int = 0
    metrics: int = 0
    checkpoints: int = 0
    is_complete: bool = True
    """False where the time was over before the events were."""
    other_shipper: str = ""
    """Who else is shipping this run, so that this pass left."""


@dataclasses.dataclass(kw_only=True)
class _Progress:
    """What mlflow.json keeps: the run in MLflow, and how far its events were sent."""

    uri: str
    experiment_id: str
    run_id: str
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes sent of `0001/events.jsonl` and the others."""
    last_steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """The last step sent of each kind of event."""
    validations: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Step to time in seconds and loss."""
    checkpoints: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Name to `model_id`, `step`, and whether it `has_loss`."""
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    status: str = "RUNNING"


class Shipment:
    """One pass over a run, by the only shipper."""

    def __init__(self, run: RunDirectory, uri: str, mlflow: ModuleType) -> None:
        self._run = run
        self._uri = uri
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient(uri)
        self._plan = read_json(run.launched_plan)
        self._batch: list[Any] = []
        self._events = self._metrics = self._checkpoints = 0

    def send(self, attempts: list[AttemptDirectory], seconds: float | None) -> ShipReport:
        """Send what MLflow does not have, in `seconds` or, without them, all of it.

        Raises:
            TrackingError: the run or its experiment was deleted in MLflow.
            OrchestrateError: an events file is damaged; what lies before the damage has been sent.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        self._progress = self._stored_progress() or self._new_progress(attempts)
        self._send_tags(attempts)
        is_complete = all(self._send_events(attempt, deadline) for attempt in attempts)
        if is_complete:
            self._send_batch()
            for attempt in attempts:
                self._send_checkpoints(attempt)
            self._send_checkpoint_losses()
            self._send_status(attempts[-1])
        return ShipReport(
            run_id=self._progress.run_id,
            events=self._events,
            metrics=self._metrics,
            checkpoints=self._checkpoints,
            is_complete=is_complete,
        )

    def _stored_progress(self) -> _Progress | None:
        """Return the progress so far, unless this store does not know the run."""
        if not self._run.mlflow.exists():
            return None
        try:
            progress = _Progress(**read_json(self._run.mlflow))
        except TypeError:
            return None  # of another version of this module; the run is found again by its tag
        if progress.uri != self._uri:
            return None
        try:
            found = self._client.get_run(progress.run_id)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow has lost run %s; it is made anew from the events", progress.run_id)
            return None
        if found.info.lifecycle_stage == "deleted":
            raise TrackingError(
                f"run {self._run.name} was deleted in MLflow (its id there is {progress.run_id}); restore it "
                f"there, or remove {self._run.mlflow} to have it made anew"
            )
        return progress

    def _new_progress(self, attempts: list[AttemptDirectory]) -> _Progress:
        """Find the run in MLflow by its tag, or create it, with its parameters."""
        settings = self._plan.get("settings", {})
        experiment_id = self._experiment(settings.get("tracking", {}).get("experiment") or "orchestrate")
        identity = _identity(self._run, self._plan, attempts[0])
        with_tag = f"tags.`{RUN_ID_TAG}` = '{identity}'"
        found = self._client.search_runs([experiment_id], with_tag, max_results=1)
        if found:
            run = found[0]
        else:
            run = self._client.create_run(
                experiment_id,
                start_time=_milliseconds(_start_time(attempts[0])),
                tags={RUN_ID_TAG: identity, "mlflow.source.name": "orchestrate"},
                run_name=self._run.name,
            )
        present = run.data.params
        params = [
            self._mlflow.entities.Param(key, value)
            for key, value in _flatten_plan(self._plan).items()
            if key not in present
        ]
        for first in range(0, len(params), BATCH_PARAMS):
            some = params[first : first + BATCH_PARAMS]
            self._client.log_batch(run.info.run_id, params=some, synchronous=True)
        progress = _Progress(uri=self._uri, experiment_id=experiment_id, run_id=run.info.run_id, status=run.info.status)
        self._save(progress)
        return progress

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(
                        name,
                        artifact_location=artifact_location(self._uri),
                        tags={"mlflow.experimentKind": "custom_model_development"},
                    )
                )
            except self._mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"experiment {name!r} was deleted in MLflow; restore it with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or choose another with tracking.experiment=..."
            )
        return str(found.experiment_id)

    def _send_tags(self, attempts: list[AttemptDirectory]) -> None:
        wanted = {"orchestrate.run_path": str(self._run.path), "orchestrate.attempts": str(len(attempts))}
        for attempt in attempts:
            outcome = attempt.read_outcome()
            wanted[f"orchestrate.attempt.{attempt.path.name}"] = (
                "running" if outcome is None else f"{outcome.get('cause')}: {outcome.get('message', '')}"
            )[:LONGEST_TAG]
        changed = {key: value for key, value in wanted.items() if self._progress.tags.get(key) != value}
        tags = [self._mlflow.entities.RunTag(key, value) for key, value in changed.items()]
        for first in range(0, len(tags), BATCH_PARAMS):
            self._client.log_batch(self._progress.run_id, tags=tags[first : first + BATCH_PARAMS], synchronous=True)
        if changed:
            self._progress.tags.update(changed)
            self._save(self._progress)

    def _send_events(self, attempt: AttemptDirectory, deadline: float | None) -> bool:
        """Send what rank 0 told; the last batch stays open for the next attempt's.

        Returns:
            whether the end was reached before the deadline.
        """
        key = _key(attempt.events)
        try:
            for after, event in read_events(attempt.events, self._progress.offsets.get(key, 0)):
                is_new = event.step > self._progress.last_steps.get(event.kind, -1)
                values = _values_of(event) if is_new else {}
                if len(self._batch) + len(values) > BATCH_METRICS:
                    self._send_batch()
                    if deadline is not None and time.monotonic() > deadline:
                        return False
                moment = _milliseconds(event.time)
                for name, value in values.items():
                    self._batch.append(self._mlflow.entities.Metric(name, value, moment, event.step))
                self._progress.offsets[key] = after
                if values:
                    self._progress.last_steps[event.kind] = event.step
                    if isinstance(event, ValidationEvent):
                        self._progress.validations[str(event.step)] = [event.time, event.loss]
                self._events += 1
        except OrchestrateError:
            self._send_batch()
            raise
        return True

    def _send_batch(self) -> None:
        """Send the open batch, and only then note how far the events were sent."""
        if self._batch:
            self._client.log_batch(self._progress.run_id, metrics=self._batch, synchronous=True)
            self._metrics += len(self._batch)
            self._batch = []
        if self._events:
            self._save(self._progress)

    def _send_checkpoints(self, attempt: AttemptDirectory) -> None:
        """Make a logged model of each checkpoint that the supervisor has marked as complete."""
        key = _key(attempt.supervisor_events)
        for after, event in read_events(attempt.supervisor_events, self._progress.offsets.get(key, 0)):
            if isinstance(event, CheckpointEvent) and event.name not in self._progress.checkpoints:
                model_id = self._logged_model(event, attempt)
                self._progress.checkpoints[event.name] = {
                    "model_id": model_id,
                    "step": event.step,
                    "has_loss": False,
                }
                self._checkpoints += 1
            self._events += 1
            self._progress.offsets[key] = after
            self._save(self._progress)

    def _logged_model(self, event: CheckpointEvent, attempt: AttemptDirectory) -> str:
        """Return the id of a checkpoint's logged model, made where it is not there; each part once."""
        name = event.name.replace(".", "_")  # MLflow allows no dots in the name of a model
        run_id = self._progress.run_id
        found = self._client.search_logged_models(
            [self._progress.experiment_id], f"source_run_id = '{run_id}' AND name = '{name}'", max_results=1
        )
        model = (
            found[0]
            if found
            else self._client.create_logged_model(
                self._progress.experiment_id,
                name=name,
                source_run_id=run_id,
                model_type="checkpoint",
                params={
                    "path": str(self._run.checkpoint_path(event.name)),
                    "step": str(event.step),
                    "bytes": str(event.bytes),
                    "attempt": str(attempt.number),
                },
                tags={"orchestrate.checkpoint": event.name, "orchestrate.run": self._run.name},
            )
        )
        model_id = str(model.model_id)
        if model.status != self._mlflow.entities.LoggedModelStatus.READY:
            self._client.finalize_logged_model(model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            # A second time would be an error: (run, model) is unique in the store.
            self._client.log_outputs(run_id, [self._mlflow.entities.LoggedModelOutput(model_id, event.step)])
        return model_id

    def _send_checkpoint_losses(self) -> None:
        """Give each checkpoint the held-out loss of its own step, where that was measured.

        An earlier step's loss would be of other weights, and would depend on when it was shipped.
        """
        for checkpoint in self._progress.checkpoints.values():
            measured = self._progress.validations.get(str(checkpoint["step"]))
            if checkpoint["has_loss"] or measured is None:
                continue
            # The same key, step, time and value as the run's own, so that the run still has it once.
            metric = self._mlflow.entities.Metric(
                VALIDATION_LOSS,
                measured[1],
                _milliseconds(measured[0]),
                checkpoint["step"],
                model_id=checkpoint["model_id"],
            )
            self._client.log_batch(self._progress.run_id, metrics=[metric], synchronous=True)
            checkpoint["has_loss"] = True
            self._save(self._progress)

    def _send_status(self, last: AttemptDirectory) -> None:
        outcome = last.read_outcome()
        status = _status(outcome)
        if status == self._progress.status:
            return
        if outcome is None or status == "RUNNING":
            self._client.update_run(self._progress.run_id, status=status)
        else:
            ended = outcome.get("ended")
            self._client.set_terminated(
                self._progress.run_id, status=status, end_time=None if ended is None else _milliseconds(ended)
            )
        self._progress.status = status
        self._save(self._progress)

    def _save(self, progress: _Progress) -> None:
        write_json(self._run.mlflow, dataclasses.asdict(progress))
        renew(self._run.mlflow_lock)


def _values_of(event: Event) -> dict[str, float]:
    """Return the metrics of an event."""
    if isinstance(event, StepEvent):
        return {name: value_of(event) for name, value_of in STEP_METRICS.items()}
    if isinstance(event, ValidationEvent):
        own = {f"validation/{_metric_name(name)}/loss": loss for name, loss in event.losses.items()}
        return {VALIDATION_LOSS: event.loss, **(own if len(own) > 1 else {})}
    if isinstance(event, SaveEvent):
        return {CHECKPOINT_STALL: event.stall_seconds, SKIPPED_STEPS: skipped_steps(event.skipped)}
    if isinstance(event, GuardEvent):
        return {SPIKE_SCORE: event.score} if event.score is not None else {}
    if isinstance(event, RankTimesEvent):
        return {SLOWEST_RANK: event.slowest_seconds / event.median_seconds if event.median_seconds else 1.0}
    if isinstance(event, Fp8GapEvent):
        return {FP8_GAP: event.relative_difference}
    if isinstance(event, FfnInputsEvent):
        return {LARGEST_FFN_INPUT: event.largest}
    return {}


def _metric_name(text: str) -> str:
    """Return a text with what MLflow allows in a name."""
    return re.sub(r"[^\w\-. /]", "_", text)[:250]


def _status(outcome: Mapping[str, Any] | None) -> str:
    """Return MLflow's word for how the last attempt ended."""
    if outcome is None or outcome.get("action") not in ("finish", "stop"):
        return "RUNNING"
    if outcome["action"] == "finish":
        return "FINISHED"
    return "KILLED" if outcome.get("cause") in ("cancelled", "stopped") else "FAILED"


def _flatten_plan(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return MLflow's parameters: the settings by their own names, the rest under `plan.`.

    Without what may hold a password: of `cluster.environment` the names only, and no address.
    """
    found: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if prefix == "tracking.uri":
            return
        if isinstance(value, Mapping):
            if prefix == "cluster.environment":
                found[prefix] = ", ".join(sorted(value))
                return
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            name = _metric_name(prefix)
            found[name] = text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - 1] + "…"

    walk("", plan.get("settings", {}))
    walk("plan", {key: value for key, value in plan.items() if key != "settings"})
    return found


def _identity(run: RunDirectory, plan: Mapping[str, Any], first: AttemptDirectory) -> str:
    """Return what tells this run from all others, also from an earlier one in the same folder.

    From the plan and the first attempt's job, so that it outlives mlflow.json and a move of the folder.
    """
    job = first.job.read_bytes() if first.job.exists() else str(run.path).encode()
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode() + job).hexdigest()[:32]


def _start_time(first: AttemptDirectory) -> float:
    started = (first.read_job() or {}).get("started")
    if started is not None:
        return float(started)
    return next((event.time for _, event in read_events(first.events)), time.time())


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
