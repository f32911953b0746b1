"""What `plan` and `launch` have in common: a recipe, overrides, nodes."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
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

    given = list(overrides)
    if "=" in recipe:
        given.insert(0, recipe)
        named = [word for word in given if "=" not in word]
        recipe = named[0] if named else DEFAULT_RECIPE
        given = [word for word in given if word not in named[:1]]
    if nodes is not None:
        given.append(f"cluster.nodes={nodes}")
    return compose(recipe, given)


def launch_command(recipe: str, overrides: Sequence[str], nodes: int | None) -> str:
    """Return the command that launches a request."""
    return f"orchestrate launch {shlex.join([recipe, *overrides])}" + (f" --nodes {nodes}" if nodes else "")


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
