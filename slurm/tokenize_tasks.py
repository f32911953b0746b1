"""Have a tokenization's units worked on by the tasks of a Slurm job array: submit it once, and follow it.

An intent with a name that no other job has is written before the submission, in OUTPUT.partial/array.json. So whatever
becomes of the coordinator, the same command finds the array that lives and follows it. Slurm's silence means nothing:
only a Slurm that answers, and has no living task, ends the wait.
"""

import contextlib
import dataclasses
import shutil
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError, DataError, SchedulerError
from orchestrator.files import read_json, write_json
from orchestrator.screen import notice
from orchestrator.slurm.requests import (
    account_problems,
    ask_site,
    check_controller,
    in_one_line,
    known_partitions,
    longest_seconds,
    partition_name,
    seen_here_alone,
)
from orchestrator.slurm.scheduler import SUBMIT_SECONDS, run_command
from orchestrator.slurm.submission import ArrayScript, interrupts_later, submit_array
from orchestrator.slurm.tokenize_array import (
    ArrayRequest,
    SubmittedArray,
    TaskAnswer,
    TaskEnd,
    array_script,
    divide,
    failure,
    job_name,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    ranges,
)
from orchestrator.tokenize.work_folder import WorkFolder
from orchestrator.values import from_plain, to_plain

LOOK_SECONDS = 0.5
ASK_SECONDS = 15.0
"""Between two questions to a controller that many share; the first ones come sooner."""
SETTLE_SECONDS = 60.0
"""How long a client of NFS may take to see what another host has written."""
LAST_LINES = 4
LINE_CHARACTERS = 400

Look = Callable[[], None]


def check_array(request: ArrayRequest, paths: Sequence[Path]) -> None:
    """Refuse a cluster whose tasks could not do the work, before anything is written.

    Args:
        paths: of inputs and outputs, which every node has to see.

    Raises:
        ConfigError: it is no Slurm cluster, or a path lies on a disk of this machine.
        SchedulerError: there is no `sbatch` here.
    """
    cluster = request.cluster
    if cluster.scheduler != "slurm":
        raise ConfigError(
            f"--cluster {cluster.name} has no Slurm (scheduler: {cluster.scheduler}); name one that has, or leave "
            "--cluster away and set --workers for processes of this machine"
        )
    if shutil.which("sbatch") is None:
        raise SchedulerError(
            f"cluster {cluster.name!r} is a Slurm cluster, and there is no `sbatch` on this machine; run this on a "
            "login node, or leave --cluster away to tokenize here"
        )
    kinds = {} if cluster.one_machine else {path: seen_here_alone(path.absolute()) for path in paths}
    problems = [
        f"{path} lies on a disk of this machine alone ({kind}), and every task needs to see it; choose a folder of the "
        "shared disk, or set one_machine: true in the profile where all nodes are this machine"
        for path, kind in kinds.items()
        if kind
    ]
    if problems:
        raise ConfigError(f"cluster {cluster.name!r} cannot do this:", problems)


def carry_out_by(request: ArrayRequest) -> Callable[[WorkFolder, Look], None]:
    """Return who has units worked on, as `tokenize_corpus` takes it."""

    def carry_out(folder: WorkFolder, look: Look) -> None:
        left = units_left(folder)
        if not left:
            return
        array = _living_array(folder, look)
        if array is None:
            array = _submit(folder, request, left)
        else:
            notice(f"job {array.job_id} works on this already, tasks {array.array}; it is followed")
        try:
            _Following(folder, array, left).to_end(look)
        except KeyboardInterrupt:
            notice(
                f"job {array.job_id} goes on by itself; the same command follows it, and publishes the data set at "
                f"its end; `scancel {array.job_id}` ends it"
            )
            raise
        except DataError:
            with contextlib.suppress(SchedulerError):
                run_command(["scancel", str(array.job_id)])
                notice(f"job {array.job_id} was cancelled")
            raise

    return carry_out


def units_left(folder: WorkFolder) -> list[int]:
    """Return the units that are not done."""
    return [unit for unit in range(folder.read_plan().units) if folder.read_record(unit).state != "done"]


