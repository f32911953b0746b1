"""`orchestrate status`: where a run stands, or all runs in a list."""

import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orchestrator.status import AttemptStatus, RunStatus

SHOWN_SHARE = 0.005
"""Of the time; a kind that took less is left out of the screen's line and stands in the JSON."""


@click.command(name="status", short_help="Show where a run stands, or list all runs.")
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(run: str | None, as_json: bool) -> None:
    """Show where RUN stands, or list all runs.

    RUN is a name, a unique prefix of one, the path of a run folder, or `last`.
    """
    from pathlib import Path

    from orchestrator.config import paths_in_force
    from orchestrator.errors import OrchestrateError
    from orchestrator.run_directory import find_run, list_runs
    from orchestrator.screen import notice, print_json, print_next
    from orchestrator.status import read_status
    from orchestrator.values import to_plain

    runs = Path(paths_in_force().runs)
    if run is None:
        statuses = []
        for found in list_runs(runs):
            try:
                statuses.append(read_status(found))
            except OrchestrateError as error:
                notice(f"{found.name} is left out: {error}")
        if as_json:
            print_json([to_plain(status) for status in statuses])
            return
        if not statuses:
            click.echo(f"no runs in {runs}")
            print_next("orchestrate demo")
            return
        _show_list(statuses)
        print_next(f"orchestrate status {statuses[0].name}")
        return
    status = read_status(find_run(run, runs))
    if as_json:
        print_json(to_plain(status))
        return
    show_status(status)
    print_next(status.next_command)


def show_status(status: "RunStatus") -> None:
    """Print one run's screen."""
    from orchestrator.screen import print_facts, print_table
    from orchestrator.units import format_count, format_duration, format_time

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    held_out = number(status.validation_loss, ".4f")
    if status.first_validation_loss is not None and status.first_validation_loss != status.validation_loss:
        held_out += f" (at the start {status.first_validation_loss:.4f})"
    speed = "-"
    if status.tokens_per_second is not None and status.tflops_per_gpu is not None and status.mfu is not None:
        speed = (f"{format_count(status.tokens_per_second)} tokens/s, {status.tflops_per_gpu:.3g} TFLOP/s a rank, "
                 f"MFU {status.mfu:.1%} (causal half)")  # fmt: skip
    checkpoint = status.last_checkpoint or "none yet"
    if status.checkpoints > 1:
        checkpoint += f", {status.checkpoints} are kept"
        if status.best_checkpoint is not None:
            checkpoint += f", lowest held-out loss in {status.best_checkpoint}"
    facts = [
        ("state", f"{status.state}" + (f": {status.reason}" if status.reason else "")),
        ("step", f"{status.step:,} of {status.total_steps:,}, {format_count(status.consumed_tokens)} tokens"),
        ("loss", f"{number(status.loss, '.4f')}, held-out {held_out}"),
        ("speed", speed),
        ("layout", status.layout),
        ("checkpoint", checkpoint),
        *_hours(status),
        *([("nodes", _nodes(status.attempt_list[-1]))] if status.attempt_list else []),
        ("folder", str(status.path)),
    ]
    if status.last_event is not None and status.state == "RUNNING":
        facts.insert(2, ("last heard", f"{format_duration(time.time() - status.last_event)} ago"))
    if status.seconds_left is not None:
        facts.insert(2, ("time left", f"about {format_duration(status.seconds_left)} at the speed of the last steps"))
    facts += [("warning", warning) for warning in status.warnings]
    print_facts(status.name, facts)
    if status.attempt_list:
        print_table(
            ("no.", "job", "began", "nodes", "steps", "lasted", "tokens lost", "ended by"),
            [
                (
                    str(attempt.number),
                    attempt.job_id,
                    format_time(attempt.started)[5:16].replace("T", " ") if attempt.started else "-",
                    attempt.nodes or "-",
                    f"{attempt.first_step}-{attempt.last_step}" if attempt.last_step is not None else "-",
                    format_duration((attempt.ended or time.time()) - attempt.started) if attempt.started else "-",
                    format_count(attempt.ledger.tokens_lost) if attempt.ledger and attempt.ledger.tokens_lost else "-",
                    _ended_by(attempt),
                )
                for attempt in status.attempt_list
            ],
            right=(6,),
        )


def _hours(status: "RunStatus") -> list[tuple[str, str]]:
    """Return the lines on where the time went and what it costs."""
    from orchestrator.units import format_duration

    ledger, unit = status.ledger, "GPU hours" if status.is_on_gpus else "rank hours"
    if status.effective_share is None:
        return []
    others = [
        f"{kind} {format_duration(seconds)}"
        for kind, seconds in ledger.seconds.items()
        if kind != "training" and seconds >= SHOWN_SHARE * ledger.total_seconds
    ]
    spent = f"{_number(ledger.gpu_hours)} {unit}"
    if ledger.spare_gpu_hours:
        spent += f", {_number(ledger.spare_gpu_hours)} more of spare nodes"
    if status.cost is not None:
        spent += f"; at the cluster's price {_number(status.cost)}"
    shares = f"training {status.effective_share:.0%} of {format_duration(ledger.total_seconds)}"
    return [("time", ", ".join([shares, *others])), ("spent", spent)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _nodes(attempt: "AttemptStatus") -> str:
    spares = "" if not attempt.spare_nodes else f", {attempt.spare_nodes} of them to spare"
    return attempt.nodes + spares


def _ended_by(attempt: "AttemptStatus") -> str:
    """Return an attempt's cause of end, with the node where it happened if there was a choice."""
    if not attempt.cause:
        return "running"
    return f"{attempt.cause} on {attempt.host}" if attempt.host not in ("", attempt.nodes) else attempt.cause


def _show_list(statuses: "list[RunStatus]") -> None:
    from orchestrator.screen import print_table
    from orchestrator.units import format_duration

    print_table(
        ("run", "state", "step", "attempts", "loss", "last heard"),
        [
            (
                status.name,
                str(status.state),
                f"{status.step:,} of {status.total_steps:,}",
                str(status.attempts),
                "-" if status.loss is None else f"{status.loss:.4f}",
                "-" if status.last_event is None else f"{format_duration(time.time() - status.last_event)} ago",
            )
            for status in statuses
        ],
        right=(2, 3, 4),
    )
