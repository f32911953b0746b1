"""What `orchestrate launch --rehearse` shows: what will be rehearsed and what not, and how it went."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from orchestrator.commands.request import launch_command, reference_to, request_words, requested_settings

if TYPE_CHECKING:
    from orchestrator.rehearsal_report import Rehearsal
    from orchestrator.rehearsal_run import RehearsalRequest


def run_rehearsal(
    recipe: str,
    overrides: Sequence[str],
    nodes: int | None,
    request: "RehearsalRequest",
    *,
    is_dry: bool,
    as_json: bool,
) -> None:
    """Rehearse a launch, show how it went, and fail where it showed a reason not to launch.

    Raises:
        OrchestrateError: it could not be rehearsed, or failed.
    """
    from orchestrator.config import whole_key
    from orchestrator.errors import RunError
    from orchestrator.rehearsal import differences, in_common
    from orchestrator.rehearsal_run import prepare, problems_of, rehearse
    from orchestrator.screen import notice, print_facts, print_json, print_next, print_table
    from orchestrator.values import to_plain

    real = requested_settings(recipe, overrides, nodes)
    _, given = request_words(recipe, overrides, nodes)
    settings, inputs_seconds = prepare(real, request, frozenset(whole_key(word.partition("=")[0]) for word in given))
    if not as_json:
        print_facts("rehearsed as it will be", in_common(real, settings))
        click.echo()
        print_table(("not rehearsed", "the run", "the rehearsal"), differences(real, settings))
    if is_dry:
        print_next(f"{launch_command(recipe, overrides, nodes)} --rehearse")
        return
    done, run = rehearse(settings, shlex.join(sys.argv), inputs_seconds, notice)
    if as_json:
        print_json(to_plain(done))
    else:
        click.echo()
        _show(done)
        print_facts("", [("picture", str(run.path / "rehearsal.png")), ("run", str(run.path))])
    problems = problems_of(done, could_kill=settings.cluster.one_machine)
    if problems:
        raise RunError(f"the rehearsal {run.name} is no reason to launch yet; see `orchestrate status "
                       f"{reference_to(run)}`:", problems)  # fmt: skip
    if not as_json:
        print_next(launch_command(recipe, overrides, nodes))


def _show(done: "Rehearsal") -> None:
    from orchestrator.screen import print_facts, print_table
    from orchestrator.units import format_bytes, format_duration

    facts = [
        ("ranks", f"{done.ranks}, {done.layout}"),
        ("inputs", format_duration(done.inputs_seconds)),
        ("launch to end", f"{format_duration(done.seconds)}, {done.attempts} attempts"),
    ]
    if done.step_seconds is not None:
        facts.append(("steps", f"{done.last_step}, {format_duration(done.step_seconds)} each"))
    if done.save_seconds is not None:
        facts.append(("saves", f"{done.saves}, the slowest on disk after {format_duration(done.save_seconds)}"))
    loss = done.node_loss
    if loss is not None:
        told = "no attempt ended for it" if loss.noticed_seconds is None else (
            f"its attempt over after {format_duration(loss.noticed_seconds)}"
        )  # fmt: skip
        if loss.restart_seconds is not None:
            told += f", next step {format_duration(loss.restart_seconds)} later, {loss.steps_lost} steps done again"
        facts.append(("lost node", f"{loss.node} after step {loss.after_step}: {told}"))
    facts.append(("tracked", "every event is in MLflow" if done.is_tracked else "not all events are in MLflow"))
    if done.peak_memory_bytes:
        facts.append(("memory", f"{format_bytes(done.peak_memory_bytes)} at most, Slurm included"))
    print_facts("", facts)
    rows = [(str(phase.attempt), phase.name, format_duration(phase.seconds)) for phase in done.phases]
    print_table(("attempt", "phase", "took"), rows, right=(2,))
