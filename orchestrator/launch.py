"""Make a run's folder and submit it; cancel one. Effects, in the order in which they must happen."""

import dataclasses
from pathlib import Path

from orchestrator.changes import OF_A_BRANCH, change_problems, changes_between
from orchestrator.checkpoints import Checkpoint, checkpoint_name, files_written, foreign, write_marker
from orchestrator.config import to_yaml
from orchestrator.errors import CheckpointError, ConfigError, OrchestrateError, RunError
from orchestrator.files import file_mask, free_room, link_or_copy, new_folder, write_atomic, write_json
from orchestrator.phases import what_differs
from orchestrator.plan import TrainingPlan, read_plan, write_plan
from orchestrator.provenance import provenance, snapshot_code
from orchestrator.reconcile import ENDED
from orchestrator.retention import kept_at_most
from orchestrator.run_directory import FILE_MASK, RunDirectory, create_run, discard_run, name_taken
from orchestrator.schedule_checks import past_problems
from orchestrator.settings import RANDOM_BASE
from orchestrator.slurm.node_checks import unknown_names
from orchestrator.slurm.requests import check_folders
from orchestrator.slurm.scheduler import tell_to_end
from orchestrator.slurm.submission import UnknownSubmissionError, check_scheduler, submit
from orchestrator.status import RunStatus, read_status
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest, tokenizers_of
from orchestrator.traced_steps import unreachable_problems
from orchestrator.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """A checkpoint of another run from which a new one goes on."""

    run: RunDirectory
    checkpoint: Checkpoint


def check_start(plan: TrainingPlan, branch: BranchPoint | None = None) -> list[DatasetManifest]:
    """Check all that a launch needs, before anything is written.

    Returns:
        the manifests of the training data sets.

    Raises:
        ConfigError, RunError, SchedulerError, CheckpointError: it could not start.
    """
    runs, name = Path(plan.settings.paths.runs), plan.settings.name
    if (runs / name).exists():
        raise name_taken(runs, name)
    problems = unknown_names(plan.settings.cluster.checks)
    done = branch.checkpoint.step if branch is not None else 0
    problems += unreachable_problems(plan.settings.profile, done, plan.total_steps)
    if problems:
        raise ConfigError(f"run {name!r} cannot start; {len(problems)} to mend:", problems)
    check_scheduler(RunDirectory(runs / name), plan)
    check_folders(plan)
    manifests = check_inputs(plan, needs_base=branch is None)
    check_disk(plan, runs)
    if branch is not None:
        check_branch(plan, branch, manifests)
    return manifests


def check_branch(plan: TrainingPlan, branch: BranchPoint, manifests: list[DatasetManifest]) -> None:
    """Refuse a branch that its checkpoint does not fit.

    Raises:
        ConfigError: fields that a branch cannot change, by name, or too few tokens.
        CheckpointError: the checkpoint is of another model, tokenizer or data.
    """
    from megatron_solar.sample_request import request_of  # imports numpy

    settings, checkpoint = plan.settings, branch.checkpoint
    what = f"run {settings.name!r} cannot go on from {branch.run.name}@{checkpoint.step}"
    consumed = checkpoint.facts.consumed_samples
    fingerprint = request_of(plan).fingerprint_at(consumed)
    before = read_plan(branch.run.plan)
    is_same_data = fingerprint == checkpoint.facts.data_fingerprint
    other_data = "" if is_same_data else what_differs(before, plan, consumed, branch.run.name)
    changes = changes_between(before.settings, settings)
    refused = change_problems(changes, other_data=other_data, own_fields=OF_A_BRANCH)
    refused += past_problems(before.settings, settings, checkpoint.step)
    if refused:
        raise ConfigError(f"{what}; {len(refused)} refused:", refused)
    problems = foreign(checkpoint.facts, settings.model, manifests[0].tokenizer_sha256, fingerprint)
    if problems:
        raise CheckpointError(f"{what}:", problems)
    if plan.total_steps <= checkpoint.step:
        raise ConfigError(
            f"{what}: training.tokens={settings.training.tokens} are {plan.total_steps} steps, which it has done; "
            "give more tokens"
        )


