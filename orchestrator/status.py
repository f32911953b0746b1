"""Read where a run stands from its folder and the scheduler; MLflow is not asked."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.attempt_record import attempt_record, last_heard
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.doubts import alarms, fp8_in_words, in_words, skipped, slowest_rank
from orchestrator.events import (
    DamageEvent,
    DataWaitEvent,
    EndEvent,
    Event,
    GuardEvent,
    ProfileEvent,
    RepeatEvent,
    ReplicaEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    read_events,
)
from orchestrator.exit_codes import Cause
from orchestrator.files import read_json
from orchestrator.ledger import Kind, Ledger, total
from orchestrator.plan import read_plan
from orchestrator.reconcile import ENDED, JobAnswer, RunRecords, State, reconcile
from orchestrator.retention import best_checkpoints
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.history import excluded_nodes
from orchestrator.slurm.scheduler import ask, why_waiting
from orchestrator.values import from_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One attempt in a line."""

    number: int
    job_id: str
    restart_count: int
    """Of Slurm: how often the job was requeued before."""
    nodes: str
    """As Slurm writes them: n[001-032]."""
    spare_nodes: int
    """Held without a rank."""
    started: float | None
    ended: float | None
    first_step: int | None
    last_step: int | None
    saved_step: int | None
    """Step of the newest complete checkpoint at the end; None while it runs."""
    cause: str
    """Empty while it runs."""
    message: str
    rank: int | None
    """The one that ended it, if one did."""
    host: str
    """Where that rank was, or the node that failed."""
    action: str
    why: str
    """Of the action, in words."""
    excluded: tuple[str, ...]
    """Nodes that the run's next job must not get."""
    ledger: Ledger | None
    """None before the supervisor has written down its job."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run in one screen."""

    name: str
    path: Path
    state: State
    cause: str
    """Of the newest attempt's end, where one has ended."""
    reason: str
    next_command: str
    warnings: tuple[str, ...]
    """What happened that a person should look at: damaged checkpoints, losses that a repetition did not give again."""
    step: int
    total_steps: int
    attempts: int
    consumed_tokens: int
    loss: float | None
    validation_loss: float | None
    first_validation_loss: float | None
    validation_losses: dict[str, float]
    """The newest of each held-out data set by its name."""
    tokens_per_second: float | None
    tflops_per_gpu: float | None
    mfu: float | None
    skipped_steps: int
    """Whose gradients the newest weights do not have; their samples count as consumed."""
    slowest_rank: str
    """Of the newest sample, in words; empty before the first."""
    fp8: str
    """What the newest attempt has seen of FP8, in words; empty where it is not asked for, or before the first step."""
    last_event: float | None
    """Unix time of the newest event of the ranks."""
    last_checkpoint: str | None
    last_checkpoint_step: int | None
    checkpoints: int
    """Complete ones of the surviving trajectory that are kept."""
    best_checkpoint: str | None
    """The one with the lowest held-out loss, where it was measured."""
    seconds_left: float | None
    """At the speed of the last steps."""
    layout: str
    ledger: Ledger
    """Of all attempts."""
    effective_share: float | None
    """Share of their wall time in which steps were done that count."""
    cost: float | None
    """Of all that was held, where the cluster has a price."""
    is_on_gpus: bool
    traces: tuple[str, ...]
    """Files of the steps that were profiled last."""
    traced: str
    """Which steps those are: 20-22."""
    excluded: tuple[str, ...]
    """Nodes that were bad since a person last started the run, and that it gets no more."""
    attempt_list: tuple[AttemptStatus, ...]


