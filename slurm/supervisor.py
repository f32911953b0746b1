"""The job's main process: attempt after attempt, until the run is finished, stopped, or goes on in another job.

    python -m orchestrator.slurm.supervisor RUN SUBMISSION

For each attempt the nodes are checked and chosen (`allocation.py`), ranks started (`ranks.py`) and followed to
their end (`rank_watch.py`); a warning (`stop_requests.py`) becomes a stop request in the attempt's folder, on which
the ranks agree at a step boundary, save, and leave with 75. Only this process marks a checkpoint as complete. How an
attempt ended and what follows is written last, to outcome.json.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from orchestrator.attempt_record import attempt_record
from orchestrator.checkpoint_keeper import CheckpointKeeper, mark_left_over
from orchestrator.checkpoints import complete_checkpoints, parse_name
from orchestrator.errors import OrchestrateError, RunError, SchedulerError
from orchestrator.events import CheckpointEvent, StartEvent, StepEvent, read_events
from orchestrator.exit_codes import Cause
from orchestrator.files import JsonLines, is_full, write_atomic, write_json
from orchestrator.owner_lock import OwnedLock
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.recovery import Action, Decision, Ending, decide
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory
from orchestrator.slurm.allocation import Allocation, describe
from orchestrator.slurm.endings import AttemptEnding
from orchestrator.slurm.job import OwnJob, end_job, own_job, requeue
from orchestrator.slurm.rank_watch import RankWatch
from orchestrator.slurm.ranks import Preload, Ranks, start_ranks
from orchestrator.slurm.stop_requests import StopRequests
from orchestrator.slurm.submission import code_environment, submit
from orchestrator.slurm.take_over import settle_submission, take_run

LOOK_SECONDS = 1.0
REQUEUE_SECONDS = 600.0
"""How long a slurmctld that does not answer is asked again to start the job anew."""
RETRY_SECONDS = 10.0
TERM_SECONDS = 5.0
"""How long the TERM of a requeue may take."""
SHIPPER_SECONDS = 120.0
SHIPPER_SECONDS_BEFORE_MORE = 3.0
"""The same where ranks or a warning's end wait; the next attempt ships the rest."""
RESERVE_BYTES = 1 << 18
"""Kept on the disk for the outcome of a run that filled it."""

log = logging.getLogger("supervisor")


