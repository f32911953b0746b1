"""The job's main process: start the ranks, mark their checkpoints, hear the warnings, decide what follows.

    python -m orchestrator.slurm.supervisor RUN

A warning (the time limit's SIGUSR2, a SIGTERM) becomes a stop request in the attempt's folder; the
ranks agree on it at a step boundary, save, and leave with 75. Only this process marks a checkpoint as
complete. How an attempt ended is written last, to outcome.json.
"""

import contextlib
import dataclasses
import logging
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
from orchestrator.checkpoint_keeper import CheckpointKeeper, mark_left_over
from orchestrator.checkpoints import VISIBLE_SECONDS, complete_checkpoints, parse_name
from orchestrator.errors import OrchestrateError, RunError
from orchestrator.events import CheckpointEvent, StartEvent, StepEvent, read_events
from orchestrator.exit_codes import CAUSE_OF_CODE, Cause
from orchestrator.files import JsonLines, is_full, read_json, write_atomic, write_json
from orchestrator.owner_lock import OwnedLock, acquire
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.recovery import Action, Decision, Ending, decide
from orchestrator.run_directory import FILE_MASK, AttemptDirectory, RunDirectory
from orchestrator.slurm.ranks import Preload, Ranks, start_ranks
from orchestrator.slurm.submission import code_environment, submit

POLL_SECONDS = 0.05
LOOK_SECONDS = 1.0
LOCK_RENEWAL_SECONDS = 5.0
LOCK_STALE_SECONDS = 60.0
"""Age at which the lock of a supervisor on another host is taken over; its owner renews it much more often."""
PEER_GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves after the first one failed, so that each can say why."""
SHIPPER_SECONDS = 120.0
RESERVE_BYTES = 1 << 18
"""Kept on the disk for the outcome of a run that filled it."""

log = logging.getLogger("supervisor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen of one attempt."""

    cause: Cause
    message: str
    rank: int | None
    host: str | None
    exit_codes: dict[int, int]


