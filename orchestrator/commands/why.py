"""`orchestrate why`: what ended each attempt of a run, the evidence, what was done, what a person could do."""

import re
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.status import REASON_CHARACTERS, print_text, shortened

if TYPE_CHECKING:
    from orchestrator.why import Explanation, RunExplanation

TRACEBACK_LINES = 16
EVIDENCE_LINES = 3
EVIDENCE_ITEMS = 6
EVIDENCE_CHARACTERS = 280
"""Of one, unless an attempt is asked for; `--attempt` and `--json` have all of it."""
WHOLE_ATTEMPTS = 3
"""The newest, shown each by itself; those before are told in stretches that ended alike."""


@click.command(name="why", short_help="Say why the attempts of a run ended, and what to do.")
@click.argument("run", default="last")
@click.option("--attempt", type=click.IntRange(min=1), help="One attempt, with all that is known of it.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, all of it.")
def command(run: str, attempt: int | None, as_json: bool) -> None:
    """Say why the attempts of RUN ended: the cause, the evidence, what was done, what you can do.

    RUN is a name, a unique prefix of one, the path of a run folder, or `last`.
    """
    from orchestrator.config import paths_in_force
    from orchestrator.errors import RunError
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain
    from orchestrator.why import explain_run

    explained = explain_run(find_run(run, Path(paths_in_force().runs)))
    if attempt is not None and attempt > len(explained.attempts):
        count = "1 attempt" if len(explained.attempts) == 1 else f"{len(explained.attempts)} attempts"
        raise RunError(f"run {explained.name} has {count}, there is no attempt {attempt}")
    if as_json:
        print_json(to_plain(explained if attempt is None else explained.attempts[attempt - 1]))
        return
    if attempt is None:
        show_run(explained)
    else:
        show_attempt(explained.attempts[attempt - 1])
    print_next(explained.next_command)


def show_run(run: "RunExplanation") -> None:
    """Print the newest end first, then the attempts, the oldest first."""
    from orchestrator.reconcile import State
    from orchestrator.screen import print_facts, print_table

    because = " because" if run.state in (State.FAILED, State.STOPPED, State.CANCELLED) else ":" if run.reason else ""
    print_text(shortened(f"{run.name} is {run.state}{because} {run.reason}".rstrip(), REASON_CHARACTERS))
    ended = [attempt for attempt in run.attempts if attempt.is_over]
    newest = ended[-1] if ended else None
    if newest is not None and newest.is_failure and newest.traceback and not newest.stacks:
        _show_tail(newest, run.name)
    if newest is not None and newest.is_failure:
        click.echo(f"\nWhat you can do about attempt {newest.status.number}")
        _show_points(newest.advice)
    if run.patterns:
        click.echo("\nWhat attempts have in common")
        _show_points(run.patterns)
    earlier, whole = run.attempts[:-WHOLE_ATTEMPTS], run.attempts[-WHOLE_ATTEMPTS:]
    if earlier:
        from orchestrator.why import stretches

        click.echo("")
        columns = ("attempts", "ended by", "and then", "steps", "began", "lasted", "tokens lost")
        print_table(columns, [_row(stretch) for stretch in stretches(earlier)], right=(6,))
    for attempt in whole:
        title, facts = _block(attempt)
        click.echo("")
        print_facts(title, facts)


def show_attempt(attempt: "Explanation") -> None:
    """Print all that is known of one attempt."""
    from orchestrator.screen import print_facts

    title, facts = _block(attempt, whole=True)
    print_facts(title, facts)
    if attempt.exit_codes:
        codes = Counter(attempt.exit_codes.values()).most_common()
        told = ", ".join(f"{count} with {_code(code)}" for code, count in codes)
        print_facts("", [("exit codes", f"of what was started: {told}")])
    if attempt.traceback:
        click.echo(f"\n{attempt.traceback}")
    if attempt.stacks:
        click.echo(f"\nThe stacks of the rank that is to blame:\n{attempt.stacks}")
    if attempt.advice:
        click.echo("\nWhat you can do")
        _show_points(attempt.advice)


def _show_tail(attempt: "Explanation", run: str) -> None:
    """Print the end of a traceback, where the error stands."""
    lines = attempt.traceback.splitlines()
    number = attempt.status.number
    click.echo(f"\nAttempt {number} ended with")
    if len(lines) > TRACEBACK_LINES:
        click.echo(f"  ... {len(lines) - TRACEBACK_LINES} lines before: `orchestrate why {run} --attempt {number}`")
    for line in lines[-TRACEBACK_LINES:]:
        click.echo(f"  {line}")


