"""Go on with a run that ended: what it may change, checked before anything is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.changes import Change, change_problems, changes_between
from orchestrator.checkpoints import Checkpoint, complete_checkpoints, foreign, lost_checkpoints
from orchestrator.checks import settings_problems
from orchestrator.config import recompose, to_yaml
from orchestrator.errors import CheckpointError, ConfigError, DataError, RunError
from orchestrator.files import file_mask, new_folder, read_json, write_atomic, write_json
from orchestrator.fp8_rules import fp8_warnings
from orchestrator.launch import check_disk, check_inputs
from orchestrator.named_layers import with_layers_named
from orchestrator.phases import planned_phases, what_differs
from orchestrator.plan import TrainingPlan, make_plan, read_plan, write_plan
from orchestrator.provenance import provenance, snapshot_code, upgrades_since
from orchestrator.reconcile import ENDED, State
from orchestrator.run_directory import CODE, CONFIG, FILE_MASK, PLAN, PROVENANCE, RunDirectory
from orchestrator.schedule_checks import past_problems
from orchestrator.settings import Rule
from orchestrator.slurm.submission import UnknownSubmissionError, check_scheduler, submit
from orchestrator.status import RunStatus, read_status
from orchestrator.traced_steps import unreachable_problems

if TYPE_CHECKING:
    from megatron_solar.sample_request import SampleRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumption:
    """What a resume would do."""

    status: RunStatus
    plan: TrainingPlan
    checkpoint: Checkpoint | None
    """From which it goes on; None is the base."""
    changes: tuple[Change, ...]
    number: int
    """Of this resume among the run's, as it was when all this was checked."""
    upgrades: tuple[str, ...]
    """Packages that differ from the first attempt's, allowed by the person."""

    @property
    def steps_left(self) -> int:
        """Steps from the checkpoint to the end."""
        return self.plan.total_steps - (self.checkpoint.step if self.checkpoint else 0)


def prepare_resume(run: RunDirectory, overrides: Sequence[str] = (), *, allow_upgrade: bool = False) -> Resumption:
    """Check all that a resume needs; nothing is written.

    Raises:
        RunError: the run has not ended, there is nothing left to do, or packages differ.
        ConfigError: changes that are refused, by name; base or data that are missing.
        CheckpointError: the newest checkpoint is of another model, tokenizer or data.
        SchedulerError: the scheduler is not here.
    """
    number = len(run.resumes()) + 1
    status = read_status(run)
    before = read_plan(run.plan)
    settings = with_layers_named(recompose(before.settings, overrides, is_checked=False))
    changes = changes_between(before.settings, settings)
    existing = complete_checkpoints(run)
    lost = lost_checkpoints(run)
    if lost and status.state in ENDED:
        raise CheckpointError(lost)
    checkpoint = existing[-1] if existing else None
    unsound = settings_problems(settings)
    plan = make_plan(settings) if changes and not unsound else before
    other_data = _other_data(before, plan, checkpoint, run.name) if checkpoint is not None else ""
    problems = [*change_problems(changes, other_data=other_data), *unsound]
    if checkpoint is not None and not problems:
        problems = past_problems(before.settings, settings, checkpoint.step)
    if problems:
        raise ConfigError(f"run {run.name} cannot be resumed so; {len(problems)} to mend:", problems)
    if status.state == State.FINISHED and (checkpoint is None or checkpoint.step >= plan.total_steps):
        raise RunError(
            f"run {run.name} has done all its {status.total_steps} steps; export it with `orchestrate export "
            f"{run.name} --output DIR`, or prolong it with `orchestrate resume {run.name} tokens=...`"
        )
    if status.state not in ENDED:
        raise RunError(
            f"run {run.name} is {status.state}; cancel it first, or follow it with `orchestrate logs {run.name}`"
        )
    if any(change.field.startswith("profile.") for change in changes):
        done = checkpoint.step if checkpoint is not None else 0
        problems = unreachable_problems(settings.profile, done, plan.total_steps)
        if problems:
            raise ConfigError(f"run {run.name} cannot be resumed so:", problems)
    check_scheduler(run, plan)
    check_inputs(plan, needs_base=checkpoint is None)
    if checkpoint is not None:
        if plan.total_steps <= checkpoint.step:
            raise RunError(
                f"run {run.name} has done {checkpoint.step} steps already, training.tokens="
                f"{plan.settings.training.tokens} are {plan.total_steps}; give more"
            )
        request = _request(plan)
        fingerprint = request.fingerprint_at(checkpoint.facts.consumed_samples)
        problems = foreign(checkpoint.facts, plan.settings.model, request.tokenizer_sha256, fingerprint)
        if problems:
            raise CheckpointError(f"checkpoint {checkpoint.name} is not of this run's model and data:", problems)
    check_disk(plan, run.path, sum(checkpoint.size_bytes for checkpoint in existing))
    recorded = run.code.parent / PROVENANCE  # beside the code in force
    upgrades = upgrades_since(read_json(recorded)) if recorded.exists() else []
    if upgrades and not allow_upgrade:
        raise RunError(
            f"run {run.name} was begun with other versions; put them back, or say --allow-upgrade to go on with "
            "these and with today's code:",
            upgrades,
        )
    return Resumption(
        status=status,
        plan=plan,
        checkpoint=checkpoint,
        changes=tuple(changes),
        number=number,
        upgrades=tuple(upgrades),
    )


