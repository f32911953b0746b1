"""`orchestrate ui`: ship what is pending, then serve MLflow's run browser on this machine's own address.

MLflow's server has no log-in of its own, so that it is bound to 127.0.0.1 only; from elsewhere it is
reached through ssh, and the line for that is printed.
"""

import getpass
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import click

from orchestrator.errors import ConfigError, OrchestrateError, TrackingError
from orchestrator.files import read_json
from orchestrator.run_directory import RunDirectory, find_run, list_runs
from orchestrator.tracking_store import (
    QUIET_ENVIRONMENT,
    artifact_location,
    default_store,
    make_store,
    store_of,
    store_problem,
    without_password,
)

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 5000
PORTS_TRIED = 20
SHIP_SECONDS = 30.0
START_SECONDS = 120.0
STOP_SECONDS = 5.0
ON_CHARTS = "workflowType=machine_learning"
"""Without it MLflow opens on pages for language-model applications."""


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port to serve on.  [default: 5000, or the next free one]")
@click.option("--run", "reference", metavar="RUN", help="Open on this run, from its own store.")
@click.option("--print-url", is_flag=True, help="Print the address that would be opened, and leave.")
def command(port: int | None, reference: str | None, print_url: bool) -> None:
    """Open the run browser.

    Sends the events that MLflow does not have yet, then serves MLflow on 127.0.0.1 until Ctrl-C.
    """
    from orchestrator.config import paths_in_force

    folder = Path(paths_in_force().runs)
    runs = [find_run(reference, folder)] if reference else list(list_runs(folder))
    uri = store_of(runs[0]) if reference else default_store(folder)
    is_served_elsewhere = uri.startswith(("http://", "https://"))
    if print_url:
        base = uri.rstrip("/") if is_served_elsewhere else f"http://{ADDRESS}:{port or DEFAULT_PORT}"
        click.echo(_page(base, _shown(runs, uri), reference is not None))
        return
    chosen = 0 if is_served_elsewhere else _free_port(port)
    _ship_pending(runs)
    shown = _shown(runs, uri)
    if shown is None and not reference:
        click.echo(f"no run in {folder} has been tracked yet; start one with `orchestrate demo`", err=True)
    if is_served_elsewhere:
        click.echo(_page(uri.rstrip("/"), shown, reference is not None))
        click.echo("that server serves it; there is nothing to start here", err=True)
        return
    click.echo(f"starting MLflow for {without_password(uri)} ...", err=True)
    problem = store_problem(uri)
    if problem:
        raise TrackingError(f"the tracking store {without_password(uri)} cannot be used: {problem}")
    make_store(uri)
    _serve(uri, chosen, _page(f"http://{ADDRESS}:{chosen}", shown, reference is not None))


def _shown(runs: list[RunDirectory], uri: str) -> RunDirectory | None:
    """Return the newest run that is in a store."""
    return next((run for run in runs if run.mlflow.exists() and read_json(run.mlflow).get("uri") == uri), None)


def _page(base: str, run: RunDirectory | None, is_for_run: bool) -> str:
    """Return the address of a run, of its experiment, or of all experiments."""
    page = f"{base}/#/experiments"
    if run is not None:
        record = read_json(run.mlflow)
        page += f"/{record['experiment_id']}/runs" + (f"/{record['run_id']}" if is_for_run else "")
    return f"{page}?{ON_CHARTS}"


def _free_port(wanted: int | None) -> int:
    """Return the port asked for, or else the first free one from 5000 on, said where it is another."""
    if wanted is not None:
        if not _is_free(wanted):
            raise ConfigError(f"port {wanted} of {ADDRESS} is taken; name another with --port, or leave --port away")
        return wanted
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        if _is_free(port):
            if port != DEFAULT_PORT:
                click.echo(f"port {DEFAULT_PORT} is taken; using {port}", err=True)
            return port
    raise ConfigError(f"ports {DEFAULT_PORT} to {port} of {ADDRESS} are taken; name a free one with --port")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def _ship_pending(runs: list[RunDirectory]) -> None:
    """Ship all runs for a bounded time; a run that cannot be shipped is said and keeps no other back."""
    from orchestrator.tracking import ship

    deadline = time.monotonic() + SHIP_SECONDS
    if runs:
        click.echo(f"shipping pending events of {len(runs)} run{'s' if len(runs) > 1 else ''} ...", err=True)
    for index, run in enumerate(runs):
        left = deadline - time.monotonic()
        if left <= 0:
            click.echo(f"{len(runs) - index} runs wait for the next `orchestrate ui`: the time is over", err=True)
            return
        try:
            report = ship(run, seconds=left)
        except OrchestrateError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            continue
        if report.other_shipper:
            click.echo(f"{run.name}: is being shipped by {report.other_shipper}", err=True)
        elif report.events:
            rest = "" if report.is_complete else "; the rest with the next `orchestrate ui`"
            click.echo(f"{run.name}: {report.events} events shipped{rest}", err=True)


def _serve(uri: str, port: int, page: str) -> None:
    """Run MLflow's server until this process is told to end; no child is left."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with tempfile.TemporaryFile() as output:
        # In a session of its own: Ctrl-C comes to this process, which ends the whole group.
        server = subprocess.Popen(
            _server_command(uri, port),
            env={**os.environ, **QUIET_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            _wait_until_ready(server, port, output)
            click.echo(
                f"from another machine: ssh -L {port}:{ADDRESS}:{port} "
                f"{getpass.getuser()}@{socket.gethostname()}\nCtrl-C ends it",
                err=True,
            )
            click.echo(page)  # last: who has read it may count on the rest
            server.wait()
            raise TrackingError(f"MLflow's server ended with {server.returncode}:\n{_tail(output)}")
        except KeyboardInterrupt:
            click.echo("the run browser has ended", err=True)
        finally:
            _end(server)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _server_command(uri: str, port: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", ADDRESS, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--no-serve-artifacts", "--uvicorn-opts", "--log-level=warning"]
    location = artifact_location(uri)
    return command if location is None else [*command, "--default-artifact-root", location]


def _wait_until_ready(server: "subprocess.Popen[bytes]", port: int, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackingError(f"MLflow's server ended with {server.returncode} at its start:\n{_tail(output)}")
        try:
            with urllib.request.urlopen(f"http://{ADDRESS}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TrackingError(f"MLflow's server did not answer within {START_SECONDS:.0f} s:\n{_tail(output)}")


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace").strip()[-2000:]


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server's whole process group and wait for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    server.wait()