class Supervisor:
    """Keeps one run alive in one allocation."""

    def __init__(self, run: RunDirectory, lock: OwnedLock, job: OwnJob | None) -> None:
        self._run = run
        self._lock = lock
        self._job = job
        self._looked = time.monotonic()
        self._plan: TrainingPlan = read_plan(run.plan)
        self._stops = StopRequests(run, job, self._plan.settings.cluster.warning_seconds)
        self._preload: Preload | None = None
        self._nodes = Allocation(run, self._plan, job) if job is not None else None

    def main(self) -> int:
        """Run attempts until the run is finished, stopped, or goes on in another job."""
        self._stops.listen()
        if not self._run.reserve.exists():
            write_atomic(self._run.reserve, os.urandom(RESERVE_BYTES))  # zeros may take no space
        try:
            while not self._run.cancel_mark.exists():
                decision = self._attempt()
                if decision.action == Action.RESTART:
                    continue
                if decision.action == Action.REQUEUE:
                    self._requeue()
                if decision.action == Action.FINISH or not self._run.cancel_mark.exists():
                    return 0 if decision.action in (Action.FINISH, Action.REQUEUE) else 1
            log.info("cancelled; does not go on")
            if self._job is not None:
                end_job(self._job)
            return 1
        finally:
            if self._nodes is not None:
                self._nodes.close()
            if self._preload is not None:
                self._preload.close()

    def _attempt(self) -> Decision:
        attempt = self._run.new_attempt()
        started = time.time()
        write_json(attempt.job, self._job_record(started))
        log.info("attempt %d is to start %d ranks", attempt.number, self._plan.layout.world_size)
        notes = JsonLines(attempt.supervisor_events)
        try:
            mark_left_over(self._run, notes, self._lock.is_mine)
        except RunError:  # another supervisor has the run
            raise
        except (OrchestrateError, OSError) as error:
            log.warning("what the attempt before has left is not marked: %s", error)
        keeper = CheckpointKeeper(self._run, attempt, self._plan, notes, self._lock.is_mine)
        shipper = self._start_shipper(attempt)
        watched = self._run_ranks(attempt, keeper)
        if watched.cause == Cause.DISK_FULL:
            self._run.reserve.unlink(missing_ok=True)  # for a marker that had no room, and for the outcome
            with contextlib.suppress(OrchestrateError, OSError):
                keeper.look()
            keeper.discard_unfinished()
        steps = [event.step for _, event in read_events(attempt.events) if isinstance(event, StartEvent | StepEvent)]
        if self._nodes is not None and watched.host is not None:
            self._nodes.suspect(watched.host)
            if watched.cause == Cause.NODE_FAILED:
                self._nodes.drop(watched.host, watched.message)
        enough = self._nodes is None or self._nodes.has_enough()
        ending = Ending(cause=watched.cause, saved_step=newest_step(self._run), enough_nodes=enough)
        history = self._history(attempt)
        decision = decide(
            [ending for _, ending in history],
            ending,
            self._plan.settings.max_restarts_without_progress,
            started_from=saved_step(self._run, (history[0][0] if history else attempt.number) - 1),
        )
        notes.close()
        ended = time.time()
        nodes = self._nodes.chosen if self._nodes is not None else ()
        checking = self._nodes.checking if self._nodes is not None else None
        record = attempt_record(self._run, attempt, saved_step=ending.saved_step, ended=ended, checking=checking)
        write_json(
            attempt.outcome,
            {
                **record,
                "ranks_on": list(nodes),
                "attempt": attempt.number,
                "cause": watched.cause,
                "message": watched.message,
                "rank": watched.rank,
                "host": watched.host,
                "first_step": steps[0] + 1 if steps else None,
                "last_step": steps[-1] if steps else None,
                "saved_step": ending.saved_step,
                "started": started,
                "ended": ended,
                "submissions": len(self._run.submissions()),
                "exit_codes": {str(rank): code for rank, code in sorted(watched.exit_codes.items())},
                "action": decision.action,
                "why": decision.why,
            },
        )
        log.info("attempt %d ended: %s (%s); %s: %s", attempt.number, watched.cause, watched.message,
                 decision.action, decision.why)  # fmt: skip
        is_last = decision.action in (Action.FINISH, Action.STOP)
        if is_last:
            self._lock.release()  # what follows is tracking alone; a resume need not wait for it
        self._end_shipper(shipper, SHIPPER_SECONDS if is_last else SHIPPER_SECONDS_BEFORE_MORE)
        return decision

    def _run_ranks(self, attempt: AttemptDirectory, keeper: CheckpointKeeper) -> AttemptEnding:
        """Choose the nodes, start the ranks, follow them to their end, and say what ended them."""
        ranks: Ranks | None = None
        try:
            self._start_preload()
            nodes: tuple[str, ...] = ()
            if self._nodes is not None:
                choice = self._nodes.choose(attempt, self._ready_preload, self._is_stopped)
                nodes = choice.nodes
                if choice.missing and not self._is_stopped():
                    return AttemptEnding(cause=Cause.NODE_CHECK, message=describe(choice))
            if self._is_stopped() and self._stops.asked is not None:
                return AttemptEnding(cause=self._stops.asked, message="asked to stop before ranks were started")
            ranks = start_ranks(self._run, attempt, self._plan, self._ready_preload(), nodes, self._job)
            first_dead = self._nodes.first_dead if self._nodes is not None else lambda: None
            return RankWatch(attempt, ranks, keeper, self._stops).follow(self._check_ownership, first_dead)
        except Exception as error:
            log.exception("the supervisor failed")
            if ranks is not None:
                ranks.kill()
            cause = Cause.DISK_FULL if is_full(error) else Cause.EXCEPTION
            if not self._lock.is_mine():
                cause = Cause.SUPERSEDED
            return AttemptEnding(cause=cause, message=f"the supervisor failed: {type(error).__name__}: {error}")

    def _check_ownership(self) -> None:
        """Every second: whether the run is still ours.

        Raises:
            RunError: another supervisor has taken the run over.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if not self._lock.is_mine():
            raise RunError(f"run {self._run.name} has another supervisor by now")

    def _is_stopped(self) -> bool:
        """Whether ranks that are not started yet need not be started."""
        self._check_ownership()
        self._stops.look()
        return self._stops.asked is not None

    def _start_preload(self) -> None:
        """Start the process that forks the ranks, anew where it has ended; it imports while nodes are checked."""
        cluster = self._plan.settings.cluster
        is_forked = cluster.fork_ranks and cluster.device == "cpu"
        if is_forked and (self._preload is None or not self._preload.is_alive):
            self._preload = Preload(self._run, self._plan)

    def _ready_preload(self) -> Preload | None:
        """Return the process that forks the ranks; None where they are not forked."""
        if self._preload is not None:
            self._preload.wait_until_ready()
        return self._preload

    def _job_record(self, started: float) -> dict[str, Any]:
        submissions = self._run.submissions()
        job = self._job
        return {
            "scheduler": self._plan.settings.cluster.scheduler,
            "job_id": job.job_id if job else submissions[-1]["job_id"] if submissions else str(os.getppid()),
            "restart_count": job.restarts if job else 0,
            "process": os.getpid(),
            "process_created": psutil.Process().create_time(),
            "host": socket.gethostname(),
            "nodes": job.node_list if job else socket.gethostname(),
            "node_count": len(job.nodes) if job else self._plan.settings.cluster.nodes,
            "started": started,
            "submissions": len(submissions),
        }

    def _history(self, current: AttemptDirectory) -> list[tuple[int, Ending]]:
        """Return number and ending of the attempts since a person last started the run.

        An attempt whose supervisor was lost has no outcome, and counts as one that ended so.
        """
        by_a_person = [i for i, record in enumerate(self._run.submissions(), 1) if record["by"] == "person"]
        endings = []
        for attempt in self._run.attempts():
            job = attempt.read_job()
            if attempt.number >= current.number or job is None or job["submissions"] < max(by_a_person, default=0):
                continue
            outcome = attempt.read_outcome()
            cause = Cause(outcome["cause"]) if outcome is not None else Cause.SUPERVISOR_LOST
            endings.append((attempt.number, Ending(cause=cause, saved_step=saved_step(self._run, attempt.number))))
        return endings

    def _start_shipper(self, attempt: AttemptDirectory) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "orchestrator.tracking", str(self._run.path), "--follow"]
        with (attempt.logs / "tracking.log").open("ab") as output:
            return subprocess.Popen(
                [*command, str(attempt.number)],
                env=code_environment(self._run),
                cwd=self._run.path,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _end_shipper(self, shipper: "subprocess.Popen[bytes]", seconds: float) -> None:
        """Give the shipper time for the rest; what it leaves is shipped by a later attempt or `orchestrate ui`."""
        try:
            shipper.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("tracking is late; the rest is shipped later")
            shipper.kill()
            shipper.wait()

    def _requeue(self) -> None:
        """Have the run go on in another job: this one started again, or a successor where that is not allowed."""
        if self._run.cancel_mark.exists():
            log.info("cancelled meanwhile; does not go on")
            return
        self._lock.release()  # for the supervisor of the next job
        until = time.monotonic() + REQUEUE_SECONDS
        while True:
            try:
                if self._job is not None and requeue(self._job):
                    log.info("job %s is started again by Slurm", self._job.job_id)
                    self._stops.wait_for_term(TERM_SECONDS)  # a job that ends before it is one that has completed
                else:
                    log.info("goes on as job %s", submit(self._run, by="supervisor"))
                return
            except SchedulerError as error:  # a successor that came to be nevertheless leaves for a newer one
                if time.monotonic() > until or self._run.cancel_mark.exists():
                    raise
                log.warning("asks again in %.0f s: %s", RETRY_SECONDS, error)
                time.sleep(RETRY_SECONDS)


def newest_step(run: RunDirectory) -> int:
    """Return the step of a run's newest complete checkpoint, or 0."""
    found = complete_checkpoints(run)
    return found[-1].step if found else 0


