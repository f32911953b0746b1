"""`orchestrate resume`: go on with a run that ended."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.request import ask_before_spending, reference_to

if TYPE_CHECKING:
    from orchestrator.resume import Resumption


@click.command(name="resume", short_help="Go on with a run that ended.")
@click.argument("run", default="last", metavar="[RUN=last]")
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes to run on from here on (cluster.nodes).")
@click.option("--allow-upgrade", is_flag=True, help="Go on with other package versions and with today's code.")
@click.option("--dry-run", is_flag=True, help="Check everything and show what would change, start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what changes as JSON.")
@click.option("--yes", is_flag=True, help="Do not ask before GPU hours are spent.")
@click.option("--wait", is_flag=True, help="Show progress until the run ends.")
def command(
    run: str,
    overrides: tuple[str, ...],
    nodes: int | None,
    allow_upgrade: bool,
    dry_run: bool,
    as_json: bool,
    yes: bool,
    wait: bool,
) -> None:
    """Go on with RUN from its newest complete checkpoint, in a new job.

    Settings may change where their field allows it: nodes, layout, precision and learning rate do, the
    model, the tokenizer, the seed and the global batch never. `tokens=3e10` prolongs a run that has
    finished. `orchestrate launch --from RUN@STEP` starts another run from a checkpoint instead.
    """
    from orchestrator.config import paths_in_force
    from orchestrator.resume import prepare_resume, resume
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain

    given = list(overrides)
    if "=" in run:
        given.insert(0, run)
        run = "last"
    if nodes is not None:
        given.append(f"cluster.nodes={nodes}")
    found = find_run(run, Path(paths_in_force().runs))
    prepared = prepare_resume(found, given, allow_upgrade=allow_upgrade)
    if as_json:
        print_json(
            {
                "run": found.name,
                "checkpoint": prepared.checkpoint.name if prepared.checkpoint else None,
                "steps_left": prepared.steps_left,
                "changes": to_plain(prepared.changes),
                "upgrades": list(prepared.upgrades),
                "is_started": not dry_run,
            }
        )
    else:
        show(prepared)
    if dry_run:
        if not as_json:
            flags = " --allow-upgrade" if allow_upgrade else ""
            print_next(f"orchestrate resume {shlex.join([reference_to(found), *given])}{flags}")
        return
    if prepared.plan.settings.cluster.device == "cuda" and not yes:
        ask_before_spending(f"start run {found.name} again?")
    resume(found, prepared, shlex.join(sys.argv))
    if wait:
        from orchestrator.follow import follow

        follow(found)
    if not as_json:
        print_next(f"orchestrate status {reference_to(found)}")


def show(prepared: "Resumption") -> None:
    """Print from where the run goes on and what changes."""
    from orchestrator.resume import notes_on
    from orchestrator.screen import print_table

    start = prepared.checkpoint.name if prepared.checkpoint else "its base"
    click.echo(f"run {prepared.status.name} goes on from {start}, {prepared.steps_left} steps left")
    if prepared.changes:
        print_table(("changes", "rule"), [(change.describe(), str(change.rule)) for change in prepared.changes])
    for upgrade in prepared.upgrades:
        click.echo(f"upgrade  {upgrade}")
    for note in notes_on(prepared):
        click.echo(f"note: {note}")
