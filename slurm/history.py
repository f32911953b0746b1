"""A run's attempts as the next decision needs them: what each has saved, how it ended, which nodes it found bad."""

from collections.abc import Sequence
from typing import Any

from orchestrator.checkpoints import complete_checkpoints, parse_name
from orchestrator.events import CheckpointEvent, StartEvent, StepEvent, read_events
from orchestrator.exit_codes import Cause
from orchestrator.recovery import Decision, Ending, decide
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.settings import RunSettings
from orchestrator.slurm.endings import AttemptEnding


def newest_step(run: RunDirectory) -> int:
    """Return the step of a run's newest complete checkpoint, or 0."""
    found = complete_checkpoints(run)
    return found[-1].step if found else 0


def saved_step(run: RunDirectory, number: int) -> int:
    """Return the step that a run had saved when an attempt ended, also where the checkpoint is deleted by now."""
    attempt = run.attempt(number)
    outcome = attempt.read_outcome()
    if outcome is not None:
        return int(outcome["saved_step"])
    saved = [event.step for _, event in read_events(attempt.supervisor_events) if isinstance(event, CheckpointEvent)]
    if saved:
        return max(saved)
    if number < 1:  # what it was branched from
        place = parse_name(run.branched_from() or "")
        return place[0] if place is not None else 0
    return saved_step(run, number - 1)


def attempts_since_a_person(run: RunDirectory) -> list[AttemptDirectory]:
    """Return the attempts since a person last started the run, the oldest first."""
    by_a_person = [i for i, record in enumerate(run.submissions(), 1) if record["by"] == "person"]
    first = max(by_a_person, default=0)
    records = [(attempt, attempt.read_job()) for attempt in run.attempts()]
    return [attempt for attempt, job in records if job is not None and job["submissions"] >= first]


def excluded_nodes(run: RunDirectory) -> tuple[str, ...]:
    """Return the nodes that attempts since a person last started the run found bad, the first found first."""
    outcomes = [attempt.read_outcome() for attempt in attempts_since_a_person(run)]
    return tuple(dict.fromkeys(n for outcome in outcomes if outcome is not None for n in outcome.get("excluded", ())))


def decide_on(run: RunDirectory, attempt: AttemptDirectory, ending: Ending, settings: RunSettings) -> Decision:
    """Return what follows an attempt's ending, after those before it since a person last started the run.

    One without an outcome counts as one whose supervisor was lost.
    """
    before = [other for other in attempts_since_a_person(run) if other.number < attempt.number]
    history = []
    for other in before:
        outcome = other.read_outcome()
        cause = Cause(outcome["cause"]) if outcome is not None else Cause.SUPERVISOR_LOST
        history.append(Ending(cause=cause, saved_step=saved_step(run, other.number)))
    return decide(
        history,
        ending,
        settings.max_restarts_without_progress,
        settings.max_preemptions_without_progress,
        started_from=saved_step(run, (before[0].number if before else attempt.number) - 1),
    )


def outcome_record(
    attempt: AttemptDirectory,
    ending: AttemptEnding,
    decision: Decision,
    *,
    saved_step: int,
    ended: float,
    submissions: int,
    excluded: Sequence[str],
    evidence: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """Return how an attempt ended and what follows, as it stands in outcome.json beside its ledger.

    Args:
        submissions: how many the run had then.
        excluded: nodes that the run's next job must not get.
        evidence: what was seen, each with a `source` and a `text`.
    """
    steps = [event.step for _, event in read_events(attempt.events) if isinstance(event, StartEvent | StepEvent)]
    return {
        "attempt": attempt.number,
        "cause": ending.cause,
        "message": ending.message,
        "rank": ending.rank,
        "host": ending.host,
        "first_step": steps[0] + 1 if steps else None,
        "last_step": steps[-1] if steps else None,
        "saved_step": saved_step,
        "started": (attempt.read_job() or {}).get("started", ended),
        "ended": ended,
        "submissions": submissions,
        "exit_codes": {str(rank): code for rank, code in sorted(ending.exit_codes.items())},
        "action": decision.action,
        "why": decision.why,
        "excluded": list(excluded),
        "evidence": list(evidence),
    }
