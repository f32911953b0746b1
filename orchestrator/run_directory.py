"""The only place that knows the file names of a run.

    RUNS/NAME/
      config.yaml  plan.json  provenance.json  mlflow.json  mlflow.lock  supervisor.lock  cancel.json  shards.json
      code/                      what the workers import
      resumes/0001/              provenance.json with what changed; config.yaml, plan.json and code/ where they did
      submissions/0001.json      every job submitted
      attempts/0001/             plan.json  job.json  events.jsonl  supervisor.jsonl  stop.json  outcome.json
                                 rendezvous.json  worker_versions.json  checks/
                                 failures/rank_0003.json  logs/rank_0003.log  stacks/rank_0003.txt
                                 traces/rank_0003.json.gz
      checkpoints/step_0000020.attempt_0001/ ... complete.json, written last

Each file has one writer: the launching or resuming command, the supervisor, or one rank. Standard library only.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import RunError
from orchestrator.files import create_json, read_json, write_json
from orchestrator.values import nearest

PLAN = "plan.json"
CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
CODE = "code"
FILE_MASK = 0o027
"""Of every process that writes into a run: the owner writes, the group reads, others see nothing."""


@dataclasses.dataclass(frozen=True)
class AttemptDirectory:
    """One start of the ranks: its job, its events, how it ended."""

    path: Path

    @property
    def number(self) -> int:
        """Count from 1."""
        return int(self.path.name)

    @property
    def job(self) -> Path:
        """Scheduler, job id, supervisor's process and nodes; written by the supervisor at the start."""
        return self.path / "job.json"

    @property
    def plan(self) -> Path:
        """The plan that this start runs with; written by the supervisor before the ranks start."""
        return self.path / PLAN

    @property
    def events(self) -> Path:
        """Written by rank 0."""
        return self.path / "events.jsonl"

    @property
    def supervisor_events(self) -> Path:
        """Written by the supervisor."""
        return self.path / "supervisor.jsonl"

    @property
    def stop_request(self) -> Path:
        """Written by the supervisor; rank 0 looks for it before each step."""
        return self.path / "stop.json"

    @property
    def outcome(self) -> Path:
        """Cause of end, written last by the supervisor."""
        return self.path / "outcome.json"

    @property
    def rendezvous(self) -> Path:
        """Where rank 0 listens, written by rank 0."""
        return self.path / "rendezvous.json"

    @property
    def worker_versions(self) -> Path:
        """Python and packages of the ranks, which need not be the supervisor's; written by rank 0."""
        return self.path / "worker_versions.json"

    @property
    def failures(self) -> Path:
        """A file for each rank that failed, written by that rank."""
        return self.path / "failures"

    @property
    def stacks(self) -> Path:
        """A file for each rank that hung, with the stacks of its threads; made by the first of them."""
        return self.path / "stacks"

    @property
    def traces(self) -> Path:
        """A file for each rank whose steps were profiled; made by the first of them."""
        return self.path / "traces"

    @property
    def logs(self) -> Path:
        """Output of the ranks and of the supervisor."""
        return self.path / "logs"

    @property
    def srun_log(self) -> Path:
        """What srun itself said of the ranks."""
        return self.logs / "srun.log"

    @property
    def checks(self) -> Path:
        """What the nodes measured before the ranks were started; the torch part is written by ranks, a file each."""
        return self.path / "checks"

    def rank_log(self, rank: int) -> Path:
        """Standard output and error of one rank."""
        return self.logs / f"rank_{rank:04d}.log"

    def rank_trace(self, rank: int) -> Path:
        """Chrome's trace of the profiled steps of one rank."""
        return self.traces / f"rank_{rank:04d}.json.gz"

    def rank_failure(self, rank: int) -> Path:
        """What one rank says of its failure."""
        return self.failures / f"rank_{rank:04d}.json"

    def read_outcome(self) -> dict[str, Any] | None:
        """Return the outcome, or None while there is none."""
        return read_json(self.outcome) if self.outcome.exists() else None

    def read_job(self) -> dict[str, Any] | None:
        """Return the job's record, or None before the supervisor wrote it."""
        return read_json(self.job) if self.job.exists() else None


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run's folder."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """Resolved settings, for people."""
        return self.path / CONFIG

    @property
    def launched_plan(self) -> Path:
        """The plan that the run was launched with; never written again."""
        return self.path / PLAN

    @property
    def plan(self) -> Path:
        """The plan in force: of the newest resume that changed something, otherwise of the launch."""
        return next((path / PLAN for path in reversed(self.resumes()) if (path / PLAN).exists()), self.launched_plan)

    @property
    def provenance(self) -> Path:
        """Command, code state and package versions of the launch."""
        return self.path / PROVENANCE

    def branched_from(self) -> str | None:
        """Return the name of the other run's checkpoint from which this one went on, or None."""
        origin = read_json(self.provenance).get("branched_from") if self.provenance.exists() else None
        return None if origin is None else str(origin["checkpoint"])

    @property
    def resumes_folder(self) -> Path:
        """A folder for every resume that a person asked for."""
        return self.path / "resumes"

    def resumes(self) -> list[Path]:
        """Return the folders of the resumes, the oldest first."""
        return sorted(self.resumes_folder.glob("[0-9]*")) if self.resumes_folder.exists() else []

    @property
    def submissions_folder(self) -> Path:
        """A file for every job submitted; launch, resume and supervisors of any host may add one."""
        return self.path / "submissions"

    def submissions(self) -> list[dict[str, Any]]:
        """Return the record of every submission, the oldest first: number, time, by whom, scheduler, job id.

        One whose job id is None was begun and never heard of again. Those taken back are left out.
        """
        folder = self.submissions_folder
        records = [read_json(path) for path in sorted(folder.glob("*.json"))] if folder.exists() else []
        return [record for record in records if not record.get("is_withdrawn")]

    def add_submission(self, record: Mapping[str, object]) -> int:
        """Record a submission and return its number; a number is never given twice."""
        self.submissions_folder.mkdir(exist_ok=True)
        number = len(list(self.submissions_folder.glob("*.json"))) + 1
        while True:
            try:
                create_json(self.submission(number), {"number": number, **record})
                return number
            except FileExistsError:
                number += 1

    def complete_submission(self, number: int, facts: Mapping[str, object]) -> None:
        """Add to a submission's record what is known of its job by now."""
        write_json(self.submission(number), {**read_json(self.submission(number)), **facts})

    def submission(self, number: int) -> Path:
        """Return the record of one submission."""
        return self.submissions_folder / f"{number:04d}.json"

    @property
    def mlflow(self) -> Path:
        """MLflow's run id and how far its events were shipped; written by the shipper."""
        return self.path / "mlflow.json"

    @property
    def supervisor_lock(self) -> Path:
        """Names the supervisor at work; of two on one folder the second leaves."""
        return self.path / "supervisor.lock"

    @property
    def reserve(self) -> Path:
        """Space that the supervisor keeps, and gives back to say on a full disk what happened."""
        return self.path / "reserve"

    @property
    def mlflow_lock(self) -> Path:
        """Names the shipper at work; there only while it is."""
        return self.path / "mlflow.lock"

    @property
    def code(self) -> Path:
        """Snapshot of the packages that the workers import: of the newest resume that took one, or of the launch."""
        return next((path / CODE for path in reversed(self.resumes()) if (path / CODE).exists()), self.path / CODE)

    @property
    def cancel_mark(self) -> Path:
        """Left by `orchestrate cancel` before it tells the scheduler."""
        return self.path / "cancel.json"

    @property
    def attempts_folder(self) -> Path:
        """Folder of the attempts."""
        return self.path / "attempts"

    @property
    def checkpoints_folder(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def jobs(self) -> Path:
        """Submitit's own folder: scripts and the output of the supervisor's process."""
        return self.path / "jobs"

    @property
    def data_index(self) -> Path:
        """Cache of megatron's sample index."""
        return self.path / "data_index"

    @property
    def shard_record(self) -> Path:
        """Sizes and times of the shards at the last start, and which were compared whole; written by rank 0."""
        return self.path / "shards.json"

    def attempts(self) -> list[AttemptDirectory]:
        """Return the attempts in their order."""
        if not self.attempts_folder.exists():
            return []
        return [AttemptDirectory(p) for p in sorted(self.attempts_folder.iterdir()) if p.name.isdigit()]

    def attempt(self, number: int) -> AttemptDirectory:
        """Return an attempt's folder, whether or not it is there."""
        return AttemptDirectory(self.attempts_folder / f"{number:04d}")

    def new_attempt(self) -> AttemptDirectory:
        """Make the next attempt's folder; of two callers one gets it and the other fails."""
        last = self.attempts()
        attempt = self.attempt(last[-1].number + 1 if last else 1)
        attempt.path.mkdir(parents=True)
        attempt.failures.mkdir()
        attempt.logs.mkdir()
        return attempt

    def checkpoint_path(self, name: str) -> Path:
        """Return the folder of a checkpoint by its name."""
        return self.checkpoints_folder / name

    def write_cancel_mark(self) -> None:
        """Say that a person wants the run to end."""
        write_json(self.cancel_mark, {"time": time.time()})


def name_taken(runs: Path, name: str) -> RunError:
    """Return the error of a run's name that is there already."""
    return RunError(
        f"run {name!r} exists already in {runs}; choose another with name=..., or see `orchestrate status {name}`"
    )


def create_run(runs: Path, name: str) -> RunDirectory:
    """Make a new run's folder.

    Raises:
        RunError: the name is taken.
    """
    run = RunDirectory(runs / name)
    runs.mkdir(parents=True, exist_ok=True)
    try:
        run.path.mkdir()
    except FileExistsError:
        raise name_taken(runs, name) from None
    run.attempts_folder.mkdir()
    run.checkpoints_folder.mkdir()
    run.jobs.mkdir()
    return run


def discard_run(run: RunDirectory) -> None:
    """Remove a run's folder that never came to be submitted."""
    shutil.rmtree(run.path)


def list_runs(runs: Path) -> Iterator[RunDirectory]:
    """Yield the runs of a folder, the newest first."""
    found = [path for path in runs.iterdir() if (path / PLAN).exists()] if runs.exists() else []
    yield from map(RunDirectory, sorted(found, key=lambda path: (path / PLAN).stat().st_mtime, reverse=True))


def find_run(reference: str, runs: Path) -> RunDirectory:
    """Return a run by name, unique prefix, path, or `last` for the newest.

    Raises:
        RunError: there is none, or several begin so.
    """
    if (Path(reference).expanduser() / PLAN).exists():
        return RunDirectory(Path(reference).expanduser().absolute())
    if (runs / reference / PLAN).exists():
        return RunDirectory(runs / reference)
    known = list(list_runs(runs))
    if reference == "last" and known:
        return known[0]
    matching = [run for run in known if run.name.startswith(reference)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise RunError(
            f"{reference!r} fits several runs: {', '.join(run.name for run in matching[:5])}; write more of it"
        )
    if not known:
        raise RunError(f"no run named {reference!r}: {runs} holds none; start one with `orchestrate launch`")
    raise RunError(f"no run named {reference!r} in {runs}; {nearest(reference, [run.name for run in known])}")