def resume(run: RunDirectory, prepared: Resumption, command: str) -> None:
    """Record a resume and submit the run; where the submission fails nothing is left of it.

    Raises:
        RunError: somebody else has resumed it since it was checked.
        SchedulerError: the job could not be submitted.
    """
    with file_mask(FILE_MASK):
        run.resumes_folder.mkdir(exist_ok=True)
        folder = run.resumes_folder / f"{prepared.number:04d}"
        if folder.exists():
            raise RunError(f"run {run.name} was resumed meanwhile; see `orchestrate status {run.name}`")
        with new_folder(folder) as order:
            changes = [
                {"field": c.field, "before": c.before, "after": c.after, "rule": c.rule} for c in prepared.changes
            ]
            record = provenance(command, changes=changes, upgrades=list(prepared.upgrades))
            if prepared.changes:
                write_plan(order / PLAN, prepared.plan)
                write_atomic(order / CONFIG, to_yaml(prepared.plan.settings))
            if prepared.upgrades:
                record["untracked_sources"] = snapshot_code(order / CODE)
            write_json(order / PROVENANCE, record)
        was_cancelled = run.cancel_mark.exists()
        run.cancel_mark.unlink(missing_ok=True)
        try:
            submit(run, by="person")
        except UnknownSubmissionError:
            raise  # a job may start by this order
        except BaseException:
            withdraw(folder)
            if was_cancelled:
                run.write_cancel_mark()
            raise


def withdraw(folder: Path) -> None:
    """Take back a resume that was not submitted; the plan before is in force again at once."""
    gone = folder.with_name(f".withdrawn-{folder.name}")
    folder.rename(gone)
    for path in sorted(gone.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone.rmdir()


def notes_on(prepared: Resumption) -> list[str]:
    """Return what a person should know of recorded changes."""
    changed = {change.field for change in prepared.changes if change.rule == Rule.RECORDED}
    notes = []
    decay = prepared.plan.settings.training.decay
    if "training.tokens" in changed and decay != "constant":
        notes.append(f"the {decay} decay is over the new number of steps, so that the rate changes at once")
    if any(field.startswith("precision.") for field in changed):
        label = prepared.plan.settings.precision.label
        notes.append(
            f"the fp32 master weights and the optimizer are kept; from here on in {label}, losses differ by rounding"
        )
        notes += fp8_warnings(prepared.plan.settings, prepared.plan.layout)
    if any(change.field == "data.phases" for change in prepared.changes):
        begins = [f"step {phase.first_step:,}" for phase in planned_phases(prepared.plan)[1:]]
        notes.append(f"phases of the data begin with {', '.join(begins) or 'none but the first'}")
    if any(field.startswith("layout.") or field in ("cluster.nodes", "cluster.ranks_per_node") for field in changed):
        notes.append("the samples and their order stay; losses agree within sums in another order")
    return notes


def _other_data(before: TrainingPlan, plan: TrainingPlan, checkpoint: Checkpoint, run: str) -> str:
    """Return why the samples of a checkpoint are not the first ones of a plan, or nothing where they are."""
    consumed = checkpoint.facts.consumed_samples
    try:
        is_same = _request(plan).fingerprint_at(consumed) == checkpoint.facts.data_fingerprint
    except DataError:  # a data set that cannot be read is named by `check_inputs`, unless its name is what changed
        is_same = False
    return "" if is_same else what_differs(before, plan, consumed, run)


def _request(plan: TrainingPlan) -> "SampleRequest":
    from megatron_solar.sample_request import request_of  # imports numpy

    return request_of(plan)
