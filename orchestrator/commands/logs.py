"""`orchestrate logs`: what the ranks wrote, the first failing rank's traceback first."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orchestrator.run_directory import AttemptDirectory, RunDirectory

FOLLOW_SECONDS = 0.5


@click.command(name="logs", short_help="Show what the ranks of a run wrote.")
@click.argument("run", default="last")
@click.option("--attempt", type=click.IntRange(min=1), help="Which attempt; the newest by default.")
@click.option("--rank", type=click.IntRange(min=0), help="One rank's whole output.")
@click.option("--supervisor", is_flag=True, help="The supervisor's own log.")
@click.option("-f", "--follow", is_flag=True, help="Go on showing new lines until the run ends.")
def command(run: str, attempt: int | None, rank: int | None, supervisor: bool, follow: bool) -> None:
    """Show what the ranks of RUN wrote: failures first, then the last steps.

    RUN is a name, a unique prefix of one, the path of a run folder, or `last`.
    """
    from orchestrator.config import paths_in_force
    from orchestrator.errors import RunError
    from orchestrator.run_directory import find_run

    found = find_run(run, Path(paths_in_force().runs))
    if supervisor:
        for path in sorted([*found.jobs.glob("*.out"), *found.jobs.glob("*.log")]):
            click.echo(path.read_text(errors="replace"), nl=False)
        return
    attempts = found.attempts()
    if not attempts:
        raise RunError(f"run {found.name} has no attempt yet; see `orchestrate logs {found.name} --supervisor`")
    if attempt is not None and attempt > len(attempts):
        raise RunError(f"run {found.name} has {len(attempts)} attempts, there is no attempt {attempt}")
    chosen = attempts[attempt - 1] if attempt is not None else attempts[-1]
    if rank is not None:
        path = chosen.rank_log(rank)
        if not path.exists():
            raise RunError(f"attempt {chosen.number} of run {found.name} has no rank {rank}")
        click.echo(path.read_text(errors="replace"), nl=False)
        return
    _show_attempt(chosen)
    if follow:
        _follow(found, chosen)


def _show_attempt(attempt: "AttemptDirectory") -> int:
    """Print failures, then every step; return how far the events were read."""
    from orchestrator.files import read_json

    failures = sorted((read_json(path) for path in attempt.failures.glob("*.json")), key=lambda f: float(f["time"]))
    for failure in failures[:1]:
        click.echo(f"rank {failure['rank']} on {failure['host']} failed first, after step {failure['step']}:")
        click.echo(failure["traceback"])
    if len(failures) > 1:
        others = ", ".join(str(failure["rank"]) for failure in failures[1:9])
        click.echo(f"{len(failures) - 1} more ranks failed after it: {others}")
    return _show_events(attempt, 0)


def _show_events(attempt: "AttemptDirectory", offset: int) -> int:
    from orchestrator.events import read_events

    for after, event in read_events(attempt.events, offset):
        click.echo(event_line(event))
        offset = after
    return offset


def event_line(event: "object") -> str:
    """Return an event in a line."""
    from orchestrator import events as e
    from orchestrator.units import format_bytes, format_count, format_duration, format_time

    assert isinstance(event, e.Event)
    when = format_time(event.time)
    match event:
        case e.StartEvent():
            what = (f"starts after step {event.step} from {event.loaded_from}: {event.layout} on {event.device}, "
                    f"{format_count(event.parameters)} parameters")  # fmt: skip
        case e.StepEvent():
            what = (f"step {event.step}  loss {event.loss:.4f}  gradient norm {event.gradient_norm:.3f}  "
                    f"rate {event.learning_rate:.2e}  {format_count(event.tokens_per_second)} tokens/s  "
                    f"MFU {event.mfu:.1%}")  # fmt: skip
        case e.ValidationEvent():
            what = f"step {event.step}  held-out loss {event.loss:.4f} over {event.samples} sequences"
        case e.CheckpointWrittenEvent():
            size = sum(int(facts["bytes"]) for facts in event.files.values())
            what = f"step {event.step}  checkpoint {event.name}, {format_bytes(size)} in {format_duration(event.seconds)}"
        case e.CheckpointEvent():
            what = f"step {event.step}  checkpoint {event.name} is complete"
        case e.EndEvent():
            what = f"leaves after step {event.step}: {event.reason}"
    return f"{when}  {what}"


def _follow(run: "RunDirectory", attempt: "AttemptDirectory") -> None:
    from orchestrator.reconcile import ENDED
    from orchestrator.status import read_status

    offset = attempt.events.stat().st_size if attempt.events.exists() else 0
    while True:
        time.sleep(FOLLOW_SECONDS)
        offset = _show_events(attempt, offset)
        newest = run.attempts()[-1]
        if newest.number != attempt.number:
            click.echo(f"attempt {newest.number}:")
            attempt, offset = newest, 0
        elif attempt.outcome.exists() and read_status(run).state in ENDED:
            return