def _block(attempt: "Explanation", *, whole: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Return the title and the lines of one attempt."""
    status = attempt.status
    if not attempt.is_over:
        return f"attempt {status.number}: no end yet, {_in_words(attempt)}", [("nodes", status.nodes or "-")]
    facts = [("ended by", _cut(status.message, whole) or _meaning(status.cause))]
    shown = attempt.evidence if whole else attempt.evidence[:EVIDENCE_ITEMS]
    for item in shown:
        lines = [line for line in item.text.splitlines() if line.strip()] or [""]
        if not whole and len(lines) > EVIDENCE_LINES:
            lines = ["...", *lines[-EVIDENCE_LINES:]] if lines[0].startswith("Traceback") else lines[:EVIDENCE_LINES]
        facts += [(item.source if line is lines[0] else "", _cut(line, whole)) for line in lines]
    if len(attempt.evidence) > len(shown):
        facts.append(("", f"... and {len(attempt.evidence) - len(shown)} more"))
    if whole:
        facts.append(("nodes", status.nodes or "-"))
    done = f"{status.action}: {status.why}" if status.action else "nothing: nobody was left to do it"
    facts.append(("done", done + (f"; kept out: {', '.join(status.excluded)}" if status.excluded else "")))
    return f"attempt {status.number}: {status.cause}, {_in_words(attempt)}", facts


def _row(attempts: "Sequence[Explanation]") -> tuple[str, ...]:
    """Return attempts that ended alike in a row of the table."""
    first, last = attempts[0].status, attempts[-1].status
    numbers = str(first.number) if len(attempts) == 1 else f"{first.number}-{last.number}"
    hosts = Counter(attempt.status.host for attempt in attempts if attempt.status.host and attempt.is_failure)
    on = f" on {next(iter(hosts))}" if len(hosts) == 1 else f" on {len(hosts)} nodes" if hosts else ""
    then = {"finish": "done", "restart": "restarted", "requeue": "requeued", "stop": "stopped"}.get(last.action, "-")
    return numbers, f"{first.cause}{on}", then, *_figures(attempts)


def _figures(attempts: "Sequence[Explanation]") -> tuple[str, str, str, str]:
    """Return their steps, when they began, how long they lasted, and how many tokens were lost."""
    from orchestrator.units import format_count, format_duration, format_time

    of = [attempt.status for attempt in attempts]
    firsts = [status.first_step for status in of if status.first_step is not None]
    lasts = [status.last_step for status in of if status.last_step is not None]
    seconds = sum((status.ended or time.time()) - status.started for status in of if status.started is not None)
    lost = sum(status.ledger.tokens_lost for status in of if status.ledger is not None and status.cause)
    return (
        f"{min(firsts)}-{max(lasts)}" if firsts and lasts else "-",
        format_time(of[0].started)[5:16].replace("T", " ") if of[0].started is not None else "-",
        format_duration(seconds),
        format_count(lost) if lost else "-",
    )


def _in_words(attempt: "Explanation") -> str:
    """Return one attempt's figures as a title has them."""
    steps, began, lasted, lost = _figures([attempt])
    did = "no step" if steps == "-" else f"steps {steps}"
    return f"{did}, began {began}, lasted {lasted}" + ("" if lost == "-" else f", {lost} tokens lost")


def _show_points(points: "Sequence[str]") -> None:
    """Print a list; a command in backticks is kept on one line, where it fits."""
    from orchestrator.screen import WIDTH

    for point in points:
        unbroken = re.sub(r"`[^`]+`", lambda code: code.group().replace(" ", "\xa0"), point)
        lines = textwrap.wrap(unbroken, WIDTH - 2, break_on_hyphens=False, break_long_words=False)
        click.echo("- " + "\n  ".join(lines).replace("\xa0", " "))


def _meaning(cause: str) -> str:
    from orchestrator.exit_codes import Cause
    from orchestrator.remedies import REMEDIES

    return REMEDIES[Cause(cause)].meaning


def _cut(text: str, whole: bool) -> str:
    is_short = whole or len(text) <= EVIDENCE_CHARACTERS
    return text if is_short else f"{text[:EVIDENCE_CHARACTERS].rpartition(' ')[0]} ..."


def _code(code: int) -> str:
    import signal

    if code <= 128:
        return str(code)
    try:
        return f"{code} ({signal.Signals(code - 128).name})"
    except ValueError:
        return str(code)