def check_disk(plan: TrainingPlan, runs: Path, held_bytes: int = 0) -> None:
    """Refuse a run whose checkpoints have no room; a quota is not seen here, only when it is met.

    Args:
        held_bytes: what the run's checkpoints take already.

    Raises:
        ConfigError: too few bytes or inodes are free.
    """
    there = next(folder for folder in (runs, *runs.parents) if folder.exists())
    count = kept_at_most(plan.total_steps, plan.settings.checkpoint)
    free, inodes = free_room(there)
    files = count * files_written(plan.layout.world_size)
    problems = []
    needed = max(plan.checkpoint_bytes, count * plan.checkpoint_bytes - held_bytes)
    if free < needed:
        problems.append(
            f"{count} checkpoints of {format_bytes(plan.checkpoint_bytes)} at once need {format_bytes(needed)}"
            f"{' more' if held_bytes else ''}, {there} has {format_bytes(free)} free; keep fewer "
            "(checkpoint.keep_last, keep_every_steps), free space, or choose another paths.runs"
        )
    if inodes < files:
        problems.append(f"{count} checkpoints have {files} files, {there} has {inodes} inodes free")
    if problems:
        raise ConfigError(f"run {plan.settings.name!r} has no room for its checkpoints:", problems)


def check_inputs(plan: TrainingPlan, *, needs_base: bool = True) -> list[DatasetManifest]:
    """Check base and data sets before anything is written.

    Returns:
        the manifests of the training data sets.

    Raises:
        ConfigError: everything that is missing or does not fit, at once.
        DataError: `data.index` is not the index of this run.
    """
    settings = plan.settings
    problems, manifests = [], []
    is_compared = needs_base and settings.base != RANDOM_BASE and settings.training.check_tokenizer
    own_tokenizers = tokenizers_of(Path(settings.base)) if is_compared else []
    for folder in [*settings.data.training_folders, *settings.data.validation]:
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
        if own_tokenizers and manifest.tokenizer_sha256 not in own_tokenizers:
            problems.append(
                f"{folder} was made with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}) than any of "
                f"{settings.base}; tokenize with `--tokenizer {settings.base}`, or say training.check_tokenizer=false "
                "where both give the same ids"
            )
        if folder in settings.data.train:
            manifests.append(manifest)
    if needs_base and settings.base != RANDOM_BASE:
        from megatron_solar.model_folder import open_base  # imports torch

        try:
            open_base(Path(settings.base), settings.model)
        except OrchestrateError as error:
            problems.append(str(error))
    if settings.data.index and not problems:
        from megatron_solar.prebuilt_index import check_prebuilt  # imports numpy
        from megatron_solar.sample_request import request_of

        check_prebuilt(Path(settings.data.index), request_of(plan))
    if problems:
        raise ConfigError(f"run {settings.name!r} cannot start; {len(problems)} to mend:", problems)
    return manifests


def launch(plan: TrainingPlan, command: str, branch: BranchPoint | None = None) -> RunDirectory:
    """Make the run's folder and submit its job; where the submission fails no folder is left.

    Args:
        command: what the person typed, for the provenance.
        branch: what it goes on from, instead of its base.

    Raises:
        ConfigError, RunError, SchedulerError, CheckpointError: nothing was left behind.
    """
    check_start(plan, branch)
    with file_mask(FILE_MASK):
        run = create_run(Path(plan.settings.paths.runs), plan.settings.name)
        try:
            write_atomic(run.config, to_yaml(plan.settings))
            untracked = snapshot_code(run.code)
            origin = None if branch is None else {"run": str(branch.run.path), "checkpoint": branch.checkpoint.name}
            write_json(run.provenance, provenance(command, branched_from=origin, untracked_sources=untracked))
            if branch is not None:
                adopt(branch.checkpoint, run)
            write_plan(run.launched_plan, plan)
            submit(run, by="person")
        except UnknownSubmissionError:
            raise  # a job may start from the folder
        except BaseException:
            discard_run(run)
            raise
    return run


def adopt(checkpoint: Checkpoint, run: RunDirectory) -> Checkpoint:
    """Make another run's checkpoint the first of this one: by hard links, or by copies on another file system.

    So the other run may delete its own; and no file of a checkpoint is ever written to again.
    """
    path = run.checkpoint_path(checkpoint_name(checkpoint.step, 0))
    with new_folder(path) as folder:
        for name in checkpoint.files:
            link_or_copy(checkpoint.path / name, folder / name)
        own = dataclasses.replace(checkpoint.facts, attempt=0, ancestry=())
        write_marker(folder, own, checkpoint.files)
    return Checkpoint(path=path, facts=own, files=checkpoint.files)


def cancel(run: RunDirectory) -> RunStatus:
    """Ask a run to save and end; the mark is left first, so that it is never requeued.

    Raises:
        RunError: it has ended already.
    """
    status = read_status(run)
    if status.state in ENDED:
        raise RunError(f"run {run.name} has ended already: {status.state}")
    with file_mask(FILE_MASK):
        run.write_cancel_mark()
    tell_to_end(run)
    return status
