"""`orchestrate logs`: what the ranks wrote, the first failing rank's traceback first."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import click

if TYPE_CHECKING:
    from orchestrator.run_directory import AttemptDirectory, RunDirectory

FOLLOW_SECONDS = 0.5
ASK_SECONDS = 5.0


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
        outputs = sorted([*found.jobs.glob("*.out"), *found.jobs.glob("*.log")])
        for path in outputs:
            click.echo(path.read_text(errors="replace"), nl=False)
        if not any(path.stat().st_size for path in outputs):
            raise RunError(f"the job of run {found.name} has written nothing yet")
        return
    if follow:
        _wait_for_attempt(found)
    attempts = found.attempts()
    if not attempts:
        raise RunError(f"run {found.name} has no attempt yet; see `orchestrate logs {found.name} --supervisor`")
    if attempt is not None and attempt > len(attempts):
        count = "1 attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
        raise RunError(f"run {found.name} has {count}, there is no attempt {attempt}")
    chosen = attempts[attempt - 1] if attempt is not None else attempts[-1]
    if rank is not None:
        path = chosen.rank_log(rank)
        if not path.exists():
            raise RunError(f"attempt {chosen.number} of run {found.name} has no rank {rank}")
        click.echo(path.read_text(errors="replace"), nl=False)
        return
    _show_failures(chosen)
    offset = _show_events(chosen, (0, 0))
    if offset == (0, 0):
        click.echo(f"attempt {chosen.number} has not told of anything yet; its ranks are starting", err=True)
    if follow:
        _follow(found, chosen, offset)


def _wait_for_attempt(run: "RunDirectory") -> None:
    """Wait until the ranks are started for the first time, or never will be."""
    from orchestrator.reconcile import ENDED
    from orchestrator.status import read_status

    asked = 0.0
    while not run.attempts():
        if time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            if read_status(run).state in ENDED:
                return
        time.sleep(FOLLOW_SECONDS)


def _show_failures(attempt: "AttemptDirectory") -> None:
    from orchestrator.why import read_left

    left = read_left(attempt, (attempt.read_outcome() or {}).get("rank"))
    failures = left.failures
    for failure in failures[:1]:
        when = f"after step {failure['step']}" if failure["step"] is not None else "before the first step"
        click.echo(f"rank {failure['rank']} on {failure['host']} failed first, {when}:")
        click.echo(left.stacks or failure["traceback"])
    if len(failures) > 1:
        others = ", ".join(str(failure["rank"]) for failure in failures[1:9])
        click.echo(f"{len(failures) - 1} more failed after it: {others}")


def _show_events(attempt: "AttemptDirectory", offsets: tuple[int, int]) -> tuple[int, int]:
    """Show what rank 0 and the supervisor have told since, in the order of time; return how far was read."""
    from orchestrator.events import read_events

    told = list(read_events(attempt.events, offsets[0]))
    noted = list(read_events(attempt.supervisor_events, offsets[1]))
    for _, event in sorted([*told, *noted], key=lambda pair: pair[1].time):
        click.echo(event_line(event))
    return (told[-1][0] if told else offsets[0]), (noted[-1][0] if noted else offsets[1])


def event_line(event: "object") -> str:
    """Return an event in a line."""
    from orchestrator import events as e
    from orchestrator.doubts import in_words
    from orchestrator.units import format_bytes, format_count, format_time

    assert isinstance(event, e.Event)
    when = format_time(event.time)
    match event:
        case e.StartEvent():
            what = (f"starts after step {event.step} from {event.loaded_from}: {event.layout} on {event.device}, "
                    f"{format_count(event.parameters)} parameters")  # fmt: skip
        case e.FirstLossEvent():
            what = (f"first loss {event.loss:.5f}, recorded with the base {event.recorded_loss:.5f}: relative "
                    f"difference {event.relative_difference:.1e}, of tokens {event.token_difference:.1e}")  # fmt: skip
        case e.StepEvent():
            what = (f"step {event.step}  loss {event.loss:.4f}  gradient norm {event.gradient_norm:.3f}  "
                    f"rate {event.learning_rate:.2e}  {format_count(event.tokens_per_second)} tokens/s  "
                    f"MFU {event.mfu:.1%}{'  skipped' if event.is_skipped else ''}")  # fmt: skip
        case e.ValidationEvent():
            what = f"step {event.step}  held-out loss {event.loss:.4f} over {event.samples} sequences"
            if len(event.losses) > 1:
                what += ": " + ", ".join(f"{name} {loss:.4f}" for name, loss in event.losses.items())
        case e.SaveEvent():
            what = f"step {event.step}  saves {event.name}, stood still for {event.stall_seconds:.2f} s"
        case e.CheckpointEvent():
            what = (f"step {event.step}  checkpoint {event.name} is complete: {format_bytes(event.bytes)}, on disk "
                    f"after {event.seconds:.1f} s")  # fmt: skip
        case e.DamageEvent():
            what = f"step {event.step}  checkpoint {event.name} is damaged, the one before is used: " + "; ".join(
                event.problems
            )
        case e.RemovedEvent():
            what = f"step {event.step}  removed {event.name}: {event.why}"
        case e.RepeatEvent():
            steps = f"steps {event.first_step} to {event.last_step} were done again"
            what = f"{steps}, largest relative difference {event.relative_difference:.1e} (step {event.step})"
            if event.is_beyond_noise:
                what += f", beyond the noise of {event.noise:.0e}: hardware or nondeterminism"
        case e.GuardEvent() | e.ReplicaEvent():
            what = in_words(event)
        case e.RankTimesEvent():
            what = (f"step {event.step}  ranks computed {event.median_seconds:.3g} s (median), rank "
                    f"{event.slowest_rank} on {event.slowest_host} {event.slowest_seconds:.3g} s")  # fmt: skip
        case e.StageEvent():
            what = (f"{event.files} files of shards are in {event.folder} on {event.host} after {event.seconds:.0f} s, "
                    f"{format_bytes(event.copied_bytes)} of {format_bytes(event.bytes)} copied")  # fmt: skip
        case e.DataWaitEvent() | e.Fp8ProofEvent() | e.Fp8GapEvent():
            what = event.message
        case e.FfnInputsEvent():
            what = event.message + (", which it passed" if event.is_alarm else "")
        case e.ProfileEvent():
            what = (f"step {event.step}  traces of steps {event.first_step} to {event.last_step} of "
                    f"{len(event.ranks)} ranks are written, stood still for {event.write_seconds:.2f} s")  # fmt: skip
        case e.EndEvent():
            what = f"leaves after step {event.step}: {event.reason}"
        case _:
            assert_never(event)
    return f"{when}  {what}"


def _follow(run: "RunDirectory", attempt: "AttemptDirectory", offset: tuple[int, int]) -> None:
    """Show new lines until the run ends; the scheduler is asked only while there are none."""
    from orchestrator.reconcile import ENDED
    from orchestrator.status import read_status

    asked = 0.0
    while True:
        time.sleep(FOLLOW_SECONDS)
        is_over = attempt.outcome.exists()
        before, offset = offset, _show_events(attempt, offset)
        newest = run.attempts()[-1]
        if newest.number > attempt.number:
            click.echo(f"attempt {newest.number}:")
            attempt, offset = newest, (0, 0)
        elif offset == before and (is_over or time.monotonic() - asked > ASK_SECONDS):
            asked = time.monotonic()
            status = read_status(run)
            if status.state in ENDED:
                _show_events(attempt, offset)
                _show_failures(attempt)
                click.echo(f"{status.state}: {status.reason}")
                return
