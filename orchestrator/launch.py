"""Make a run's folder and submit it; resume and cancel one. Effects, in the order in which they must happen."""

import getpass
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import orchestrator
from orchestrator.config import to_yaml
from orchestrator.errors import ConfigError, OrchestrateError, RunError
from orchestrator.files import write_atomic, write_json
from orchestrator.plan import TrainingPlan, read_plan, write_plan
from orchestrator.reconcile import ENDED, State
from orchestrator.run_directory import RunDirectory, create_run, discard_run, name_taken
from orchestrator.settings import RANDOM_BASE
from orchestrator.slurm.scheduler import tell_to_end
from orchestrator.slurm.submission import check_scheduler, submit
from orchestrator.status import RunStatus, read_status
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest
from orchestrator.version import VERSION

CODE_PACKAGES = ("orchestrator", "megatron_solar")
RECORDED_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "safetensors",
    "submitit",
    "mlflow",
    "omegaconf",
)


def check_start(plan: TrainingPlan) -> list[DatasetManifest]:
    """Check all that a launch needs, before anything is written.

    Returns:
        the manifests of the training data sets.

    Raises:
        ConfigError, RunError, SchedulerError: it could not start.
    """
    check_scheduler(plan)
    runs, name = Path(plan.settings.paths.runs), plan.settings.name
    if (runs / name).exists():
        raise name_taken(runs, name)
    return check_inputs(plan)


def check_inputs(plan: TrainingPlan, *, needs_base: bool = True) -> list[DatasetManifest]:
    """Check base and data sets before anything is written.

    Returns:
        the manifests of the training data sets.

    Raises:
        ConfigError: everything that is missing or does not fit, at once.
    """
    settings = plan.settings
    problems, manifests = [], []
    for folder in [*settings.data.train, *settings.data.validation]:
        try:
            manifest = read_manifest(Path(folder))
        except OrchestrateError as error:
            problems.append(str(error))
            continue
        if manifest.vocab_size > settings.model.vocab_size:
            problems.append(
                f"{folder} was made with {manifest.vocab_size} ids, the model knows {settings.model.vocab_size}; "
                "tokenize with the model's own tokenizer"
            )
        if folder in settings.data.train:
            manifests.append(manifest)
    if needs_base and settings.base != RANDOM_BASE:
        from megatron_solar.model_folder import open_base  # imports torch

        try:
            open_base(Path(settings.base), settings.model)
        except OrchestrateError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"run {settings.name!r} cannot start; {len(problems)} to mend:", problems)
    return manifests


def launch(plan: TrainingPlan, command: str) -> RunDirectory:
    """Make the run's folder and submit its job; where the submission fails no folder is left.

    Args:
        command: what the person typed, for the provenance.

    Raises:
        ConfigError, RunError, SchedulerError: nothing was left behind.
    """
    check_start(plan)
    run = create_run(Path(plan.settings.paths.runs), plan.settings.name)
    try:
        write_atomic(run.config, to_yaml(plan.settings))
        snapshot_code(run)
        write_json(run.provenance, provenance(command))
        write_plan(run.plan, plan)
        submit(run, by="person")
    except BaseException:
        discard_run(run)
        raise
    return run


def resume(run: RunDirectory) -> RunStatus:
    """Submit a run that ended once more; it goes on from its newest checkpoint.

    Raises:
        RunError: it has not ended, or there is nothing left to do.
        ConfigError: the data sets are not what they were, or not there.
        SchedulerError: the job could not be submitted.
    """
    status = read_status(run)
    if status.state == State.FINISHED:
        raise RunError(f"run {run.name} has done all its {status.total_steps} steps; export it with "
                       f"`orchestrate export {run.name} --output DIR`")  # fmt: skip
    if status.state not in ENDED:
        raise RunError(
            f"run {run.name} is {status.state}; cancel it first, or follow it with `orchestrate logs {run.name}`"
        )
    plan = read_plan(run.plan)
    check_scheduler(plan)
    check_inputs(plan, needs_base=status.last_checkpoint is None)
    run.cancel_mark.unlink(missing_ok=True)
    submit(run, by="person")
    return status


def cancel(run: RunDirectory) -> RunStatus:
    """Ask a run to save and end; the mark is left first, so that it is never requeued.

    Raises:
        RunError: it has ended already.
    """
    status = read_status(run)
    if status.state in ENDED:
        raise RunError(f"run {run.name} has ended already: {status.state}")
    run.write_cancel_mark()
    tell_to_end(run)
    return status


def snapshot_code(run: RunDirectory) -> None:
    """Copy the sources of this project into the run, so that a later edit never reaches it."""
    root = Path(orchestrator.__file__).parent.parent
    for package in CODE_PACKAGES:
        for folder, _, names in os.walk(root / package, followlinks=True):
            for name in names:
                if name.endswith(".py"):
                    source = Path(folder) / name
                    target = run.code / source.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


def provenance(command: str) -> dict[str, object]:
    """Return who launched what, when and with which versions; no environment, no secrets."""
    return {
        "command": command,
        "time": time.time(),
        "host": socket.gethostname(),
        "user": _user(),
        "folder": str(Path.cwd()),
        "orchestrate": VERSION,
        "git": _git_state(Path(orchestrator.__file__).parent.parent),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def _user() -> str:
    """Return the user's name, or the number where a container knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, object] | None:
    """Return commit and whether files differ from it, or None outside a checkout."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "is_changed": bool(git("status", "--porcelain"))}
