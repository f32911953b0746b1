"""Follow the ranks of an attempt to their end: mark checkpoints, pass stop requests on, end what a failure has left."""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator import exit_codes
from orchestrator.checkpoint_keeper import CheckpointKeeper
from orchestrator.checkpoints import VISIBLE_SECONDS
from orchestrator.errors import StorageError
from orchestrator.exit_codes import Cause
from orchestrator.files import is_full, read_json, write_json
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory
from orchestrator.slurm.endings import AttemptEnding, explain_ending, first_srun_failure, srun_words
from orchestrator.slurm.ranks import SRUN_SECONDS_WITHOUT_A_NODE, Ranks
from orchestrator.slurm.stop_requests import StopRequests
from orchestrator.slurm.storage import Storage, Work

POLL_SECONDS = 0.05
FAILURE_LOOK_SECONDS = 0.3
PEER_GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves after the first one failed, so that each can say why."""
MARGIN_SECONDS = 30.0
"""How much later than the ranks themselves their supervisor takes them for hung."""
TAIL_CHARACTERS = 600

log = logging.getLogger("supervisor")


class RankWatch:
    """What is seen of one start of the ranks."""

    def __init__(
        self,
        attempt: AttemptDirectory,
        ranks: Ranks,
        keeper: CheckpointKeeper,
        stops: StopRequests,
        storage: Storage,
        plan: TrainingPlan,
    ) -> None:
        self._attempt = attempt
        self._ranks = ranks
        self._keeper = keeper
        self._stops = stops
        self._storage = storage
        self._patience = plan.settings.patience
        self._world_size = plan.layout.world_size
        self._is_told_to_stop = False
        self._looked_for_failures = 0.0
        self._looking: Work[bool] | None = None
        self._trouble: float | None = None
        """Since when the run's file system fails."""
        self._told_bytes = 0
        self._told = time.monotonic()
        """When the ranks told something last."""

    def follow(
        self,
        look_around: Callable[[], None],
        first_dead: Callable[[], tuple[str, str] | None],
        killed_for_memory: Callable[[], Mapping[str, str]],
        ranks_on: Sequence[str],
    ) -> AttemptEnding:
        """Return how the ranks ended.

        Args:
            look_around: raises where the run is no longer ours.
            first_dead: returns a node with ranks that is dead, with why, or None.
            killed_for_memory: returns the nodes that have killed for memory since the ranks started, in words.
            ranks_on: nodes in the order of ranks; none without Slurm.

        Raises:
            OSError: the run's file system is full.
            StorageError: it fails, or does not answer, for too long.
        """
        codes: dict[int, int] = {}
        failed_at: float | None = None
        first_codes: dict[int, int] | None = None
        is_killed_late = False
        while len(codes) < self._ranks.count:
            is_told = self._look_aside(look_around)
            codes = self._ranks.ended()
            dead = first_dead()
            if dead is not None:
                self._ranks.kill(SRUN_SECONDS_WITHOUT_A_NODE)
                self._end_looking(look_around)
                return self._without_a_node(*dead)
            if failed_at is None and (_is_bad(codes) or is_told):
                failed_at, first_codes = time.monotonic(), codes
            if failed_at is None and self._silence() > 0:
                return self._silent_ranks()
            is_late = failed_at is not None and time.monotonic() - failed_at > PEER_GRACE_SECONDS
            if is_late or (self._stops.deadline is not None and time.monotonic() > self._stops.deadline):
                srun_log = self._storage.do(self._ranks.srun_log)  # what it tells from here on is our doing
                is_killed_late = not is_late
                first_codes = codes if first_codes is None else first_codes
                self._ranks.kill()
                codes = self._ranks.ended()
                break
        else:
            srun_log = self._storage.do(self._ranks.srun_log)
        self._end_looking(look_around)
        if not self._storage.do(lambda: self._is_settled(codes)):
            message = f"the ranks left well, and after {VISIBLE_SECONDS:.0f} s their last checkpoint is not whole here"
            return AttemptEnding(cause=Cause.EXCEPTION, message=message, exit_codes=codes)
        failures = self._storage.do(lambda: [read_json(path) for path in self._attempt.failures.glob("rank_*.json")])
        first = codes if first_codes is None else first_codes
        return explain_ending(
            sorted(failures, key=_time_of),
            first,
            codes,
            asked=self._stops.asked,
            srun=first_srun_failure(srun_log),
            words=srun_words(srun_log),
            is_killed_late=is_killed_late,
            host=socket.gethostname(),
            world_size=self._world_size,
            ranks_on=ranks_on,
            killed_for_memory=killed_for_memory() if _is_bad(first) or _is_bad(codes) else {},
        )

    def _look_aside(self, look_around: Callable[[], None]) -> bool:
        """Look at files in a thread, a moment long; return whether a failure is told of in one.

        One error of a shared file system is no reason to end hundreds of ranks, and one that stands is waited for.
        """
        if self._looking is None:
            self._looking = Work(lambda: self._look(look_around))
        if not self._looking.is_done(POLL_SECONDS):
            self._storage.check(self._looking)
            return False
        looked, self._looking = self._looking, None
        try:
            is_told = looked.result()
        except OSError as error:
            if is_full(error):
                raise
            if self._trouble is None:
                self._trouble = time.monotonic()
                log.warning("the run's folder cannot be read: %s", error)
            if time.monotonic() - self._trouble > self._patience.storage_seconds:
                raise StorageError(f"the run's folder has failed for too long: {error}") from error
            return False
        finally:
            time.sleep(POLL_SECONDS)
        self._trouble = None
        self._storage.check()
        return is_told

    def _end_looking(self, look_around: Callable[[], None]) -> None:
        while self._looking is not None:
            self._look_aside(look_around)

    def _look(self, look_around: Callable[[], None]) -> bool:
        if self._stops.is_asked and not self._is_told_to_stop:
            # Before Slurm is asked what its TERM meant: that may take as long as there is.
            reason = self._stops.asked or Cause.STOPPED
            write_json(self._attempt.stop_request, {"reason": reason, "time": time.time()})
            self._is_told_to_stop = True
            log.info("asked the ranks to save and leave: %s", reason)
        self._keeper.look()
        if self._keeper.told_bytes != self._told_bytes:
            self._told_bytes, self._told = self._keeper.told_bytes, time.monotonic()
        look_around()
        self._stops.look()
        return self._is_failure_told()

    def _silence(self) -> float:
        """Return for how many seconds too long the ranks have told nothing; they should have seen it themselves."""
        limits = self._patience
        longest = max(limits.step_seconds, limits.validation_seconds, limits.save_seconds)
        if not self._keeper.has_stepped:
            longest = max(longest, limits.start_seconds)
        return time.monotonic() - self._told - longest - MARGIN_SECONDS

    def _is_failure_told(self) -> bool:
        """Whether srun or a rank has told of a failure; looked at once in a while, as disks are shared."""
        if time.monotonic() - self._looked_for_failures < FAILURE_LOOK_SECONDS:
            return False
        self._looked_for_failures = time.monotonic()
        return first_srun_failure(self._ranks.srun_log()) is not None or any(self._attempt.failures.iterdir())

    def _silent_ranks(self) -> AttemptEnding:
        """End ranks of which none could tell that it hangs."""
        said = self._ranks.srun_log().strip()[-TAIL_CHARACTERS:]
        self._ranks.kill()
        message = (
            f"the ranks told nothing for {time.monotonic() - self._told:.0f} s, and none could say where it stands: "
            "stopped, or in the kernel or in native code"
        )
        return AttemptEnding(
            cause=Cause.HANG, message=message + (f"; srun said: {said}" if said else ""), exit_codes=self._ranks.ended()
        )

    def _without_a_node(self, node: str, why: str) -> AttemptEnding:
        self._storage.do(self._keeper.look)
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
