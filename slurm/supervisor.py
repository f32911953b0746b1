"""The job's main process: start the ranks, mark their checkpoints, hear the warnings, decide what follows.

    python -m orchestrator.slurm.supervisor RUN SUBMISSION

A warning (the time limit's SIGUSR2, a SIGTERM) becomes a stop request in the attempt's folder; the
ranks agree on it at a step boundary, save, and leave with 75. Under Slurm the nodes are checked before
ranks start and heard from while they run (`allocation.py`). Only this process marks a checkpoint as
complete. How an attempt ended is written last, to outcome.json.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from orchestrator import exit_codes
from orchestrator.attempt_record import attempt_record
from orchestrator.checkpoint_keeper import CheckpointKeeper, mark_left_over
from orchestrator.checkpoints import VISIBLE_SECONDS, complete_checkpoints, parse_name
from orchestrator.errors import OrchestrateError, RunError, SchedulerError
from orchestrator.events import CheckpointEvent, StartEvent, StepEvent, read_events
from orchestrator.exit_codes import Cause
from orchestrator.files import JsonLines, is_full, read_json, write_atomic, write_json
from orchestrator.owner_lock import OwnedLock, acquire
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.recovery import Action, Decision, Ending, decide
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory
from orchestrator.slurm.allocation import Allocation, describe
from orchestrator.slurm.endings import AttemptEnding, explain_ending, first_srun_failure, srun_words
from orchestrator.slurm.job import (
    OwnJob,
    end_job,
    job_facts,
    kill_wait_seconds,
    own_job,
    requeue,
    why_terminated,
)
from orchestrator.slurm.ranks import SRUN_SECONDS_WITHOUT_A_NODE, Preload, Ranks, start_ranks
from orchestrator.slurm.submission import code_environment, submit

POLL_SECONDS = 0.05
LOOK_SECONDS = 1.0
FAILURE_LOOK_SECONDS = 0.3
LOCK_RENEWAL_SECONDS = 5.0
LOCK_STALE_SECONDS = 60.0
"""Age at which the lock of a supervisor on another host is taken over; its owner renews it much more often."""
PEER_GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves after the first one failed, so that each can say why."""
KILL_WAIT_SHARE = 0.8
"""Of the time between Slurm's TERM and its KILL, how much the ranks may take for their save."""
REQUEUE_SECONDS = 600.0
"""How long a slurmctld that does not answer is asked again to start the job anew."""
RETRY_SECONDS = 10.0
DISK_SECONDS = 60.0
"""How long the run's file system may fail before the ranks are given up."""
TERM_SECONDS = 5.0
"""How long the TERM of a requeue may take; a job that ends before it is one that has completed."""
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
        self._looked_for_failures = 0.0
        self._plan: TrainingPlan = read_plan(run.plan)
        self._terminated: float | None = None
        """When a SIGTERM was heard that is not answered yet."""
        self._kill_wait = kill_wait_seconds() if job is not None else 0.0
        self._asked: Cause | None = None
        self._deadline: float | None = None
        self._preload: Preload | None = None
        self._nodes = Allocation(run, self._plan, job) if job is not None else None

    def main(self) -> int:
        """Run attempts until the run is finished, stopped, or goes on in another job."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._hear)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
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

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; the loop acts on it."""
        if number == signal.SIGTERM:
            self._terminated = time.monotonic()
        elif self._asked is None:
            self._ask(Cause.TIME_LIMIT, self._plan.settings.cluster.warning_seconds)

    def _ask(self, why: Cause, seconds: float) -> None:
        """Have the ranks save and leave within so many seconds."""
        self._asked = why
        self._deadline = min(self._deadline or math.inf, time.monotonic() + seconds)

    def _answer_term(self) -> None:
        """Find out what a SIGTERM was for; Slurm's is followed by a KILL, before which the outcome is to be written."""
        heard, self._terminated = self._terminated or time.monotonic(), None
        if self._job is None or self._run.cancel_mark.exists():
            is_cancelled = self._run.cancel_mark.exists()
            self._ask(Cause.CANCELLED if is_cancelled else Cause.STOPPED, self._plan.settings.cluster.warning_seconds)
            return
        why = why_terminated(self._job, job_facts(self._job.job_id))
        self._ask(why, heard + KILL_WAIT_SHARE * self._kill_wait - time.monotonic())

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
        if decision.action in (Action.FINISH, Action.STOP):
            self._lock.release()  # what follows is tracking alone; a resume need not wait for it
        is_last = decision.action in (Action.FINISH, Action.STOP)
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
            if self._is_stopped() and self._asked is not None:
                return AttemptEnding(cause=self._asked, message="asked to stop before ranks were started")
            ranks = start_ranks(self._run, attempt, self._plan, self._ready_preload(), nodes, self._job)
            return self._follow(attempt, ranks, keeper)
        except Exception as error:
            log.exception("the supervisor failed")
            if ranks is not None:
                ranks.kill()
            cause = Cause.DISK_FULL if is_full(error) else Cause.EXCEPTION
            if not self._lock.is_mine():
                cause = Cause.SUPERSEDED
            return AttemptEnding(cause=cause, message=f"the supervisor failed: {type(error).__name__}: {error}")

    def _follow(self, attempt: AttemptDirectory, ranks: Ranks, keeper: CheckpointKeeper) -> AttemptEnding:
        """Mark checkpoints, pass stop requests on, and end what a failed rank has left behind."""
        first_failure: tuple[float, dict[int, int]] | None = None
        srun_log = ""
        is_killed_late = False
        codes: dict[int, int] = {}
        asked = False
        trouble: float | None = None
        is_told = False
        while len(codes) < ranks.count:
            time.sleep(POLL_SECONDS)
            codes = ranks.ended()
            try:
                if (self._terminated is not None or self._asked is not None) and not asked:
                    # Before Slurm is asked what its TERM meant: that may take as long as there is.
                    reason = self._asked or Cause.STOPPED
                    write_json(attempt.stop_request, {"reason": reason, "time": time.time()})
                    asked = True
                    log.info("asked the ranks to save and leave: %s", reason)
                keeper.look()
                self._look_around()
                is_told = self._is_failure_told(attempt, ranks)
                trouble = None
            except OSError as error:
                if is_full(error) or (trouble is not None and time.monotonic() - trouble > DISK_SECONDS):
                    raise
                if trouble is None:
                    trouble = time.monotonic()
                    log.warning("the run's folder cannot be read: %s", error)
            dead = self._nodes.first_dead() if self._nodes is not None else None
            if dead is not None:
                ranks.kill(SRUN_SECONDS_WITHOUT_A_NODE)
                keeper.look()
                if self._asked is not None:  # Slurm has ended what was told to save
                    message = f"asked to stop ({self._asked}), ended before it could save"
                    return AttemptEnding(cause=self._asked, message=message)
                return AttemptEnding(cause=Cause.NODE_FAILED, message=f"node {dead[0]}: {dead[1]}", host=dead[0])
            if first_failure is None and (_is_bad(codes) or is_told):
                first_failure = (time.monotonic(), codes)
            late = first_failure is not None and time.monotonic() - first_failure[0] > PEER_GRACE_SECONDS
            if late or (self._deadline is not None and time.monotonic() > self._deadline):
                srun_log = ranks.srun_log()  # what it tells from here on is our doing
                is_killed_late = not late
                first_failure = first_failure or (time.monotonic(), codes)
                ranks.kill()
                codes = ranks.ended()
                break
        else:
            srun_log = ranks.srun_log()
        keeper.look()
        deadline = time.monotonic() + VISIBLE_SECONDS
        while set(codes.values()) <= {exit_codes.FINISHED, exit_codes.SAVED_AND_LEFT} and not keeper.is_settled:
            if time.monotonic() > deadline:
                message = (
                    f"the ranks left well, and after {VISIBLE_SECONDS:.0f} s their last checkpoint is not whole here"
                )
                return AttemptEnding(cause=Cause.EXCEPTION, message=message, exit_codes=codes)
            time.sleep(POLL_SECONDS)
            keeper.look()
        records = sorted((read_json(path) for path in attempt.failures.glob("rank_*.json")), key=_time_of)
        return explain_ending(
            records,
            codes if first_failure is None else first_failure[1],
            codes,
            asked=self._asked,
            srun=first_srun_failure(srun_log),
            words=srun_words(srun_log),
            is_killed_late=is_killed_late,
            host=socket.gethostname(),
        )

    def _is_failure_told(self, attempt: AttemptDirectory, ranks: Ranks) -> bool:
        """Whether srun or a rank has told of a failure in a file; looked at once in a while, as disks are shared."""
        if time.monotonic() - self._looked_for_failures < FAILURE_LOOK_SECONDS:
            return False
        self._looked_for_failures = time.monotonic()
        return first_srun_failure(ranks.srun_log()) is not None or any(attempt.failures.iterdir())

    def _look_around(self) -> None:
        """Every second: whether a person has cancelled, though no signal came, and whether the run is still ours.

        Raises:
            RunError: another supervisor has taken the run over.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS and self._terminated is None:
            return
        self._looked = time.monotonic()
        if not self._lock.is_mine():
            raise RunError(f"run {self._run.name} has another supervisor by now")
        if self._terminated is not None or (self._run.cancel_mark.exists() and self._asked != Cause.CANCELLED):
            self._answer_term()

    def _is_stopped(self) -> bool:
        """Whether ranks that are not started yet need not be started."""
        self._look_around()
        return self._asked is not None

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
                    self._wait_for_term()
                else:
                    log.info("goes on as job %s", submit(self._run, by="supervisor"))
                return
            except SchedulerError as error:  # a successor that came to be nevertheless leaves for a newer one
                if time.monotonic() > until or self._run.cancel_mark.exists():
                    raise
                log.warning("asks again in %.0f s: %s", RETRY_SECONDS, error)
                time.sleep(RETRY_SECONDS)

    def _wait_for_term(self) -> None:
        """Wait for the TERM of a requeue."""
        deadline = time.monotonic() + TERM_SECONDS
        while self._terminated is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _is_bad(codes: dict[int, int]) -> bool:
    return any(code not in (exit_codes.FINISHED, exit_codes.SAVED_AND_LEFT) for code in codes.values())


def _time_of(record: dict[str, Any]) -> float:
    return float(record["time"])


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
        threading.Thread(target=keep_renewing, args=(lock,), name="lock", daemon=True).start()
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


def keep_renewing(lock: OwnedLock) -> None:
    """Show other hosts that this supervisor lives, whatever it waits for."""
    while lock.is_mine():
        lock.renew()
        time.sleep(LOCK_RENEWAL_SECONDS)


def settle_submission(run: RunDirectory, number: int, job: OwnJob | None) -> None:
    """Record this job where nobody could, and leave where the run goes on in a newer one.

    Raises:
        RunError: another submission has followed, or this one was taken back.
    """
    submissions = run.submissions()
    if not submissions or submissions[-1]["number"] != number:
        raise RunError(f"run {run.name} does not go on in submission {number}; this job leaves")
    if job is not None and submissions[-1]["job_id"] is None:
        run.complete_submission(number, {"job_id": job.job_id, "process_created": 0.0})


def take_run(run: RunDirectory, job: OwnJob | None) -> OwnedLock:
    """Become a run's only supervisor.

    One of another host that has stopped renewing its lock is waited for. A requeued job takes the run
    from its own former start at once: Slurm has given that one up, and it may live on a lost node.

    Raises:
        RunError: it has a living supervisor.
    """
    attempts = run.attempts()
    before = attempts[-1].read_job() if attempts else None
    is_same = job is not None and before is not None and before["job_id"] == job.job_id
    if job is not None and before is not None and is_same and before["restart_count"] < job.restarts:
        run.supervisor_lock.unlink(missing_ok=True)
    deadline = time.monotonic() + LOCK_STALE_SECONDS + LOCK_RENEWAL_SECONDS
    while True:
        lock = acquire(run.supervisor_lock, "supervisor", stale_seconds=LOCK_STALE_SECONDS)
        if isinstance(lock, OwnedLock):
            return lock
        is_leaving = before is not None and attempts[-1].read_outcome() is not None  # it ends its last things
        is_here = lock.endswith(f" on {socket.gethostname()}")
        if (is_here and not is_leaving) or time.monotonic() > deadline:
            raise RunError(f"run {run.name} has a supervisor, {lock}; this one leaves")
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
