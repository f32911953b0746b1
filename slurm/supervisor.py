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
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from orchestrator.attempt_record import attempt_record
from orchestrator.checkpoint_keeper import CheckpointKeeper, mark_left_over
from orchestrator.errors import OrchestrateError, RunError, SchedulerError, StorageError
from orchestrator.exit_codes import Cause
from orchestrator.files import JsonLines, is_full, write_atomic, write_json
from orchestrator.owner_lock import OwnedLock, hold
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.recovery import Action, Decision, Ending
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory
from orchestrator.slurm.allocation import Allocation, describe
from orchestrator.slurm.endings import AttemptEnding
from orchestrator.slurm.history import decide_on, excluded_nodes, newest_step, outcome_record
from orchestrator.slurm.job import OwnJob, end_job, own_job, record_of_node, requeue
from orchestrator.slurm.leaving import go_on_in_another_job, nodes_that_computed_wrongly, nodes_to_leave
from orchestrator.slurm.lost import close_lost
from orchestrator.slurm.memory import OwnMemory
from orchestrator.slurm.node_agent import node_name
from orchestrator.slurm.rank_watch import RankWatch
from orchestrator.slurm.ranks import Preload, Ranks, start_ranks
from orchestrator.slurm.stop_requests import StopRequests
from orchestrator.slurm.storage import Storage, logging_aside
from orchestrator.slurm.submission import code_environment
from orchestrator.slurm.take_over import settle_submission, take_run

