"""The job's main process: start the ranks, mark their checkpoints, hear the warnings, decide what follows.

    python -m orchestrator.slurm.supervisor RUN

A warning (the time limit's SIGUSR2, a SIGTERM) becomes a stop request in the attempt's folder; the
ranks agree on it at a step boundary, save, and leave with 75. Only this process marks a checkpoint as
complete. How an attempt ended is written last, to outcome.json.
"""

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from orchestrator import exit_codes
from orchestrator.checkpoints import complete_checkpoints, mark_complete
from orchestrator.events import (
    CheckpointEvent,
    CheckpointWrittenEvent,
    StartEvent,
    StepEvent,
    event_record,
    read_events,
)
from orchestrator.exit_codes import CAUSE_OF_CODE, Cause
from orchestrator.files import JsonLines, read_json, read_json_lines, write_json
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.recovery import Action, Decision, Ending, decide
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.ranks import Preload, Ranks, start_ranks
from orchestrator.slurm.submission import code_environment, submit

POLL_SECONDS = 0.05
PEER_GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves after the first one failed, so that each can say why."""
SHIPPER_SECONDS = 120.0

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

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._plan: TrainingPlan = read_plan(run.plan)
        self._reason = ""
        self._deadline: float | None = None
        self._preload: Preload | None = None

    def main(self) -> int:
        """Run attempts until the run is finished, stopped, or goes on in another job."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._hear)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while True:
                decision = self._attempt()
                if decision.action == Action.RESTART:
                    continue
                if decision.action == Action.REQUEUE:
                    self._requeue()
                return 0 if decision.action in (Action.FINISH, Action.REQUEUE) else 1
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
        shipper = self._start_shipper(attempt)
        watched = self._watch(attempt, notes)
        steps = [event.step for _, event in read_events(attempt.events) if isinstance(event, StartEvent | StepEvent)]
        ending = Ending(cause=watched.cause, saved_step=self._saved_step(attempt.number))
        history = self._history(attempt)
        decision = decide(
            [ending for _, ending in history],
            ending,
            self._plan.settings.max_restarts_without_progress,
            started_from=self._saved_step((history[0][0] if history else attempt.number) - 1),
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
                "exit_codes": {str(rank): code for rank, code in sorted(watched.exit_codes.items())},
                "action": decision.action,
                "why": decision.why,
            },
        )
        log.info("attempt %d ended: %s (%s); %s: %s", attempt.number, watched.cause, watched.message,
                 decision.action, decision.why)  # fmt: skip
        self._end_shipper(shipper)
        return decision

    def _watch(self, attempt: AttemptDirectory, notes: JsonLines) -> Watched:
        """Start the ranks, follow them to their end, and say what ended them."""
        ranks: Ranks | None = None
        try:
            ranks = self._start(attempt)
            return self._follow(attempt, ranks, notes)
        except Exception as error:
            log.exception("the supervisor failed")
            if ranks is not None:
                ranks.kill()
            message = f"the supervisor failed: {type(error).__name__}: {error}"
            return Watched(cause=Cause.EXCEPTION, message=message, rank=None, host=None, exit_codes={})

    def _follow(self, attempt: AttemptDirectory, ranks: Ranks, notes: JsonLines) -> Watched:
        """Mark checkpoints, pass stop requests on, and end what a failed rank has left behind."""
        offset = 0
        first_failure: tuple[float, dict[int, int]] | None = None
        codes: dict[int, int] = {}
        asked = False
        while len(codes) < ranks.count:
            time.sleep(POLL_SECONDS)
            codes = ranks.ended()
            offset = mark_written(self._run, attempt, offset, notes)
            if self._reason and not asked:
                write_json(attempt.stop_request, {"reason": self._reason, "time": time.time()})
                asked = True
                log.info("asked the ranks to save and leave: %s", self._reason)
            if first_failure is None and any(code not in (0, exit_codes.SAVED_AND_LEFT) for code in codes.values()):
                first_failure = (time.monotonic(), codes)
            late = first_failure is not None and time.monotonic() - first_failure[0] > PEER_GRACE_SECONDS
            if late or (self._deadline is not None and time.monotonic() > self._deadline):
                ranks.kill()
        mark_written(self._run, attempt, offset, notes)
        return explain(attempt, codes if first_failure is None else first_failure[1], codes, self._reason)

    def _start(self, attempt: AttemptDirectory) -> Ranks:
        cluster = self._plan.settings.cluster
        if cluster.scheduler == "local" and cluster.device == "cpu":
            if self._preload is None or not self._preload.is_alive:
                self._preload = Preload(self._run, self._plan)
            self._preload.wait_until_ready()
        return start_ranks(self._run, attempt, self._plan, self._preload)

    def _job_record(self, started: float) -> dict[str, Any]:
        submissions = self._submissions()
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
        }

    def _submissions(self) -> list[dict[str, Any]]:
        return [record for _, record in read_json_lines(self._run.submissions)]

    def _saved_step(self, attempt: int) -> int:
        """Return the step of the newest checkpoint that an attempt or one before it wrote."""
        return max((c.step for c in complete_checkpoints(self._run) if c.attempt <= attempt), default=0)

    def _history(self, current: AttemptDirectory) -> list[tuple[int, Ending]]:
        """Return number and ending of the attempts since a person last started the run.

        An attempt whose supervisor was lost has no outcome, and counts as one that ended so.
        """
        by_a_person = [float(record["time"]) for record in self._submissions() if record["by"] == "person"]
        endings = []
        for attempt in self._run.attempts():
            job = attempt.read_job()
            if attempt.number >= current.number or job is None or float(job["started"]) < max(by_a_person, default=0):
                continue
            outcome = attempt.read_outcome()
            cause = Cause(outcome["cause"]) if outcome is not None else Cause.SUPERVISOR_LOST
            endings.append((attempt.number, Ending(cause=cause, saved_step=self._saved_step(attempt.number))))
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
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            log.info("goes on as job %s", submit(self._run, by="supervisor"))
            return
        log.info("requeues job %s", job)
        subprocess.run(["scontrol", "requeue", job], check=True)
        signal.pause()  # Slurm's TERM follows at once


