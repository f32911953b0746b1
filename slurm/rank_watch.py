"""Follow the ranks of an attempt to their end: mark checkpoints, pass stop requests on, end what a failure has left."""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator import exit_codes
from orchestrator.checkpoint_keeper import CheckpointKeeper
from orchestrator.checkpoints import VISIBLE_SECONDS
from orchestrator.exit_codes import Cause
from orchestrator.files import is_full, read_json, write_json
from orchestrator.run_directory import AttemptDirectory
from orchestrator.slurm.endings import AttemptEnding, explain_ending, first_srun_failure, srun_words
from orchestrator.slurm.ranks import SRUN_SECONDS_WITHOUT_A_NODE, Ranks
from orchestrator.slurm.stop_requests import StopRequests

POLL_SECONDS = 0.05
FAILURE_LOOK_SECONDS = 0.3
PEER_GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves after the first one failed, so that each can say why."""
DISK_SECONDS = 60.0
"""How long the run's file system may fail before the ranks are given up."""

log = logging.getLogger("supervisor")


class RankWatch:
    """What is seen of one start of the ranks."""

    def __init__(self, attempt: AttemptDirectory, ranks: Ranks, keeper: CheckpointKeeper, stops: StopRequests) -> None:
        self._attempt = attempt
        self._ranks = ranks
        self._keeper = keeper
        self._stops = stops
        self._is_told_to_stop = False
        self._looked_for_failures = 0.0
        self._trouble: float | None = None
        """Since when the run's file system fails."""

    def follow(
        self, look_around: Callable[[], None], first_dead: Callable[[], tuple[str, str] | None]
    ) -> AttemptEnding:
        """Return how the ranks ended.

        Args:
            look_around: raises where the run is no longer ours.
            first_dead: returns a node with ranks that is dead, with why, or None.

        Raises:
            OSError: the run's file system is full, or has failed for too long.
        """
        codes: dict[int, int] = {}
        failed_at: float | None = None
        first_codes: dict[int, int] | None = None
        is_killed_late = False
        while len(codes) < self._ranks.count:
            time.sleep(POLL_SECONDS)
            codes = self._ranks.ended()
            is_told = self._look(look_around)
            dead = first_dead()
            if dead is not None:
                return self._without_a_node(*dead)
            if failed_at is None and (_is_bad(codes) or is_told):
                failed_at, first_codes = time.monotonic(), codes
            is_late = failed_at is not None and time.monotonic() - failed_at > PEER_GRACE_SECONDS
            if is_late or (self._stops.deadline is not None and time.monotonic() > self._stops.deadline):
                srun_log = self._ranks.srun_log()  # what it tells from here on is our doing
                is_killed_late = not is_late
                first_codes = codes if first_codes is None else first_codes
                self._ranks.kill()
                codes = self._ranks.ended()
                break
        else:
            srun_log = self._ranks.srun_log()
        if not self._is_settled(codes):
            message = f"the ranks left well, and after {VISIBLE_SECONDS:.0f} s their last checkpoint is not whole here"
            return AttemptEnding(cause=Cause.EXCEPTION, message=message, exit_codes=codes)
        return explain_ending(
            sorted(map(read_json, self._attempt.failures.glob("rank_*.json")), key=_time_of),
            codes if first_codes is None else first_codes,
            codes,
            asked=self._stops.asked,
            srun=first_srun_failure(srun_log),
            words=srun_words(srun_log),
            is_killed_late=is_killed_late,
            host=socket.gethostname(),
        )

    def _look(self, look_around: Callable[[], None]) -> bool:
        """Do what has to do with files, and return whether a failure is told of in one.

        One error of a shared file system is no reason to end hundreds of ranks.
        """
        try:
            if self._stops.is_asked and not self._is_told_to_stop:
                # Before Slurm is asked what its TERM meant: that may take as long as there is.
                reason = self._stops.asked or Cause.STOPPED
                write_json(self._attempt.stop_request, {"reason": reason, "time": time.time()})
                self._is_told_to_stop = True
                log.info("asked the ranks to save and leave: %s", reason)
            self._keeper.look()
            look_around()
            self._stops.look()
            is_told = self._is_failure_told()
        except OSError as error:
            if is_full(error) or (self._trouble is not None and time.monotonic() - self._trouble > DISK_SECONDS):
                raise
            if self._trouble is None:
                self._trouble = time.monotonic()
                log.warning("the run's folder cannot be read: %s", error)
            return False
        self._trouble = None
        return is_told

    def _is_failure_told(self) -> bool:
        """Whether srun or a rank has told of a failure; looked at once in a while, as disks are shared."""
        if time.monotonic() - self._looked_for_failures < FAILURE_LOOK_SECONDS:
            return False
        self._looked_for_failures = time.monotonic()
        return first_srun_failure(self._ranks.srun_log()) is not None or any(self._attempt.failures.iterdir())

    def _without_a_node(self, node: str, why: str) -> AttemptEnding:
        self._ranks.kill(SRUN_SECONDS_WITHOUT_A_NODE)
        self._keeper.look()
        if self._stops.asked is not None:  # Slurm has ended what was told to save
            message = f"asked to stop ({self._stops.asked}), ended before it could save"
            return AttemptEnding(cause=self._stops.asked, message=message)
        return AttemptEnding(cause=Cause.NODE_FAILED, message=f"node {node}: {why}", host=node)

    def _is_settled(self, codes: dict[int, int]) -> bool:
        """Wait until the checkpoint of ranks that left well is marked; a shared disk may show it late."""
        self._keeper.look()
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not _is_bad(codes) and not self._keeper.is_settled:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
            self._keeper.look()
        return True


def _is_bad(codes: dict[int, int]) -> bool:
    return any(code not in (exit_codes.FINISHED, exit_codes.SAVED_AND_LEFT) for code in codes.values())


def _time_of(record: Mapping[str, Any]) -> float:
    return float(record["time"])
