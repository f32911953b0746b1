"""Whether a run that met faults is the one that met none: losses, samples, lost work, and what is left over."""

import time
from collections.abc import Mapping

from orchestrator.checkpoints import DAMAGED, MARKER, complete_checkpoints, parse_name
from orchestrator.events import (
    CheckpointEvent,
    RepeatEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    read_events,
)
from orchestrator.exit_codes import Cause
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.reconcile import State
from orchestrator.retention import kept_at_most
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.status import read_status
from orchestrator.why import explain_run
from tests.launched import processes_of
from tests.slurm_runs import surviving_losses

SECONDS_TO_END = 60.0
"""How long the last processes of a run may take after its end: what is left is shipped to MLflow."""


def told(attempt: AttemptDirectory, kind: type) -> list:  # type: ignore[type-arg]
    """Return an attempt's events of a kind, those of its ranks before its supervisor's."""
    paths = (attempt.events, attempt.supervisor_events)
    return [event for path in paths for _, event in read_events(path) if isinstance(event, kind)]


def problems_of(run: RunDirectory, undisturbed: RunDirectory, damaged: Mapping[str, int]) -> list[str]:
    """Return in what a finished run differs from an undisturbed one, and what is wrong with its records.

    Args:
        damaged: the checkpoints that were damaged on the disk, each with the attempt that was there then.
    """
    plan = read_plan(run.plan)
    found = [f"{each.name} ended as {state}" for each in (run, undisturbed)
             if (state := read_status(each).state) != State.FINISHED]  # fmt: skip
    trajectory, more = walk(run, plan)
    found += more
    wanted = surviving_losses(undisturbed)
    found += different("the loss of the ancestry's steps", {s: e.loss for s, e in trajectory.items()}, wanted)
    found += different("the newest loss of each step", surviving_losses(run), wanted)
    found += different("the held-out loss at the end", last_validation(run, plan), last_validation(undisturbed, plan))
    found += lost_too_much(run, plan, set(damaged.values()))
    for attempt in run.attempts():
        found += [
            f"attempt {attempt.number} began from {event.loaded_from}, which is damaged"
            for event in told(attempt, StartEvent)
            if damaged.get(event.loaded_from, attempt.number) < attempt.number
        ]
        found += [f"attempt {attempt.number}: step {event.step} gave {event.loss} and before {event.recorded_loss}"
                  for event in told(attempt, RepeatEvent) if event.is_beyond_noise]  # fmt: skip
    explained = {e.status.number: e for e in explain_run(run).attempts}
    found += [f"attempt {number} has no evidence of what ended it ({e.status.cause})"
              for number, e in explained.items() if not e.evidence and e.status.cause != Cause.FINISHED]  # fmt: skip
    return found + left_over(run, plan)


def walk(run: RunDirectory, plan: TrainingPlan) -> tuple[dict[int, StepEvent], list[str]]:
    """Follow the ancestry of the last checkpoint to step 0; return its steps, and what is wrong with them."""
    found: list[str] = []
    trajectory: dict[int, StepEvent] = {}
    last = complete_checkpoints(run)[-1]
    name, step = last.name, last.step
    ancestry = list(last.facts.ancestry)
    if step != plan.total_steps:
        found.append(f"the last checkpoint is of step {step}, not {plan.total_steps}")
    while True:
        number = (parse_name(name) or (0, 0))[1]
        (start,) = told(run.attempt(number), StartEvent)
        steps = {e.step: e for e in told(run.attempt(number), StepEvent) if e.step <= step}
        if sorted(steps) != list(range(start.step + 1, step + 1)):
            found.append(f"attempt {number} began at step {start.step} and did {sorted(steps)} up to step {step}")
        trajectory |= steps
        if list(start.ancestry) != ancestry:
            found.append(f"{name} descends from {ancestry}, its attempt from {list(start.ancestry)}")
        if not start.ancestry:
            break
        name, *ancestry = start.ancestry
        step = (parse_name(name) or (0, 0))[0]
        if step != start.step:
            found.append(f"attempt {number} began at step {start.step} from {name}")
    if start.step:
        found.append(f"the ancestry ends with attempt {start} at step {start.step}, not 0")
    samples = [trajectory[step].consumed_samples for step in sorted(trajectory)]
    per_step = plan.layout.global_batch_size
    if samples != [per_step * step for step in range(1, plan.total_steps + 1)]:
        found.append(f"samples on the surviving trajectory are not {per_step} a step: {samples}")
    return trajectory, found


