"""`orchestrate doctor`: the report of this machine, as a screen or as JSON."""

import dataclasses
import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def command(as_json: bool) -> None:
    """Say what works on this machine, what does not, and the remedy.

    Exit code 0 where `orchestrate demo` can work, 1 otherwise.
    """
    from orchestrator.doctor import can_demo, examine, places_in_force, render

    places = places_in_force()
    click.echo("looking; the libraries take some seconds to load ...", err=True)
    findings = examine(places)
    works = can_demo(findings)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"can_demo": works, "checks": rows}, indent=2))
    else:
        click.echo(render(findings))
    if not works:
        sys.exit(1)  # click's own exit is swallowed where the group is not standalone
