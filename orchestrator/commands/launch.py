"""`orchestrate launch`: start a run, or rehearse it first."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.request import (
    ask_before_spending,
    launch_command,
    reference_to,
    request_options,
    requested_branch,
    requested_settings,
)

if TYPE_CHECKING:
    from orchestrator.plan import TrainingPlan


@click.command(name="launch", short_help="Start a run, or rehearse it.")
@request_options
@click.option("--spare-nodes", type=click.IntRange(min=0), help="Nodes to ask for beyond those (cluster.spare_nodes).")
@click.option("--partition", help="Slurm's partition (cluster.partition).")
@click.option("--time", "time_limit", metavar="H:MM:SS", help="Time limit of one job (cluster.time_limit).")
@click.option("--from", "from_checkpoint", metavar="RUN[@STEP]", help="Go on from another run's checkpoint.")
@click.option("--profile", metavar="FIRST-LAST", help="Steps to trace with torch's profiler (profile.steps).")
@click.option("--profile-ranks", metavar="R,R", help="Ranks to trace (profile.ranks).  [default: 0]")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan, start nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before GPU hours are spent.")
@click.option("--wait", is_flag=True, help="Show progress until the run ends; leaving with Ctrl-C does not end it.")
@click.option("--rehearse", is_flag=True, help="The very launch with a toy on CPU ranks, on a Slurm of its own here.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="CPU ranks a node of a rehearsal.  [default: 1]")
@click.option("--steps", type=click.IntRange(min=2), help="Steps of a rehearsal.  [default: 10]")
@click.option("--faithful", is_flag=True, help="Rehearse with ranks that Slurm starts itself; slower.")
@click.option("--on-cluster", is_flag=True, help="Rehearse on CPU nodes of the site's own Slurm.")
@click.option("--json", "as_json", is_flag=True, help="Print what a rehearsal did as JSON.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int | None,
    spare_nodes: int | None,
    partition: str | None,
    time_limit: str | None,
    from_checkpoint: str | None,
    profile: str | None,
    profile_ranks: str | None,
    dry_run: bool,
    yes: bool,
    wait: bool,
    rehearse: bool,
    ranks_per_node: int | None,
    steps: int | None,
    faithful: bool,
    on_cluster: bool,
    as_json: bool,
) -> None:
    """Start a run of RECIPE: check base and data, show the plan, ask, submit.

    RECIPE is a name in conf/recipe or the path of a YAML file; OVERRIDES read section.field=value.
    With --from the run goes on from a checkpoint of another one, with that run's settings unless a
    RECIPE is given, and the other run stays as it is. The run goes on by itself; `orchestrate status
    last` tells where it stands.

    With --rehearse the same launch runs on this machine before it costs anything: a real Slurm of as
    many nodes, the same layout, supervisor and tracking, a toy model on CPU ranks; it saves, loses a
    node, and goes on. Data and base are made where they are not given.
    """
    from megatron_solar.lineage import has_evaluation
    from orchestrator.commands.plan import show_plan
    from orchestrator.launch import check_start, launch
    from orchestrator.plan import make_plan
    from orchestrator.screen import notice, print_facts, print_next
    from orchestrator.settings import RANDOM_BASE
    from orchestrator.units import format_count

    chosen = {"spare_nodes": spare_nodes, "partition": partition, "time_limit": time_limit}
    overrides = (*overrides, *(f"cluster.{name}={value}" for name, value in chosen.items() if value is not None))
    if profile_ranks is not None and profile is None:
        raise click.UsageError("--profile-ranks needs --profile, the steps to trace; add that, or leave it away")
    overrides += (f"profile.steps={profile}",) if profile is not None else ()
    overrides += (f"profile.ranks=[{profile_ranks}]",) if profile_ranks is not None else ()
    for_rehearsals = {"--ranks-per-node": ranks_per_node, "--steps": steps, "--faithful": faithful,
                      "--on-cluster": on_cluster, "--json": as_json}  # fmt: skip
    misplaced = [name for name, value in for_rehearsals.items() if value]
    if misplaced and not rehearse:
        raise click.UsageError(f"{misplaced[0]} is for --rehearse; add that, or leave it away")
    if rehearse:
        if from_checkpoint is not None:
            raise click.UsageError("--rehearse starts from a base of its own size; leave --from away")
        from orchestrator.commands.rehearse import run_rehearsal
        from orchestrator.rehearsal_run import RehearsalRequest

        request = RehearsalRequest(
            ranks_per_node=ranks_per_node or 1, steps=steps or 10, is_faithful=faithful, on_cluster=on_cluster
        )
        run_rehearsal(recipe, overrides, nodes, request, is_dry=dry_run, as_json=as_json)
        return
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
    elif settings.base != RANDOM_BASE and not has_evaluation(Path(settings.base)):
        notice("the base has no recorded loss to compare the first one with; `orchestrate upscale --evaluate TEXT` "
               "records one")  # fmt: skip
    if dry_run:
        show_environment(plan)
        if plan.settings.cluster.scheduler == "slurm":
            from orchestrator.run_directory import RunDirectory
            from orchestrator.slurm.ranks import srun_line
            from orchestrator.slurm.submission import sbatch_script

            folder = RunDirectory(Path(plan.settings.paths.runs) / plan.settings.name)
            click.echo(f"\nwould be submitted:\n\n{sbatch_script(folder, plan).rstrip()}\n")
            click.echo(f"once its nodes are checked, that starts the ranks by:\n\n{srun_line(folder, plan)}\n")
        print_next(launch_command(recipe, overrides, nodes, from_checkpoint))
        return
    if plan.settings.cluster.device == "cuda" and not yes:
        ask_before_spending("start it?")
    run = launch(plan, shlex.join(sys.argv), branch)
    print_facts("", [("run", str(run.path))])
    record = run.submissions()[-1]
    if record["scheduler"] == "slurm":
        print_facts("", [("job", record["job_id"])])
        if record.get("may_requeue") is False:
            click.echo("this site starts no job again: at the end of each the run goes on in a successor", err=True)
    if wait:
        from orchestrator.follow import follow

        follow(run)
    print_next(f"orchestrate status {reference_to(run)}")


def show_environment(plan: "TrainingPlan") -> None:
    """Print the variables that the ranks get because of layout, precision and site, each with its reason."""
    from orchestrator.gpu_environment import rank_variables
    from orchestrator.screen import print_table

    variables = rank_variables(plan.settings, plan.layout)
    if variables:
        click.echo()
        print_table(
            ("the ranks' environment", "value", "why"),
            [(each.name, each.value or "(unset)", each.why) for each in variables],
        )