LOOK_SECONDS = 1.0
EVIDENCE_CHARACTERS = 2000
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
        self._storage = Storage(lock, self._plan.settings.patience.storage_seconds)
        self._stops = StopRequests(run, job, self._plan.settings.cluster.warning_seconds)
        self._preload: Preload | None = None
        self._nodes = Allocation(run, self._plan, job, excluded_nodes(run)) if job is not None else None
        self._evidence: list[dict[str, str]] = []
        self._shipper: subprocess.Popen[bytes] | None = None
        self._has_bad_nodes = False
        """Whether the newest attempt ended for its nodes."""

    def main(self) -> int:
        """Run attempts until the run is finished, stopped, or goes on in another job."""
        self._stops.listen()
        if not self._run.reserve.exists():
            write_atomic(self._run.reserve, os.urandom(RESERVE_BYTES))  # zeros may take no space
        try:
            self._mark_left_over()
            decision = close_lost(self._run, self._plan, self._job)
            if decision is not None and decision.action == Action.STOP:
                log.error("does not start again: %s", decision.why)
                return 1
            while not self._run.cancel_mark.exists():
                decision = self._attempt_or_failure()
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
        except StorageError:
            # Not even the end can be written down; the next supervisor does it.
            if self._stops.asked == Cause.TIME_LIMIT and self._job is not None:
                with contextlib.suppress(SchedulerError):
                    requeue(self._job)
            os._exit(1)
        finally:
            if self._nodes is not None:
                self._nodes.close()
            if self._preload is not None:
                self._preload.close()

    def _mark_left_over(self) -> None:
        """Mark what an attempt before has put on disk whole when its supervisor was lost."""
        attempts = [attempt for attempt in self._run.attempts() if attempt.plan.exists()]
        if not attempts or attempts[-1].read_outcome() is not None:
            return
        notes = JsonLines(attempts[-1].supervisor_events)
        try:
            mark_left_over(self._run, notes, self._lock.is_mine)
        except RunError:  # another supervisor has the run
            raise
        except (OrchestrateError, OSError) as error:
            log.warning("what the attempt before has left is not marked: %s", error)
        finally:
            notes.close()

    def _attempt_or_failure(self) -> Decision:
        """Make an attempt; an error of the supervisor itself, wherever it comes, becomes that attempt's end.

        Raises:
            RunError: another supervisor has the run.
        """
        try:
            return self._attempt(self._run.new_attempt())
        except (RunError, StorageError):
            raise
        except Exception as error:
            log.exception("the supervisor failed")
            attempts = self._run.attempts()
            if not attempts or attempts[-1].read_outcome() is not None:
                raise
            self._note("supervisor", traceback.format_exc())
            message = f"the supervisor failed: {type(error).__name__}: {error}"
            return self._end(attempts[-1], AttemptEnding(cause=Cause.SUPERVISOR_FAILED, message=message))

    def _attempt(self, attempt: AttemptDirectory) -> Decision:
        self._evidence.clear()
        self._stops.heard.clear()
        write_json(attempt.job, self._job_record(time.time()))
        log.info("attempt %d is to start %d ranks", attempt.number, self._plan.layout.world_size)
        notes = JsonLines(attempt.supervisor_events)
        keeper = CheckpointKeeper(self._run, attempt, self._plan, notes, self._lock.is_mine)
        self._start_shipper(attempt)
        watched = self._run_ranks(attempt, keeper)
        if watched.cause == Cause.DISK_FULL:
            self._run.reserve.unlink(missing_ok=True)  # for a marker that had no room, and for the outcome
            with contextlib.suppress(OrchestrateError, OSError):
                keeper.look()
            keeper.discard_unfinished()
        notes.close()
        decision = self._end(attempt, watched)
        if decision.action in (Action.FINISH, Action.STOP):
            self._lock.release()  # what follows is tracking alone; a resume need not wait for it
            # Of a run that is another's by now the other's shipper tells.
            self._end_shipper(SHIPPER_SECONDS if watched.cause != Cause.SUPERSEDED else 0.0)
        elif decision.action == Action.REQUEUE:
            self._end_shipper(SHIPPER_SECONDS_BEFORE_MORE)
        return decision

    def _end(self, attempt: AttemptDirectory, watched: AttemptEnding) -> Decision:
        """Decide what follows the end of an attempt, and write both down."""
        if self._nodes is not None and watched.host is not None:
            self._nodes.suspect(watched.host)
            if watched.cause == Cause.NODE_FAILED:
                self._nodes.drop(watched.host, watched.message.removeprefix(f"node {watched.host}: "))
        if self._nodes is not None:
            for node, why in nodes_that_computed_wrongly(attempt).items():
                self._nodes.drop(node, why)
        self._has_bad_nodes = watched.cause in (Cause.NODE_FAILED, Cause.NODE_CHECK, Cause.HARDWARE)
        enough = self._nodes is None or self._nodes.has_enough()
        ending = Ending(cause=watched.cause, saved_step=newest_step(self._run), enough_nodes=enough)
        decision = decide_on(self._run, attempt, ending, self._plan.settings)
        for words in self._stops.heard:
            self._note("signal", words)
        is_hurried = self._stops.asked not in (None, Cause.TIME_LIMIT)
        if watched.cause == Cause.NODE_FAILED and watched.host is not None and not is_hurried:
            is_lost, words = record_of_node(watched.host)
            self._note("slurm", words if is_lost else "")
        bad = self._nodes.bad if self._nodes is not None else {}
        for node, why in bad.items():
            self._note("node", f"{node}: {why}")
        excluded, refusal = nodes_to_leave(self._run, self._plan, self._job, bad, is_hurried=is_hurried)
        self._note("slurm", refusal)
        if watched.cause == Cause.SUPERSEDED:
            log.info("attempt %d is not ours any more: %s", attempt.number, watched.message)
            return decision  # who has the run now writes down how it ended
        ended = time.time()
        checking = self._nodes.checking if self._nodes is not None else None
        record = attempt_record(self._run, attempt, saved_step=ending.saved_step, ended=ended, checking=checking)
        outcome = outcome_record(
            attempt,
            watched,
            decision,
            saved_step=ending.saved_step,
            ended=ended,
            submissions=len(self._run.submissions()),
            excluded=excluded,
            evidence=self._evidence,
        )
        ranks_on = list(self._nodes.chosen) if self._nodes is not None else []
        write_json(attempt.outcome, {**record, "ranks_on": ranks_on, **outcome})
        log.info("attempt %d ended: %s (%s); %s: %s", attempt.number, watched.cause, watched.message,
                 decision.action, decision.why)  # fmt: skip
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
            memory = self._nodes if self._nodes is not None else OwnMemory()
            memory.count_oom_kills()
            ranks = start_ranks(self._run, attempt, self._plan, self._ready_preload(), nodes, self._job)
            first_dead = self._nodes.first_dead if self._nodes is not None else lambda: None
            watch = RankWatch(attempt, ranks, keeper, self._stops, self._storage, self._plan)

            def killed_for_memory() -> Mapping[str, str]:
                found = memory.killed_for_memory()
                for words in found.values():
                    self._note("node", words)
                return found

            return watch.follow(self._check_ownership, first_dead, killed_for_memory, nodes)
        except Exception as error:
            if ranks is not None:
                ranks.kill()
            if isinstance(error, StorageError):
                return self._wait_for_storage(error)
            if not self._lock.is_mine():
                return AttemptEnding(cause=Cause.SUPERSEDED, message=str(error))
            log.exception("the supervisor failed")
            self._note("supervisor", traceback.format_exc())
            cause = Cause.SUPERVISOR_FAILED
            if is_full(error):
                cause = Cause.DISK_FULL
            elif isinstance(error, OrchestrateError) and not isinstance(error, SchedulerError):
                cause = Cause.EXCEPTION  # it says what to do, and would come again
            return AttemptEnding(cause=cause, message=f"the supervisor failed: {type(error).__name__}: {error}")

    def _wait_for_storage(self, error: StorageError) -> AttemptEnding:
        """Wait until the run's folder answers again: without it nothing can be started, and nothing written down.

        Raises:
            StorageError: the job's time is over before that.
        """
        since = time.time()
        log.error("%s; the ranks were ended, and start again when it answers", error)
        if not self._storage.wait(lambda: self._stops.is_asked):
            raise error
        self._note("storage", f"it answered again {time.time() - since:.0f} s after the ranks were ended")
        return AttemptEnding(cause=Cause.STORAGE, message=str(error))

    def _note(self, source: str, text: str) -> None:
        """Keep a piece of evidence for the outcome."""
        if text:
            self._evidence.append({"source": source, "text": text[-EVIDENCE_CHARACTERS:]})

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
            "node": node_name(),
            "process": os.getpid(),
            "process_created": psutil.Process().create_time(),
            "host": socket.gethostname(),
            "nodes": job.node_list if job else socket.gethostname(),
            "node_count": len(job.nodes) if job else self._plan.settings.cluster.nodes,
            "started": started,
            "submissions": len(submissions),
        }

    def _start_shipper(self, attempt: AttemptDirectory) -> None:
        """Start what tells MLflow, unless it runs since an attempt before."""
        if self._shipper is not None and self._shipper.poll() is None:
            return
        command = [sys.executable, "-P", "-m", "orchestrator.tracking", str(self._run.path)]
        with (attempt.logs / "tracking.log").open("ab") as output:
            self._shipper = subprocess.Popen(
                [*command, "--follow", str(attempt.number), "--parent", str(os.getpid())],
                env=code_environment(self._run),
                cwd=self._run.path,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _end_shipper(self, seconds: float) -> None:
        """Give the shipper time for the rest; what it leaves is shipped by a later attempt or `orchestrate ui`."""
        if self._shipper is None:
            return
        try:
            self._shipper.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("tracking is late; the rest is shipped later")
            self._shipper.kill()
            self._shipper.wait()
            with hold(self._run.mlflow_lock, "shipper"):
                pass  # took the dead one's lock and gives it back: on another host it would count as held for long

    def _requeue(self) -> None:
        if self._run.cancel_mark.exists():
            log.info("cancelled meanwhile; does not go on")
            return
        self._lock.release()  # for the supervisor of the next job
        go_on_in_another_job(self._run, self._job, self._stops, for_bad_nodes=self._has_bad_nodes)


def main(path: str, number: int) -> int:
    """Supervise a run; the exit code is that of the job.

    Args:
        number: of the submission that this job is.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)sZ supervisor %(levelname)s %(message)s", force=True)
    logging.Formatter.converter = time.gmtime
    os.umask(FILE_MASK)
    run = RunDirectory(Path(path))
    with logging_aside():
        return _supervise(run, number)


def _supervise(run: RunDirectory, number: int) -> int:
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
