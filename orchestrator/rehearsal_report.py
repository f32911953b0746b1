"""What a rehearsal did: its phases in seconds, how a loss of a node was met, the memory of all its processes.

From what the run's folder says of itself; only the node that was killed, and when, and the memory are
the caller's to tell.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

import psutil

from orchestrator.events import CheckpointEvent, Event, StartEvent, StepEvent, read_events
from orchestrator.exit_codes import Cause
from orchestrator.files import read_json
from orchestrator.run_directory import RunDirectory

QUEUED = "queued"
CHECKED = "nodes checked"
LAUNCHED = "ranks launched"
STARTED = "ranks started"
TRAINED = "trained and saved"
ENDED = "end noticed"
PHASES = (QUEUED, CHECKED, LAUNCHED, STARTED, TRAINED, ENDED)
"""Of an attempt, in their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of an attempt."""

    attempt: int
    name: str
    begins: float
    """Unix time."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What the folder says of one attempt."""

    number: int
    submitted: float
    """Unix time of the submission, or of the end of the attempt before."""
    started: float
    """Unix time at which the supervisor began it."""
    checking_seconds: float
    """Which the node checks took of the time from there."""
    ended: float | None
    cause: str
    events: Sequence[Event]
    """Of the ranks and of the supervisor, by their time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KilledNode:
    """A node that the caller killed."""

    node: str
    time: float
    """Unix time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeLoss:
    """How the loss of a node was met."""

    node: str
    after_step: int
    """The last step done before."""
    noticed_seconds: float | None
    """From the kill to the end of the attempt; None where none ended for it."""
    restart_seconds: float | None
    """From there to the next step done."""
    steps_lost: int | None
    """Done before, and done again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rehearsal did, in numbers."""

    run: str
    ranks: int
    layout: str
    attempts: int
    inputs_seconds: float
    phases: tuple[Phase, ...]
    last_step: int
    step_seconds: float | None
    """Median."""
    saves: int
    """Checkpoints that are complete."""
    save_seconds: float | None
    """Of the slowest, from its beginning until it was marked complete."""
    node_loss: NodeLoss | None
    is_finished: bool
    is_tracked: bool
    """Whether MLflow has every event."""
    peak_memory_bytes: int
    seconds: float
    """From the submission to the end; inputs not included."""


def rehearsal_of(
    run: RunDirectory, *, inputs_seconds: float, peak_memory_bytes: int, killed: KilledNode | None = None
) -> Rehearsal:
    """Return what a rehearsal did.

    Args:
        peak_memory_bytes: the largest of what `memory_bytes` said while it ran.
    """
    told = read_told(run)
    events = [event for attempt in told for event in attempt.events]
    starts = [event for event in events if isinstance(event, StartEvent)]
    steps = [event for event in events if isinstance(event, StepEvent)]
    saves = [event for event in events if isinstance(event, CheckpointEvent)]
    times = [attempt.ended for attempt in told if attempt.ended is not None] + [event.time for event in events]
    return Rehearsal(
        run=run.name,
        ranks=starts[-1].world_size if starts else 0,
        layout=starts[-1].layout if starts else "",
        attempts=len(told),
        inputs_seconds=inputs_seconds,
        phases=tuple(phase for attempt in told for phase in phases_of(attempt)),
        last_step=steps[-1].step if steps else 0,
        step_seconds=statistics.median(event.step_seconds for event in steps) if steps else None,
        saves=len(saves),
        save_seconds=max((event.seconds for event in saves), default=None),
        node_loss=None if killed is None else node_loss(told, killed),
        is_finished=bool(told) and told[-1].cause == Cause.FINISHED,
        is_tracked=is_tracked(run),
        peak_memory_bytes=peak_memory_bytes,
        seconds=max(times, default=0.0) - told[0].submitted if told else 0.0,
    )


def read_told(run: RunDirectory) -> list[Told]:
    """Return what a run's folder says of its attempts."""
    submissions = run.submissions()
    found: list[Told] = []
    for attempt in run.attempts():
        job, outcome = attempt.read_job(), attempt.read_outcome() or {}
        if job is None:
            continue
        before = found[-1].ended if found else None
        events = [event for path in (attempt.events, attempt.supervisor_events) for _, event in read_events(path)]
        found.append(
            Told(
                number=attempt.number,
                submitted=before or (float(submissions[0]["time"]) if submissions else float(job["started"])),
                started=float(job["started"]),
                checking_seconds=float(outcome.get("ledger", {}).get("seconds", {}).get("checking", 0.0)),
                ended=outcome.get("ended"),
                cause=str(outcome.get("cause", "")),
                events=sorted(events, key=lambda event: event.time),
            )
        )
    return found


def phases_of(attempt: Told) -> list[Phase]:
    """Return the phases of an attempt, one after the other without a gap, as far as it came."""
    bounds = [attempt.submitted, attempt.started, attempt.started + attempt.checking_seconds]
    start = next((event for event in attempt.events if isinstance(event, StartEvent)), None)
    if start is not None:
        bounds += [start.time - start.start_seconds, start.time, max(event.time for event in attempt.events)]
    names = [*PHASES[: len(bounds) - 1]]
    if attempt.ended is not None:
        names.append(LAUNCHED if start is None else ENDED)
        bounds.append(attempt.ended)
    bounds = list(itertools.accumulate(bounds, max))  # clocks of nodes differ
    return [
        Phase(attempt=attempt.number, name=name, begins=begins, seconds=ends - begins)
        for name, (begins, ends) in zip(names, itertools.pairwise(bounds), strict=True)
    ]


def node_loss(told: Sequence[Told], killed: KilledNode) -> NodeLoss:
    """Return how the loss of a node was met."""
    steps = [(attempt, event) for attempt in told for event in attempt.events if isinstance(event, StepEvent)]
    after_step = max((event.step for _, event in steps if event.time <= killed.time), default=0)
    struck = next((attempt for attempt in told if attempt.ended is not None and attempt.ended > killed.time), None)
    if struck is None or struck.ended is None or struck.cause == Cause.FINISHED:
        return NodeLoss(
            node=killed.node, after_step=after_step, noticed_seconds=None, restart_seconds=None, steps_lost=None
        )
    again = next((event for attempt, event in steps if attempt.number > struck.number), None)
    reached = max((event.step for attempt, event in steps if attempt.number == struck.number), default=0)
    return NodeLoss(
        node=killed.node,
        after_step=after_step,
        noticed_seconds=struck.ended - killed.time,
        restart_seconds=None if again is None else again.time - struck.ended,
        steps_lost=None if again is None else max(0, reached - again.step + 1),
    )


def is_tracked(run: RunDirectory) -> bool:
    """Return whether every event was shipped to MLflow."""
    if not run.mlflow.exists():
        return False
    shipped = read_json(run.mlflow)["offsets"]
    files = [path for attempt in run.attempts() for path in (attempt.events, attempt.supervisor_events)]
    return all(
        shipped.get(f"{path.parent.name}/{path.name}", 0) == path.stat().st_size for path in files if path.exists()
    )


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the memory of processes together; those that have ended count nothing.

    On Linux a page that several share is counted once in all (PSS), as forked ranks share most of
    theirs; elsewhere only what is a process's own (USS).
    """
    total = 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += int(getattr(memory, "pss", memory.uss))
    return total