def read_status(run: RunDirectory) -> RunStatus:
    """Return a run's status; asks the scheduler once, unless the folder alone says that the run has ended."""
    plan = read_plan(run.plan)
    records, job = read_records(run), JobAnswer.GONE
    if not records.is_settled:
        job = ask(run)
        records = read_records(run)  # once more: an attempt that ended while we asked has an outcome now
    waits_for = why_waiting(run) if job == JobAnswer.PENDING else ""
    standing = reconcile(run.name, records, job, time.time(), waits_for)
    attempts = [run.attempt(record["number"]) for record in records.attempts]
    told = [[event for _, event in read_events(attempt.events)] for attempt in attempts]
    events = [event for of_attempt in told for event in of_attempt]
    steps = [event for event in events if isinstance(event, StepEvent)]
    held_out = [event for event in events if isinstance(event, ValidationEvent)]
    checkpoints = complete_checkpoints(run)
    known = [e.step for e in events if isinstance(e, StartEvent | StepEvent | EndEvent)]
    step = known[-1] if known else checkpoints[-1].step if checkpoints else 0  # of a branch before its first attempt
    last = steps[-1] if steps else None
    recent = steps[-20:]
    goes_on = standing.state == State.RUNNING and records.cancel_asked is None
    recent_tokens = sum(plan.consumed_tokens(event.step) - plan.consumed_tokens(event.step - 1) for event in recent)
    tokens_left = plan.total_tokens - plan.consumed_tokens(step)
    left = tokens_left * sum(event.step_seconds for event in recent) / recent_tokens if recent and goes_on else None
    # Where each attempt's successor began; the newest has none, and what it has not saved would be done again.
    begun_from = [*map(_begun_from, told[1:]), None]
    attempt_list = tuple(
        _attempt_status(
            run,
            attempt,
            record["outcome"],
            of_attempt,
            is_over=standing.state in ENDED or attempt != attempts[-1],
            saved_step=begun if begun is not None else checkpoints[-1].step if checkpoints else 0,
        )
        for attempt, record, of_attempt, begun in zip(attempts, records.attempts, told, begun_from, strict=False)
    )
    ledger = total(attempt.ledger for attempt in attempt_list if attempt.ledger is not None)
    slowest, slow = slowest_rank(told[-1] if told else [])
    price = plan.settings.cluster.price_per_gpu_hour
    traced, traces = _newest_traces(attempts, told)
    return RunStatus(
        name=run.name,
        path=run.path,
        state=standing.state,
        cause=str(standing.cause or ""),
        reason=standing.reason,
        next_command=standing.actions[0],
        warnings=tuple(
            dict.fromkeys(warning for warning in [*map(_warning, events), slow, *alarms(events)] if warning)
        ),
        step=step,
        total_steps=plan.total_steps,
        attempts=len(attempts),
        consumed_tokens=plan.consumed_tokens(step),
        loss=next((event.loss for event in reversed(steps) if not event.is_skipped), None),
        validation_loss=held_out[-1].loss if held_out else None,
        first_validation_loss=held_out[0].loss if held_out else None,
        validation_losses=dict(held_out[-1].losses) if held_out else {},
        tokens_per_second=last.tokens_per_second if last else None,
        tflops_per_gpu=last.tflops_per_gpu if last else None,
        mfu=last.mfu if last else None,
        skipped_steps=skipped(told),
        slowest_rank=slowest,
        fp8=fp8_in_words(told[-1] if told else []),
        last_event=events[-1].time if events else None,
        last_checkpoint=checkpoints[-1].name if checkpoints else None,
        last_checkpoint_step=checkpoints[-1].step if checkpoints else None,
        checkpoints=len(checkpoints),
        best_checkpoint=best[0].name if (best := best_checkpoints(checkpoints, 1)) else None,
        seconds_left=left,
        layout=plan.layout.describe(),
        ledger=ledger,
        effective_share=ledger.effective_share,
        cost=None if price is None else ledger.cost(price),
        is_on_gpus=plan.settings.cluster.device == "cuda",
        traces=traces,
        traced=traced,
        excluded=excluded_nodes(run),
        attempt_list=attempt_list,
    )


def read_records(run: RunDirectory) -> RunRecords:
    """Return what a run's folder says."""
    attempts = run.attempts()
    newest = attempts[-1] if attempts else None
    # The lock is renewed every few seconds.
    signs = [] if newest is None else [*map(_touched, (newest.job, newest.supervisor_events, run.supervisor_lock))]
    return RunRecords(
        submitted=[float(record["time"]) for record in run.submissions()],
        attempts=[{"number": attempt.number, "outcome": attempt.read_outcome()} for attempt in attempts],
        cancel_asked=float(read_json(run.cancel_mark)["time"]) if run.cancel_mark.exists() else None,
        last_heard=_touched(newest.events) if newest is not None else None,
        supervisor_heard=max((time for time in signs if time is not None), default=None),
    )


