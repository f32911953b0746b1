"""`orchestrate launch`: start a run."""

import shlex
import sys
from pathlib import Path

import click

from orchestrator.commands.request import (
    ask_before_spending,
    launch_command,
    reference_to,
    request_options,
    requested_branch,
    requested_settings,
)


@click.command(name="launch", short_help="Start a run.")
@request_options
@click.option("--from", "from_checkpoint", metavar="RUN[@STEP]", help="Go on from another run's checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan, start nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before GPU hours are spent.")
@click.option("--wait", is_flag=True, help="Show progress until the run ends; leaving with Ctrl-C does not end it.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int | None,
    from_checkpoint: str | None,
    dry_run: bool,
    yes: bool,
    wait: bool,
) -> None:
    """Start a run of RECIPE: check base and data, show the plan, ask, submit.

    RECIPE is a name in conf/recipe or the path of a YAML file; OVERRIDES read section.field=value.
    With --from the run goes on from a checkpoint of another one, with that run's settings unless a
    RECIPE is given, and the other run stays as it is. The run goes on by itself; `orchestrate status
    last` tells where it stands.
    """
    from orchestrator.commands.plan import show_plan
    from orchestrator.launch import check_start, launch
    from orchestrator.plan import make_plan
    from orchestrator.screen import print_facts, print_next
    from orchestrator.units import format_count

    branch = None
    if from_checkpoint is None:
        settings = requested_settings(recipe, overrides, nodes)
    else:
        branch, settings = requested_branch(from_checkpoint, recipe, overrides, nodes)
    plan = make_plan(settings)
    manifests = check_start(plan, branch)
    show_plan(plan)
    tokens = sum(manifest.tokens for manifest in manifests)
    if tokens:
        print_facts("", [("data set", f"{format_count(tokens)} tokens, read {plan.total_tokens / tokens:.2f} times")])
    if branch is not None:
        print_facts("", [("goes on from", f"{branch.run.name}, {branch.checkpoint.name}")])
    if dry_run:
        if plan.settings.cluster.scheduler == "slurm":
            from orchestrator.run_directory import RunDirectory
            from orchestrator.slurm.submission import sbatch_script

            folder = RunDirectory(Path(plan.settings.paths.runs) / plan.settings.name)
            click.echo(f"\nwould be submitted:\n\n{sbatch_script(folder, plan).rstrip()}\n")
        print_next(launch_command(recipe, overrides, nodes, from_checkpoint))
        return
    if plan.settings.cluster.device == "cuda" and not yes:
        ask_before_spending("start it?")
    run = launch(plan, shlex.join(sys.argv), branch)
    print_facts("", [("run", str(run.path))])
    if wait:
        from orchestrator.follow import follow

        follow(run)
    print_next(f"orchestrate status {reference_to(run)}")
