"""What `plan` and `launch` have in common: a recipe, overrides, nodes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from orchestrator.settings import RunSettings

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_RECIPE = "solar-10.7b"


def request_options(function: F) -> F:
    """Add RECIPE, OVERRIDES and --nodes to a command."""
    function = click.option("--nodes", type=click.IntRange(min=1), help="Nodes to run on (cluster.nodes).")(function)
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")(function)
    return click.argument("recipe", default=DEFAULT_RECIPE, metavar=f"[RECIPE={DEFAULT_RECIPE}]")(function)


def requested_settings(recipe: str, overrides: Sequence[str], nodes: int | None) -> "RunSettings":
    """Return the checked settings of a request; a first word with an `=` is an override, not a recipe."""
    from orchestrator.config import compose

    given = list(overrides)
    if "=" in recipe:
        given.insert(0, recipe)
        recipe = DEFAULT_RECIPE
    if nodes is not None:
        given.append(f"cluster.nodes={nodes}")
    return compose(recipe, given)