def ask_tasks(name: str) -> list[TaskAnswer]:
    """Return what Slurm says of the tasks of an array by its name; of ended ones for some minutes.

    Raises:
        SchedulerError: slurmctld did not answer.
    """
    listed = ["--noheader", "--array", "--states=all", f"--name={name}", "--format=%F|%K|%T|%r"]
    return parse_squeue(run_command(["squeue", *listed]))


def ask_ends(job: str) -> dict[int, TaskEnd]:
    """Return how tasks of an array ended, by accounting, and by slurmctld while it remembers them."""
    found: dict[int, TaskEnd] = {}
    with contextlib.suppress(SchedulerError):
        fields = "--format=JobID,State,ExitCode,NodeList"
        found |= parse_sacct(run_command(["sacct", "--noheader", "--parsable2", "-X", f"--jobs={job}", fields]))
    with contextlib.suppress(SchedulerError):
        found |= parse_scontrol(run_command(["scontrol", "--oneliner", "show", "job", job]))
    return found


def _living_array(folder: WorkFolder, look: Look) -> SubmittedArray | None:
    """Return the array that works on the folder, or None where none does.

    Raises:
        SchedulerError: it is not known, since slurmctld does not answer.
    """
    if not folder.array.exists():
        return None
    problems: list[str] = []
    array = from_plain(SubmittedArray, read_json(folder.array), "", problems)
    if array is None:
        raise DataError(
            f"{folder.array} is damaged; see with `squeue` that no array works on this, and remove it:", problems
        )
    while True:
        try:
            tasks = ask_tasks(array.job_name)
        except SchedulerError as error:
            raise SchedulerError(
                f"whether job {array.job_id or array.job_name} still works on {folder.path} is not known, and nothing "
                f"is submitted twice: {error}; give the same command when Slurm answers"
            ) from error
        if tasks:
            if not any(its.is_living for its in tasks):
                return None
            array = dataclasses.replace(array, job_id=tasks[0].job_id)
            write_json(folder.array, to_plain(array))
            return array
        if array.job_id is not None or time.time() - array.time >= SUBMIT_SECONDS:
            return None
        look()
        time.sleep(LOOK_SECONDS)  # a submission may be on its way, though who began it is gone


def _submit(folder: WorkFolder, request: ArrayRequest, left: Sequence[int]) -> SubmittedArray:
    """Submit tasks for the units that are left, once, whatever becomes of the scheduler's answer.

    Raises:
        ConfigError, SchedulerError: Slurm could not start it, or whether it was submitted is not known.
    """
    division = divide(left, request)
    name = job_name(folder.path.name.removesuffix(".partial"), uuid.uuid4().hex[:8])
    script = array_script(folder, request, division, name)
    folder.logs.mkdir(exist_ok=True)
    _check_script(request, script)
    array = SubmittedArray(
        job_name=name,
        job_id=None,
        cluster=request.cluster.name,
        tasks=division.tasks,
        array=ranges(division.numbers),
        workers=division.workers,
        command=script.command,
        time=time.time(),
        host=socket.gethostname(),
    )
    with interrupts_later():
        write_json(folder.array, to_plain(array))
        try:
            job = submit_array(script, f"the tasks of {folder.path}")
        except SchedulerError as error:
            try:
                tasks = ask_tasks(name)
            except SchedulerError as silence:
                raise SchedulerError(
                    f"whether job {name} was submitted is not known, and nothing is tried twice: {error}\nwhen asked, "
                    f"{silence}\nthe same command asks again, and submits it where Slurm has no such job"
                ) from error
            if not tasks:
                folder.array.unlink()
                raise
            job = tasks[0].job_id
        array = dataclasses.replace(array, job_id=job)
        write_json(folder.array, to_plain(array))
    notice(
        f"job {job}: {len(division.numbers)} task{'s' if len(division.numbers) > 1 else ''} of {division.workers} "
        f"process{'es' if division.workers > 1 else ''} for {len(left)} units; logs in {folder.logs}"
    )
    return array


