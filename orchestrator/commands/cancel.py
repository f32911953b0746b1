"""`orchestrate cancel`: end a run, saving first."""

from pathlib import Path

import click

from orchestrator.commands.request import reference_to


@click.command(name="cancel", short_help="End a run, saving first.")
@click.argument("run", default="last")
def command(run: str) -> None:
    """End RUN: its ranks save at the next step and leave, and it is not started again."""
    from orchestrator.config import paths_in_force
    from orchestrator.launch import cancel
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_next

    found = find_run(run, Path(paths_in_force().runs))
    status = cancel(found)
    click.echo(f"told run {found.name} to save and end, at step {status.step} of {status.total_steps}")
    print_next(f"orchestrate status {reference_to(found)}")