def _touched(path: Path) -> float | None:
    """Return when a file was written last, by its file system's clock; None where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _warning(event: Event) -> str:
    """Return what of an event a person should look at, or nothing."""
    if isinstance(event, DamageEvent):
        return f"checkpoint {event.name} is damaged: {event.problems[0]}" + (
            f" and {len(event.problems) - 1} more" if len(event.problems) > 1 else ""
        )
    if isinstance(event, RepeatEvent) and event.is_beyond_noise:
        return (
            f"step {event.step}, done again, has loss {event.loss:.6f}, recorded was {event.recorded_loss:.6f}: "
            f"{event.relative_difference:.1e} apart, noise is {event.noise:.0e}: hardware or nondeterminism"
        )
    if isinstance(event, DataWaitEvent):
        return event.message
    return in_words(event) if isinstance(event, GuardEvent | ReplicaEvent) else ""


def _newest_traces(
    attempts: Sequence[AttemptDirectory], told: Sequence[Sequence[Event]]
) -> tuple[str, tuple[str, ...]]:
    """Return the steps that were profiled last, and the files of their traces; nothing where none were."""
    for attempt, events in zip(reversed(attempts), reversed(told), strict=True):
        for event in reversed(events):
            if isinstance(event, ProfileEvent):
                files = tuple(str(attempt.rank_trace(rank)) for rank in event.ranks)
                return f"{event.first_step}-{event.last_step}", files
    return "", ()


def _begun_from(events: Sequence[Event]) -> int | None:
    """Return the step of the state that an attempt's ranks loaded, or None where they came to none."""
    return next((event.step for event in events if isinstance(event, StartEvent)), None)


def _attempt_status(
    run: RunDirectory,
    attempt: AttemptDirectory,
    outcome: dict[str, Any] | None,
    events: Sequence[Event],
    *,
    is_over: bool,
    saved_step: int,
) -> AttemptStatus:
    """Return an attempt in a line; what its outcome does not say is told from its folder.

    Args:
        saved_step: what is safe of an attempt that is over without an outcome.
    """
    job, found = attempt.read_job() or {}, outcome or {}
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    if outcome is None:
        found = {"first_step": steps[0], "last_step": steps[-1]} if steps else {}
        if is_over:
            found |= {"ended": last_heard(attempt), "saved_step": saved_step, "cause": Cause.SUPERVISOR_LOST}
    ledger = _recorded_ledger(found)
    if ledger is None and job:
        # As long as it goes on nothing is lost, neither of the steps here nor of those that it tells meanwhile.
        safe = int(found.get("saved_step", sys.maxsize))
        record = attempt_record(run, attempt, saved_step=safe, ended=found.get("ended") or time.time())
        ledger = _recorded_ledger(record)
        found = {**record, **found}
    return AttemptStatus(
        number=attempt.number,
        job_id=str(job.get("job_id") or ""),
        restart_count=int(job.get("restart_count", 0)),
        nodes=str(found.get("nodes", job.get("nodes", ""))),
        spare_nodes=int(found.get("spare_nodes", 0)),
        started=job.get("started"),
        ended=found.get("ended"),
        first_step=found.get("first_step"),
        last_step=found.get("last_step"),
        saved_step=found.get("saved_step"),
        cause=str(found.get("cause", "")),
        message=str(found.get("message", "")),
        rank=found.get("rank"),
        host=str(found.get("host") or ""),
        action=str(found.get("action", "")),
        why=str(found.get("why", "")),
        excluded=tuple(found.get("excluded", ())),
        ledger=ledger,
    )


def _recorded_ledger(record: dict[str, Any]) -> Ledger | None:
    """Return the ledger of a record; that of a version without it, or with other kinds, has none."""
    ledger = from_plain(Ledger, record.get("ledger"), "", [])
    return ledger if ledger is not None and ledger.seconds.keys() == set(Kind) else None