def saved_step(run: RunDirectory, number: int) -> int:
    """Return the step that a run had saved when an attempt ended, also where the checkpoint is deleted by now."""
    attempt = run.attempt(number)
    outcome = attempt.read_outcome()
    if outcome is not None:
        return int(outcome["saved_step"])
    saved = [event.step for _, event in read_events(attempt.supervisor_events) if isinstance(event, CheckpointEvent)]
    if saved:
        return max(saved)
    if number < 1:  # what it was branched from
        place = parse_name(run.branched_from() or "")
        return place[0] if place is not None else 0
    return saved_step(run, number - 1)


def main(path: str, number: int) -> int:
    """Supervise a run; the exit code is that of the job.

    Args:
        number: of the submission that this job is.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)sZ supervisor %(levelname)s %(message)s", force=True)
    logging.Formatter.converter = time.gmtime
    os.umask(FILE_MASK)
    run = RunDirectory(Path(path))
    try:
        # A local run that was launched inside somebody's Slurm job has nothing to do with that job.
        job = own_job() if read_plan(run.plan).settings.cluster.scheduler == "slurm" else None
        settle_submission(run, number, job)
        lock = take_run(run, job)
        try:
            return Supervisor(run, lock, job).main()
        finally:
            lock.release()
    except RunError as error:
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("the supervisor failed")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