def mark_written(run: RunDirectory, attempt: AttemptDirectory, offset: int, notes: JsonLines) -> int:
    """Mark the checkpoints that the ranks have told of since `offset`, and return how far was read."""
    for after, event in read_events(attempt.events, offset):
        offset = after
        if isinstance(event, CheckpointWrittenEvent):
            checkpoint = mark_complete(
                run.checkpoint_path(event.name),
                step=event.step,
                attempt=attempt.number,
                consumed_samples=event.consumed_samples,
                data_fingerprint=event.data_fingerprint,
                files=event.files,
            )
            notes.append(
                event_record(
                    CheckpointEvent(
                        time=time.time(),
                        step=event.step,
                        name=event.name,
                        bytes=checkpoint.size_bytes,
                        seconds=event.seconds,
                    )
                )
            )
    return offset


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
    killed = [rank for rank, code in sorted(first.items()) if code > 128]
    if killed and asked in ("cancelled", "stopped", "time_limit"):
        return Watched(cause=Cause(asked), message=f"asked to stop ({asked}), ended before it could save", rank=None,
                       host=None, exit_codes=codes)  # fmt: skip
    if killed:
        name = signal.Signals(first[killed[0]] - 128).name
        return Watched(cause=Cause.RANK_KILLED, message=f"rank {killed[0]} was killed by {name}", rank=killed[0],
                       host=socket.gethostname(), exit_codes=codes)  # fmt: skip
    if records:
        record = records[0]
        message = in_one_line(record["message"])
        cause = CAUSE_OF_CODE.get(codes.get(record["rank"], 1), Cause.EXCEPTION)
        step = f" after step {record['step']}" if record["step"] is not None else " before the first step"
        return Watched(cause=cause, message=f"rank {record['rank']} on {record['host']}{step}: {record['error']}: "
                       f"{message}", rank=record["rank"], host=record["host"], exit_codes=codes)  # fmt: skip
    if set(codes.values()) == {exit_codes.FINISHED}:
        return Watched(cause=Cause.FINISHED, message="all steps are done", rank=None, host=None, exit_codes=codes)
    if set(codes.values()) == {exit_codes.SAVED_AND_LEFT} and asked:
        return Watched(cause=Cause(asked), message="saved and left", rank=None, host=None, exit_codes=codes)
    return Watched(cause=Cause.EXCEPTION, message=f"ranks ended with {codes}", rank=None, host=None, exit_codes=codes)


def main(path: str) -> int:
    """Supervise a run; the exit code is that of the job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)sZ supervisor %(levelname)s %(message)s", force=True)
    logging.Formatter.converter = time.gmtime
    try:
        return Supervisor(RunDirectory(Path(path))).main()
    except Exception:
        log.exception("the supervisor failed")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