def different(what: str, mine: Mapping[int, float], wanted: Mapping[int, float]) -> list[str]:
    """Say where two curves differ, bit for bit."""
    steps = [step for step in sorted({*mine, *wanted}) if mine.get(step) != wanted.get(step)]
    if not steps and wanted:
        return []
    at = steps[0] if steps else None
    return [f"{what} differs at {len(steps)} of {len(wanted)} steps, first at {at}: {mine.get(at)}, {wanted.get(at)}"]


def last_validation(run: RunDirectory, plan: TrainingPlan) -> dict[int, float]:
    events = [event for attempt in run.attempts() for event in told(attempt, ValidationEvent)]
    return {event.step: event.loss for event in events if event.step == plan.total_steps}


def lost_too_much(run: RunDirectory, plan: TrainingPlan, damaged: set[int]) -> list[str]:
    """Return the attempts that lost more than a checkpoint interval, and ledgers that do not say what was lost.

    A save that was under way at the end counts for nothing, so that what was done beside it is lost as well.
    """
    found = []
    interval = plan.settings.checkpoint.interval_steps
    for attempt in run.attempts():
        outcome = attempt.read_outcome()
        if outcome is None:
            found.append(f"attempt {attempt.number} has no outcome")
            continue
        last, saved = outcome["last_step"], outcome["saved_step"]
        steps = {event.step for event in told(attempt, StepEvent)}
        lost = len([step for step in steps if step > saved])
        if outcome["ledger"]["tokens_lost"] != lost * plan.tokens_per_step:
            found.append(f"attempt {attempt.number} lost {lost} steps; its ledger has {outcome['ledger']}")
        marked = {event.step for event in told(attempt, CheckpointEvent)}
        under_way = [event.step for event in told(attempt, SaveEvent) if event.step not in marked]
        allowed = interval + (last - min(under_way) if under_way else 0) + interval * (attempt.number in damaged)
        if lost > allowed:
            found.append(f"attempt {attempt.number} ({outcome['cause']}) lost {lost} steps of {interval} an interval: "
                         f"from {saved} to {last}, saves under way {under_way}")  # fmt: skip
    return found


def left_over(run: RunDirectory, plan: TrainingPlan) -> list[str]:
    """Return half-written checkpoints, more than retention keeps, locks and processes of an ended run."""
    deadline = time.monotonic() + SECONDS_TO_END
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [f"process {process.pid} of the run is left: {process.cmdline()}" for process in processes_of(run)]
    if (
        run.supervisor_lock.exists()
    ):  # mlflow.lock may be left by a shipper that died with its node; others take it over
        found.append(f"{run.supervisor_lock.name} is left: {run.supervisor_lock.read_text()}")
    folders = sorted(run.checkpoints_folder.iterdir())
    for folder in folders:
        if not (folder / MARKER).exists() or (folder / DAMAGED).exists():
            found.append(f"{folder.name} is left with {sorted(path.name for path in folder.iterdir())}")
        found += [f"{folder.name}/{path.name} is half-written" for path in folder.glob(".*")]
    most = kept_at_most(plan.total_steps, plan.settings.checkpoint)
    if len(folders) > most:
        found.append(f"{len(folders)} checkpoints are kept, {most} at most: {[folder.name for folder in folders]}")
    return found
