"""`orchestrate status`: where a run stands, or all runs in a list."""

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orchestrator.status import AttemptStatus, RunStatus

SHOWN_SHARE = 0.005
"""Of the time; a kind that took less is left out of the screen's line and stands in the JSON."""
SHOWN_ATTEMPTS = 8
SHOWN_WARNINGS = 3
"""The newest; a line says what the others were, however long a run's history is."""
REASON_CHARACTERS = 320
WARNING_CHARACTERS = 180
NODES_LINE_CHARACTERS = 200
NODES_CHARACTERS = 18
"""Of a list of nodes in the table; `orchestrate why RUN --attempt N` has it whole."""


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
    if len(status.validation_losses) > 1:
        held_out += ": " + ", ".join(f"{name} {loss:.4f}" for name, loss in status.validation_losses.items())
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
        ("state", shortened(f"{status.state}" + (f": {status.reason}" if status.reason else ""), REASON_CHARACTERS)),
        ("step", f"{status.step:,} of {status.total_steps:,}, {format_count(status.consumed_tokens)} tokens"),
        ("loss", f"{number(status.loss, '.4f')}, held-out {held_out}"),
        ("speed", speed),
        *_numbers(status),
        ("layout", status.layout),
        ("checkpoint", checkpoint),
        *_hours(status),
        *([("nodes", _nodes(status))] if status.attempt_list else []),
        *_traces(status),
        ("folder", str(status.path)),
    ]
    if status.last_event is not None and status.state == "RUNNING":
        facts.insert(2, ("last heard", f"{format_duration(time.time() - status.last_event)} ago"))
    if status.seconds_left is not None:
        facts.insert(2, ("time left", f"about {format_duration(status.seconds_left)} at the speed of the last steps"))
    shown = [shortened(warning, WARNING_CHARACTERS) for warning in status.warnings[-SHOWN_WARNINGS:]]
    if len(status.warnings) > SHOWN_WARNINGS:
        shown.insert(0, f"{len(status.warnings) - SHOWN_WARNINGS} before these")
    facts += [("warning", warning) for warning in shown]
    if _is_to_be_explained(status):
        facts.append(("why", f"`orchestrate why {status.name}` has the evidence, what was done, what you can do"))
    print_facts(status.name, facts)
    earlier, newest = status.attempt_list[:-SHOWN_ATTEMPTS], status.attempt_list[-SHOWN_ATTEMPTS:]
    if earlier:
        print_text(summary_of(earlier))
    if newest:
        print_table(
            ("no.", "job", "began", "nodes", "steps", "lasted", "tokens lost", "ended by"),
            [
                (
                    str(attempt.number),
                    attempt.job_id,
                    format_time(attempt.started)[5:16].replace("T", " ") if attempt.started else "-",
                    _cut(attempt.nodes, NODES_CHARACTERS) or "-",
                    f"{attempt.first_step}-{attempt.last_step}" if attempt.last_step is not None else "-",
                    format_duration((attempt.ended or time.time()) - attempt.started) if attempt.started else "-",
                    format_count(attempt.ledger.tokens_lost) if _has_lost(attempt) and attempt.ledger else "-",
                    _ended_by(attempt),
                )
                for attempt in newest
            ],
            right=(6,),
        )


def _has_lost(attempt: "AttemptStatus") -> bool:
    """Whether tokens are lost; none are as long as an attempt goes on."""
    return bool(attempt.cause and attempt.ledger is not None and attempt.ledger.tokens_lost)


def summary_of(attempts: "Sequence[AttemptStatus]") -> str:
    """Return attempts in one line: how many ended by what, on how many nodes, how long they took, what they lost."""
    from orchestrator.units import format_count, format_duration

    counts = Counter(attempt.cause or "running" for attempt in attempts)
    ends = []
    for cause, count in counts.most_common():
        hosts = {attempt.host for attempt in attempts if attempt.cause == cause} - {""}
        ends.append(f"{count} {cause}" + (f" on {len(hosts)} nodes" if len(hosts) > 1 else ""))
    numbers = (
        f"attempts {attempts[0].number}-{attempts[-1].number}" if len(attempts) > 1 else f"attempt {attempts[0].number}"
    )
    firsts = [attempt.first_step for attempt in attempts if attempt.first_step is not None]
    lasts = [attempt.last_step for attempt in attempts if attempt.last_step is not None]
    seconds = sum((attempt.ended or attempt.started) - attempt.started for attempt in attempts if attempt.started)
    lost = sum(attempt.ledger.tokens_lost for attempt in attempts if attempt.ledger is not None)
    told = [f"steps {min(firsts)}-{max(lasts)}"] if firsts and lasts else []
    told += [format_duration(seconds), f"{format_count(lost)} tokens lost" if lost else "no tokens lost"]
    return f"{numbers}: {', '.join(ends)}; {', '.join(told)}"


def _is_to_be_explained(status: "RunStatus") -> bool:
    """Whether the newest end was a failure, and the last line does not say so already."""
    from orchestrator.exit_codes import Cause

    expected = (Cause.FINISHED, Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.CANCELLED, Cause.STOPPED)
    ends = [attempt.cause for attempt in status.attempt_list if attempt.cause]
    return bool(ends) and ends[-1] not in expected and not status.next_command.startswith("orchestrate why ")


def print_text(text: str) -> None:
    """Print a sentence within the width of the screen."""
    from orchestrator.screen import WIDTH

    click.echo(textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False))


def shortened(text: str, characters: int) -> str:
    """Return the beginning and the end of a sentence that is too long for a screen."""
    if len(text) <= characters:
        return text
    tail = text[-characters // 3 :].partition(" ")[2]
    return f"{textwrap.shorten(text, characters - len(tail), placeholder='')} … {tail}"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


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


def _numbers(status: "RunStatus") -> list[tuple[str, str]]:
    """Return the lines on what the guards over the numbers have seen."""
    found = []
    if status.skipped_steps:
        found.append(("skipped", f"the gradients of {status.skipped_steps:,} steps; their samples count as consumed"))
    if status.slowest_rank:
        found.append(("slowest", status.slowest_rank))
    if status.fp8:
        found.append(("FP8", status.fp8))
    return found


def _traces(status: "RunStatus") -> list[tuple[str, str]]:
    """Return the line on where the traces of profiled steps are."""
    if not status.traces:
        return []
    first, *others = status.traces
    more = f" and of {len(others)} other ranks" if others else ""
    return [("traces", f"steps {status.traced}: {first}{more}; open them in ui.perfetto.dev")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _nodes(status: "RunStatus") -> str:
    """Return the newest attempt's nodes, its spares, and those that the run gets no more until a person resumes it."""
    from orchestrator.reconcile import ENDED

    newest = status.attempt_list[-1]
    spares = "" if not newest.spare_nodes else f", {newest.spare_nodes} of them to spare"
    is_told = status.excluded and status.state not in ENDED
    kept_out = f"; kept out: {', '.join(status.excluded)}" if is_told else ""
    return _cut(newest.nodes + spares + kept_out, NODES_LINE_CHARACTERS)


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