class Supervisor:
    """Keeps one run alive in one allocation."""

    def __init__(self, run: RunDirectory, lock: OwnedLock) -> None:
        self._run = run
        self._lock = lock
        self._looked = time.monotonic()
        self._plan: TrainingPlan = read_plan(run.plan)
        self._reason = ""
        self._deadline: float | None = None
        self._preload: Preload | None = None

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
            if "SLURM_JOB_ID" in os.environ:
                # So that Slurm says CANCELLED, and starts what is left of the job in no case again.
                subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=False)
            return 1
        finally:
            if self._preload is not None:
                self._preload.close()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; the loop acts on it."""
        if number == signal.SIGTERM:
            self._reason = "cancelled" if self._run.cancel_mark.exists() else "stopped"
        elif not self._reason:
            self._reason = "time_limit"
        if self._deadline is None:
            self._deadline = time.monotonic() + self._plan.settings.cluster.warning_seconds

    def _attempt(self) -> Decision:
        attempt = self._run.new_attempt()
        started = time.time()
        write_json(attempt.job, self._job_record(started))
        log.info("attempt %d starts %d ranks", attempt.number, self._plan.layout.world_size)
        notes = JsonLines(attempt.supervisor_events)
        try:
            mark_left_over(self._run, notes, self._lock.is_mine)
        except RunError:  # another supervisor has the run
            raise
        except (OrchestrateError, OSError) as error:
            log.warning("what the attempt before has left is not marked: %s", error)
        keeper = CheckpointKeeper(self._run, attempt, self._plan, notes, self._lock.is_mine)
        shipper = self._start_shipper(attempt)
        watched = self._watch(attempt, keeper)
        if watched.cause == Cause.DISK_FULL:
            self._run.reserve.unlink(missing_ok=True)  # for a marker that had no room, and for the outcome
            with contextlib.suppress(OrchestrateError, OSError):
                keeper.look()
            keeper.discard_unfinished()
        steps = [event.step for _, event in read_events(attempt.events) if isinstance(event, StartEvent | StepEvent)]
        ending = Ending(cause=watched.cause, saved_step=newest_step(self._run))
        history = self._history(attempt)
        decision = decide(
            [ending for _, ending in history],
            ending,
            self._plan.settings.max_restarts_without_progress,
            started_from=saved_step(self._run, (history[0][0] if history else attempt.number) - 1),
        )
        notes.close()
        write_json(
            attempt.outcome,
            {
                "attempt": attempt.number,
                "cause": watched.cause,
                "message": watched.message,
                "rank": watched.rank,
                "host": watched.host,
                "first_step": steps[0] + 1 if steps else None,
                "last_step": steps[-1] if steps else None,
                "saved_step": ending.saved_step,
                "started": started,
                "ended": time.time(),
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
        self._end_shipper(shipper)
        return decision

    def _watch(self, attempt: AttemptDirectory, keeper: CheckpointKeeper) -> Watched:
        """Start the ranks, follow them to their end, and say what ended them."""
        ranks: Ranks | None = None
        try:
            ranks = self._start(attempt)
            return self._follow(attempt, ranks, keeper)
        except Exception as error:
            log.exception("the supervisor failed")
            if ranks is not None:
                ranks.kill()
            cause = Cause.DISK_FULL if is_full(error) else Cause.EXCEPTION
            if not self._lock.is_mine():
                cause = Cause.SUPERSEDED
            message = f"the supervisor failed: {type(error).__name__}: {error}"
            return Watched(cause=cause, message=message, rank=None, host=None, exit_codes={})

    def _follow(self, attempt: AttemptDirectory, ranks: Ranks, keeper: CheckpointKeeper) -> Watched:
        """Mark checkpoints, pass stop requests on, and end what a failed rank has left behind."""
        first_failure: tuple[float, dict[int, int]] | None = None
        codes: dict[int, int] = {}
        asked = False
        while len(codes) < ranks.count:
            time.sleep(POLL_SECONDS)
            codes = ranks.ended()
            keeper.look()
            self._look_around()
            if self._reason and not asked:
                write_json(attempt.stop_request, {"reason": self._reason, "time": time.time()})
                asked = True
                log.info("asked the ranks to save and leave: %s", self._reason)
            if first_failure is None and any(code not in (0, exit_codes.SAVED_AND_LEFT) for code in codes.values()):
                first_failure = (time.monotonic(), codes)
            late = first_failure is not None and time.monotonic() - first_failure[0] > PEER_GRACE_SECONDS
            if late or (self._deadline is not None and time.monotonic() > self._deadline):
                ranks.kill()
        keeper.look()
        deadline = time.monotonic() + VISIBLE_SECONDS
        while set(codes.values()) <= {exit_codes.FINISHED, exit_codes.SAVED_AND_LEFT} and not keeper.is_settled:
            if time.monotonic() > deadline:
                message = (
                    f"the ranks left well, and after {VISIBLE_SECONDS:.0f} s their last checkpoint is not whole here"
                )
                return Watched(cause=Cause.EXCEPTION, message=message, rank=None, host=None, exit_codes=codes)
            time.sleep(POLL_SECONDS)
            keeper.look()
        return explain(attempt, codes if first_failure is None else first_failure[1], codes, self._reason)

    def _look_around(self) -> None:
        """Every second: whether a person has cancelled, though no signal came, and whether the run is still ours.

        Raises:
            RunError: another supervisor has taken the run over.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if not self._lock.is_mine():
            raise RunError(f"run {self._run.name} has another supervisor by now")
        if self._run.cancel_mark.exists() and self._reason != "cancelled":
            self._hear(signal.SIGTERM, None)

    def _start(self, attempt: AttemptDirectory) -> Ranks:
        cluster = self._plan.settings.cluster
        if cluster.fork_ranks:
            if self._preload is None or not self._preload.is_alive:
                self._preload = Preload(self._run, self._plan)
            self._preload.wait_until_ready()
        return start_ranks(self._run, attempt, self._plan, self._preload)

    def _job_record(self, started: float) -> dict[str, Any]:
        submissions = self._run.submissions()
        return {
            "scheduler": self._plan.settings.cluster.scheduler,
            "job_id": os.environ.get("SLURM_JOB_ID")
            or (submissions[-1]["job_id"] if submissions else str(os.getppid())),
            "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "process": os.getpid(),
            "process_created": psutil.Process().create_time(),
            "host": socket.gethostname(),
            "nodes": os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()),
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

    def _end_shipper(self, shipper: "subprocess.Popen[bytes]") -> None:
        """Give the shipper time for the rest; what it leaves is shipped by a later attempt or `orchestrate ui`."""
        try:
            shipper.wait(SHIPPER_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("tracking is late; the rest is shipped later")
            shipper.kill()
            shipper.wait()

    def _requeue(self) -> None:
        """Have the run go on in another job."""
        if self._run.cancel_mark.exists():
            log.info("cancelled meanwhile; does not go on")
            return
        self._lock.release()  # for the supervisor of the next job
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            log.info("goes on as job %s", submit(self._run, by="supervisor"))
            return
        log.info("requeues job %s", job)
        subprocess.run(["scontrol", "requeue", job], check=True)
        signal.pause()  # Slurm's TERM follows at once


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


def in_one_line(text: str) -> str:
    """Return an error with its list of problems as one sentence."""
    first, *rest = (line.strip().removeprefix("- ") for line in text.splitlines() if line.strip())
    return " ".join([first, "; ".join(rest)]).strip()


def explain(attempt: AttemptDirectory, first: dict[int, int], codes: dict[int, int], asked: str) -> Watched:
    """Say what ended an attempt: the first failing rank, not the largest exit code.

    Args:
        first: exit codes when the first failure was seen.
        codes: all exit codes.
        asked: the reason of the stop request, or nothing.
    """
    records = sorted(
        (read_json(path) for path in attempt.failures.glob("rank_*.json")), key=lambda record: float(record["time"])
    )
    # A rank that knows its cause is believed before any signal: srun's code is the largest of all ranks', and
    # those that wait for a failed rank are killed or lose their connection.
    known = [record for record in records if record["exit_code"] != exit_codes.EXCEPTION]
    killed = [] if known else [rank for rank, code in sorted(first.items()) if code > 128]
    if killed and asked in ("cancelled", "stopped", "time_limit"):
        return Watched(cause=Cause(asked), message=f"asked to stop ({asked}), ended before it could save", rank=None,
                       host=None, exit_codes=codes)  # fmt: skip
    if killed:
        name = signal.Signals(first[killed[0]] - 128).name
        return Watched(cause=Cause.RANK_KILLED, message=f"rank {killed[0]} was killed by {name}", rank=killed[0],
                       host=socket.gethostname(), exit_codes=codes)  # fmt: skip
    if records:
        record = (known or records)[0]
        message = in_one_line(record["message"])
        cause = CAUSE_OF_CODE.get(record["exit_code"], Cause.EXCEPTION)
        step = f" after step {record['step']}" if record["step"] is not None else " before the first step"
        return Watched(cause=cause, message=f"rank {record['rank']} on {record['host']}{step}: {record['error']}: "
                       f"{message}", rank=record["rank"], host=record["host"], exit_codes=codes)  # fmt: skip
    if set(codes.values()) == {exit_codes.FINISHED}:
        return Watched(cause=Cause.FINISHED, message="all steps are done", rank=None, host=None, exit_codes=codes)
    if set(codes.values()) == {exit_codes.SAVED_AND_LEFT} and asked:
        return Watched(cause=Cause(asked), message="saved and left", rank=None, host=None, exit_codes=codes)
    failed = next((rank for rank, code in sorted(first.items()) if code in CAUSE_OF_CODE and code), None)
    cause = Cause.EXCEPTION if failed is None else CAUSE_OF_CODE[first[failed]]
    message = f"ranks ended with {codes} and left no record"
    return Watched(cause=cause, message=message, rank=failed, host=None, exit_codes=codes)


def main(path: str) -> int:
    """Supervise a run; the exit code is that of the job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)sZ supervisor %(levelname)s %(message)s", force=True)
    logging.Formatter.converter = time.gmtime
    os.umask(FILE_MASK)
    run = RunDirectory(Path(path))
    try:
        lock = take_run(run)
        threading.Thread(target=keep_renewing, args=(lock,), name="lock", daemon=True).start()
        try:
            return Supervisor(run, lock).main()
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


def take_run(run: RunDirectory) -> OwnedLock:
    """Become a run's only supervisor.

    One of another host that has stopped renewing its lock is waited for. A requeued job takes the run
    from its own former start at once: Slurm has given that one up, and it may live on a lost node.

    Raises:
        RunError: it has a living supervisor.
    """
    attempts = run.attempts()
    before = attempts[-1].read_job() if attempts else None
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and before is not None and before["job_id"] == job and before["restart_count"] < restarts:
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
    sys.exit(main(sys.argv[1]))
