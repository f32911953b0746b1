"""Ship a run's events to MLflow, once or until its attempts have ended: `python -m orchestrator.tracking RUN`.

Training never speaks to the tracking store: rank 0 and the supervisor append events to files, and a
shipper, the supervisor's child or `orchestrate ui`, reads them from a stored offset. Of several
shippers of a run one works and the others leave.

Measured with mlflow 3.17 on SQLite: import 2.2 s, a new store 3 s, 1000 metrics 0.2 s, and 0.6 s
where they were there already.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import OrchestrateError, TrackingError
from orchestrator.owner_lock import hold
from orchestrator.recovery import Action
from orchestrator.run_directory import RunDirectory
from orchestrator.shipment import Shipment, ShipReport
from orchestrator.tracking_store import load_mlflow, make_store, store_of, store_problem, without_password

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
POLL_SECONDS = 0.2
BUSY_SECONDS = 10.0
"""How long the last pass waits for another shipper."""


def ship(run: RunDirectory, seconds: float | None = None) -> ShipReport:
    """Send what MLflow does not have of a run, in one pass over its attempts.

    Args:
        seconds: after which the pass ends with the batch that it is at; without it, after the last event.

    Raises:
        TrackingError: the store refuses or does not answer.
        OrchestrateError: an events file is damaged; what lies before the damage has been sent.
    """
    attempts = run.attempts()
    if not any(attempt.job.exists() or attempt.events.exists() for attempt in attempts[:1]):
        return ShipReport()
    uri = store_of(run)
    with hold(run.mlflow_lock, "shipper") as other:
        if other:
            return ShipReport(is_complete=False, other_shipper=other)
        problem = store_problem(uri)
        if problem:
            raise _unreachable(run, uri, problem)
        mlflow = load_mlflow()
        from sqlalchemy.exc import SQLAlchemyError

        try:
            make_store(uri)
            return Shipment(run, uri, mlflow).send(attempts, seconds)
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
            raise _unreachable(run, uri, str(error).strip().split("\n")[0][:300]) from error


def follow(
    run: RunDirectory, until: Callable[[], bool], interval_seconds: float = INTERVAL_SECONDS
) -> ShipReport | None:
    """Ship again and again until `until()` holds, and then once more.

    A store that is away is logged and tried again.

    Returns:
        the last pass, or None where it failed.
    """
    failed = ""
    while True:
        is_last = until()
        report = None
        try:
            report = ship(run)
            if is_last and report.other_shipper:
                report = _ship_when_free(run)
            if failed:
                log.info("the tracking store answers again")
            failed = ""
        except OrchestrateError as error:
            if str(error) != failed:
                log.warning("%s", error)
            failed = str(error)
        if is_last:
            if failed or (report is not None and not report.is_complete):
                log.warning("the rest is shipped by a later attempt or by `orchestrate ui`")
            return report
        wake = time.monotonic() + interval_seconds
        while time.monotonic() < wake and not until():
            time.sleep(POLL_SECONDS)


def main(arguments: list[str] | None = None) -> int:
    """Ship a run once, or follow one of its attempts to its end."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.tracking", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--follow",
        type=int,
        metavar="ATTEMPT",
        help="ship until this attempt has ended, or one that was started after it in the same job",
    )
    parser.add_argument("--parent", type=int, default=os.getppid(), metavar="PID", help="end with this process")
    parser.add_argument("--interval", type=float, default=INTERVAL_SECONDS, metavar="SECONDS")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)sZ tracking %(levelname)s %(message)s")
    logging.Formatter.converter = time.gmtime
    run = RunDirectory(chosen.run.absolute())
    if chosen.follow is None:
        try:
            report = ship(run)
        except OrchestrateError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        print(json.dumps(dataclasses.asdict(report)))
        return 0
    # What Slurm sends to all processes of a job is for the supervisor; this one ends with the attempt.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    # A supervisor that was killed writes no outcome; its child is then somebody else's.
    last = follow(run, lambda: is_over(run, chosen.follow) or os.getppid() != chosen.parent, chosen.interval)
    if last is not None:
        log.info("MLflow has run %s", last.run_id)
    return 0


def is_over(run: RunDirectory, number: int) -> bool:
    """Return whether an attempt has ended, and was not started again in the same job."""
    newest = run.attempts()[-1]
    outcome = newest.read_outcome()
    return newest.number >= number and outcome is not None and outcome["action"] != Action.RESTART


def _ship_when_free(run: RunDirectory) -> ShipReport:
    """Ship when another shipper has left, or give up after a while."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        report = ship(run)
        if not report.other_shipper or time.monotonic() > deadline:
            return report
        time.sleep(POLL_SECONDS)


def _unreachable(run: RunDirectory, uri: str, found: str) -> TrackingError:
    return TrackingError(
        f"run {run.name} could not be shipped to {without_password(uri)}: {found}; nothing is "
        f"lost, the events stay in the run's folder. Mend the store, then `orchestrate ui` ships them"
    )


if __name__ == "__main__":
    sys.exit(main())
