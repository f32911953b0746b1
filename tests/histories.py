"""Run folders with a history, written by what writes real ones; nothing of them lives."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.attempt_record import attempt_record
from orchestrator.config import compose
from orchestrator.events import StartEvent, StepEvent, event_record
from orchestrator.exit_codes import Cause
from orchestrator.files import JsonLines, write_json
from orchestrator.plan import make_plan, write_plan
from orchestrator.recovery import Action
from orchestrator.run_directory import AttemptDirectory, RunDirectory, create_run

STEP_SECONDS = 30.0
START_SECONDS = 100.0
JOB = "4711"
TOKENS_PER_STEP = 1024 * 4096


def make_run(runs: Path, *overrides: str, name: str = "deeper") -> RunDirectory:
    """Make a run of 32 nodes and one to spare, submitted at 1000 s by a person."""
    settings = compose("solar-10.7b", [f"paths.runs={runs}", f"name={name}", "cluster.spare_nodes=1", *overrides])
    run = create_run(runs, name)
    write_plan(run.launched_plan, make_plan(settings))
    record = {"time": 1000.0, "scheduler": settings.cluster.scheduler, "host": "login", "by": "person"}
    run.add_submission({**record, "job_id": JOB, "process_created": 0.0})
    return run


def add_attempt(
    run: RunDirectory,
    cause: Cause | None,
    action: Action | None = None,
    *,
    steps: tuple[int, int] | None,
    saved: int = 0,
    restarts: int = 0,
    failures: Sequence[dict[str, Any]] = (),
    **outcome: Any,
) -> AttemptDirectory:
    """Add an attempt that did its first to its last step; one without an action wrote no outcome."""
    before = run.attempts()[-1].read_outcome() if run.attempts() else None
    started = (before["ended"] if before is not None else 1100.0 + 10_000.0 * len(run.attempts())) + 60.0
    attempt = run.new_attempt()
    job = {
        "scheduler": "slurm", "job_id": JOB, "restart_count": restarts, "host": "n001", "process": attempt.number,
        "process_created": 1.0, "nodes": "n[001-033]", "node_count": 33, "started": started, "submissions": 1,
    }  # fmt: skip
    write_json(attempt.job, job)
    lines, at = JsonLines(attempt.events), started + START_SECONDS
    if steps is not None:
        told: list[Any] = [event(StartEvent, at, steps[0] - 1)]
        for step in range(steps[0], steps[1] + 1):
            at += STEP_SECONDS
            told.append(event(StepEvent, at, step))
        for each in told:
            lines.append(event_record(each))
    lines.close()
    for failure in failures:
        write_json(
            attempt.rank_failure(failure["rank"]), {"time": at + 1, "step": steps[1] if steps else None, **failure}
        )
    if action is not None:
        ended = at + 10.0
        whole = {
            **attempt_record(run, attempt, saved_step=saved, ended=ended),
            "attempt": attempt.number, "cause": cause, "message": f"what {cause} says", "rank": None, "host": None,
            "first_step": steps[0] if steps else None, "last_step": steps[1] if steps else None, "saved_step": saved,
            "started": started, "ended": ended, "submissions": 1, "exit_codes": {}, "action": action,
            "why": f"what follows {cause}", "excluded": [], "evidence": [], **outcome,
        }  # fmt: skip
        write_json(attempt.outcome, whole)
    return attempt


def event(kind: type[Any], time: float, step: int) -> Any:
    """Return an event; only its time and step are looked at."""
    rest = {field.name: 1 for field in dataclasses.fields(kind)}
    return kind(**{**rest, "time": time, "step": step})


def long_history(run: RunDirectory, attempts: int) -> None:
    """Give a run so many attempts as a bad month has: most preempted, some lost to two nodes, a few hung."""
    saved = 0
    for number in range(1, attempts + 1):
        if number == attempts:
            add_attempt(
                run, Cause.EXCEPTION, Action.STOP, steps=(saved + 1, saved + 7), saved=saved, rank=3, host="n007",
                message=f"rank 3 on n007 after step {saved + 7}: ValueError: {'a long story ' * 60}",
                failures=[failure(3, "n007")],
            )  # fmt: skip
        elif number % 7 == 3:
            add_attempt(
                run, Cause.NODE_FAILED, Action.REQUEUE, steps=(saved + 1, saved + 9), saved=saved + 5,
                host="n007" if number % 2 else "n019", excluded=["n007"],
            )  # fmt: skip
            saved += 5
        elif number % 11 == 5:
            add_attempt(run, Cause.HANG, Action.RESTART, steps=(saved + 1, saved + 9), saved=saved + 5, host="n002")
            saved += 5
        else:
            add_attempt(run, Cause.PREEMPTED, Action.REQUEUE, steps=(saved + 1, saved + 10), saved=saved + 10)
            saved += 10


def failure(rank: int, host: str, **different: Any) -> dict[str, Any]:
    """Return what a failing rank writes down."""
    trace = "\n".join(
        ["Traceback (most recent call last):"]
        + [f'  File "train.py", line {line}, in step\n    call({line})' for line in range(20)]
        + ["ValueError: no such thing"]
    )
    return {
        "rank": rank, "host": host, "exit_code": 1, "error": "ValueError", "message": "no such thing",
        "traceback": trace, **different,
    }  # fmt: skip
