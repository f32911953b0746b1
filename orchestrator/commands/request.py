"""What several commands are asked for: a recipe, overrides, nodes, a run, a checkpoint of a run."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from orchestrator.checkpoints import Checkpoint
    from orchestrator.launch import BranchPoint
    from orchestrator.run_directory import RunDirectory
    from orchestrator.settings import RunSettings

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_RECIPE = "solar-10.7b"


def request_options(function: F) -> F:
    """Add RECIPE, OVERRIDES and --nodes to a command."""
    function = click.option("--nodes", type=click.IntRange(min=1), help="Nodes to run on (cluster.nodes).")(function)
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")(function)
    return click.argument("recipe", default=DEFAULT_RECIPE, metavar=f"[RECIPE={DEFAULT_RECIPE}]")(function)


def requested_settings(recipe: str, overrides: Sequence[str], nodes: int | None) -> "RunSettings":
    """Return the checked settings of a request; of its words the one without an `=` is the recipe."""
    from orchestrator.config import compose
    from orchestrator.named_layers import with_layers_named

    named, given = request_words(recipe, overrides, nodes)
    return with_layers_named(compose(named or DEFAULT_RECIPE, given))


def requested_branch(
    reference: str, recipe: str, overrides: Sequence[str], nodes: int | None
) -> "tuple[BranchPoint, RunSettings]":
    """Return where a run goes on from, and its settings: those of the other run, or of a recipe that was named."""
    from orchestrator.config import compose, recompose
    from orchestrator.launch import BranchPoint
    from orchestrator.named_layers import with_layers_named
    from orchestrator.plan import read_plan

    run, checkpoint = requested_checkpoint(reference)
    source = click.get_current_context().get_parameter_source("recipe")
    is_named = source is not None and source.name != "DEFAULT"
    named, given = request_words(recipe if is_named else "", overrides, nodes)
    if named:
        return BranchPoint(run=run, checkpoint=checkpoint), with_layers_named(compose(named, given))
    own_name = [f"name={run.name}-from-{checkpoint.step}"]
    settings = recompose(read_plan(run.plan).settings, [*own_name, *given])
    return BranchPoint(run=run, checkpoint=checkpoint), with_layers_named(settings)


def request_words(recipe: str, overrides: Sequence[str], nodes: int | None) -> tuple[str, list[str]]:
    """Return the recipe, or nothing where none was named, and the overrides of a request's words."""
    given = [word for word in (recipe, *overrides) if word]
    named = [word for word in given if "=" not in word][:1]
    given = [word for word in given if word not in named]
    if nodes is not None:
        given.append(f"cluster.nodes={nodes}")
    return (named[0] if named else ""), given


def requested_checkpoint(reference: str) -> "tuple[RunDirectory, Checkpoint]":
    """Return a run and its checkpoint from `RUN` or `RUN@STEP`; the newest complete one without a step.

    Raises:
        UsageError: what follows the @ is no step.
        RunError, CheckpointError: there is none.
    """
    from orchestrator.checkpoints import choose_checkpoint
    from orchestrator.config import paths_in_force
    from orchestrator.run_directory import find_run

    name, at, step = reference.rpartition("@") if not Path(reference).is_dir() else (reference, "", "")
    if not at:
        name, step = reference, ""
    digits = step.removeprefix("step_").split(".")[0]
    if at and not (digits.isascii() and digits.isdigit()):
        raise click.UsageError(f"{reference!r} should read RUN or RUN@STEP, such as last@1200")
    run = find_run(name, Path(paths_in_force().runs))
    return run, choose_checkpoint(run, int(digits) if digits else None)


def launch_command(recipe: str, overrides: Sequence[str], nodes: int | None, from_checkpoint: str | None = None) -> str:
    """Return the command that launches a request."""
    words = [recipe, *overrides]
    if from_checkpoint is not None:
        words = [f"--from={from_checkpoint}", *(word for word in words if word != DEFAULT_RECIPE)]
    return f"orchestrate launch {shlex.join(words)}" + (f" --nodes {nodes}" if nodes else "")


def reference_to(run: "RunDirectory") -> str:
    """Return what names a run on the command line: its name, or its path where it is not among the others."""
    from orchestrator.config import paths_in_force

    is_known = run.path.parent.resolve() == Path(paths_in_force().runs).resolve()
    return run.name if is_known else shlex.quote(str(run.path))


def ask_before_spending(question: str) -> None:
    """Ask before GPU hours are spent.

    Raises:
        RunError: the answer was no, or there is nobody to answer.
    """
    from orchestrator.errors import RunError

    try:
        if click.confirm(question, err=True):
            return
    except click.Abort:
        click.echo(err=True)
    raise RunError("nothing was started, for the answer was not yes; --yes starts without asking")
