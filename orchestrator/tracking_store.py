"""Where a run's tracking store is, whether it answers, and the only import of mlflow."""

import contextlib
import functools
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
import warnings
from pathlib import Path
from types import ModuleType

from orchestrator.files import read_json
from orchestrator.run_directory import RunDirectory

REQUEST_SECONDS = 10
QUIET_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}
"""For every process of MLflow."""


def store_of(run: RunDirectory) -> str:
    """Return the address of a run's tracking store."""
    settings = read_json(run.plan).get("settings", {})
    return settings.get("tracking", {}).get("uri") or default_store(Path(settings["paths"]["runs"]))


def default_store(runs: Path) -> str:
    """Return the address of the SQLite file beside a folder of runs."""
    return f"sqlite:///{runs.resolve().parent / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, or None for another store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_location(uri: str) -> str | None:
    """Return where MLflow may keep files for a SQLite store; by default it were the folder of the caller."""
    path = sqlite_path(uri)
    return None if path is None else (path.parent / "mlflow-artifacts").absolute().as_uri()


def store_problem(uri: str) -> str:
    """Return why a store cannot be used, or nothing. Quick, where mlflow itself would try for minutes.

    Makes the folder of a SQLite file; `make_store` makes the file.
    """
    path = sqlite_path(uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                tempfile.TemporaryFile(dir=path.parent).close()
                return ""
            with contextlib.closing(sqlite3.connect(path, timeout=REQUEST_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
        except (OSError, sqlite3.Error) as error:
            return str(error)
    elif uri.startswith(("http://", "https://")):
        import urllib.error  # 50 ms, which no other use of this module needs
        import urllib.request

        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REQUEST_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()  # it answers; a proxy need not know /health
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))
    return ""


def make_store(uri: str) -> None:
    """Make the SQLite file of an address, whole or not at all, unless it is there; 3 s, of which MLflow takes all.

    MLflow makes its tables in place and step by step: ended within, as a shipper is when its job's time is over, it
    leaves a file that it can neither use nor mend (seen in 5 kills of 11, mlflow 3.17).

    Raises:
        OSError: the file cannot be written.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    mlflow = load_mlflow()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with tempfile.TemporaryDirectory(prefix="orchestrate-store-") as folder:
        made = Path(folder) / path.name
        mlflow.MlflowClient(f"sqlite:///{made}").search_experiments()
        try:
            shutil.copyfile(made, part)
            with contextlib.suppress(FileExistsError):  # another made it meanwhile
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)


def without_password(uri: str) -> str:
    """Return an address as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


@functools.cache
def load_mlflow() -> ModuleType:
    """Import mlflow, with short patience and a quiet screen."""
    os.environ.update(
        QUIET_ENVIRONMENT,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
        MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR="1",
        MLFLOW_HTTP_REQUEST_TIMEOUT=str(REQUEST_SECONDS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    loaded: ModuleType = mlflow
    return loaded
