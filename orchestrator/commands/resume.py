"""`orchestrate resume`: go on with a run that ended."""

from pathlib import Path

import click

from orchestrator.commands.request import ask_before_spending, reference_to


@click.command(name="resume", short_help="Go on with a run that ended.")
@click.argument("run", default="last")
@click.option("--yes", is_flag=True, help="Do not ask before GPU hours are spent.")
@click.option("--wait", is_flag=True, help="Show progress until the run ends.")
def command(run: str, yes: bool, wait: bool) -> None:
    """Go on with RUN from its newest complete checkpoint, in a new job with the same plan and code."""
    from orchestrator.config import paths_in_force
    from orchestrator.launch import resume
    from orchestrator.plan import read_plan
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_next

    found = find_run(run, Path(paths_in_force().runs))
    if read_plan(found.plan).settings.cluster.device == "cuda" and not yes:
        ask_before_spending(f"start run {found.name} again?")
    status = resume(found)
    start = status.last_checkpoint or "its base"
    click.echo(
        f"run {found.name} goes on from {start}, {status.total_steps - (status.last_checkpoint_step or 0)} steps left"
    )
    if wait:
        from orchestrator.follow import follow

        follow(found)
    print_next(f"orchestrate status {reference_to(found)}")