def _check_script(request: ArrayRequest, script: ArrayScript) -> None:
    """Refuse what this site's Slurm would never start.

    Raises:
        ConfigError: an account or a time limit that is not given here.
        SchedulerError: the controller does not answer, or says no.
    """
    cluster, partition = request.cluster, partition_name(request.cluster)
    check_controller()
    partitions = known_partitions()
    longest = longest_seconds(cluster, partitions)
    problems = account_problems(cluster)
    if longest is not None:
        problems.append(
            f"a time limit of {cluster.time_limit} is more than partition {partition} gives, and Slurm would leave "
            f"this pending for ever; give --time {longest // 3600}:{longest % 3600 // 60:02d}:00, or less"
        )
    if problems:
        raise ConfigError(f"cluster {cluster.name!r} cannot do this:", problems)
    is_accepted, said = ask_site(["sbatch", "--test-only"], script.text())
    if not is_accepted:
        names = ", ".join(dict.fromkeys(its.name for its in partitions)) or "not known"
        raise SchedulerError(
            f"Slurm could not run a task of {script.options['cpus_per_task']} processors and {script.options['mem']} "
            f"of memory in partition {partition}: {in_one_line(said)}; the partitions here are {names}; set "
            "--partition, --workers or --tasks to what there is"
        )


class _Following:
    """Follows an array to the end of all units.

    Args:
        left: units that were not done.
    """

    def __init__(self, folder: WorkFolder, array: SubmittedArray, left: Sequence[int]) -> None:
        self._folder = folder
        self._array = array
        self._left = list(left)
        self._told: set[str] = set()
        self._some_wait = False
        self._all_ended: float | None = None

    def to_end(self, look: Look) -> None:
        """Return when all units are done.

        Raises:
            OrchestrateError: no task lives, and units are not done.
        """
        begun = asked = time.monotonic()
        while not self._is_done():
            look()
            now = time.monotonic()
            if now - asked >= min(ASK_SECONDS, 1 + (now - begun) / 8):
                if self._has_ended():
                    return
                asked = time.monotonic()
            time.sleep(LOOK_SECONDS)
        if self._some_wait:  # for units that others have done meanwhile
            with contextlib.suppress(SchedulerError):
                run_command(["scancel", "--state=PENDING", str(self._array.job_id)])

    def _is_done(self) -> bool:
        """Look at the last unit that was not done, so that mostly one record is read."""
        while self._left:
            last = self._left[-1]
            # Who has written a unit's last record still tidies up, and then releases its lock.
            if self._folder.read_record(last).state != "done" or self._folder.unit_lock(last).exists():
                return False
            self._left.pop()
        return True

    def _has_ended(self) -> bool:
        """Return whether all is done, from what Slurm says of the tasks; its silence is no answer.

        Raises:
            OrchestrateError: as `to_end`.
        """
        try:
            tasks = ask_tasks(self._array.job_name)
        except SchedulerError as error:
            self._tell(f"Slurm does not answer, and job {self._array.job_id} goes on: {error}")
            return False
        living = [its for its in tasks if its.is_living]
        if living:
            self._tell_of(tasks, living)
            return False
        left = units_left(self._folder)
        if not left:
            return True
        self._all_ended = self._all_ended or time.monotonic()
        of_units = {unit % self._array.tasks for unit in left}
        ended_well = of_units & {its.task for its in tasks if its.state == "COMPLETED"}
        if ended_well and time.monotonic() - self._all_ended < SETTLE_SECONDS:
            return False  # their last records may not be seen here yet
        said = {task: self._last_lines(task) for task in of_units}
        ends = ask_ends(str(self._array.job_id))
        raise failure(self._folder, self._array, left, ends, said)

    def _tell_of(self, tasks: Sequence[TaskAnswer], living: Sequence[TaskAnswer]) -> None:
        """Say why all tasks wait, and which have failed."""
        waits = {its.reason for its in living if its.state == "PENDING"}
        self._some_wait = bool(waits)
        if all(its.state == "PENDING" for its in living) and waits - {"None"}:
            self._tell(f"job {self._array.job_id} waits: Slurm says {', '.join(sorted(waits))}")
        for its in tasks:
            if not its.is_living and its.state != "COMPLETED":
                self._tell(f"task {its.task} has ended: {its.state}; the others go on")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            notice(text)

    def _last_lines(self, task: int) -> list[str]:
        path = self._folder.logs / f"{self._array.job_id}_{task}.log"
        try:
            with path.open(encoding="utf-8", errors="replace") as stream:
                lines = deque((line.strip() for line in stream if line.strip()), LAST_LINES)
        except OSError:
            return []
        return [line[:LINE_CHARACTERS] for line in lines]
