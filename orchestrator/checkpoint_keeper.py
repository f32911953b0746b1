"""What the supervisor does for an attempt's checkpoints: mark the whole ones, set damaged ones aside, delete old ones.

It follows what the attempt's own ranks tell and nobody else, so that what ranks of a lost start still
write is never marked.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoints import (
    DAMAGED,
    MARKER,
    CheckpointFacts,
    mark_complete,
    mark_damaged,
    marked_checkpoints,
    parse_name,
    read_parts,
)
from orchestrator.errors import RunError
from orchestrator.events import (
    CheckpointEvent,
    DamageEvent,
    EndEvent,
    RemovedEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
    read_events,
)
from orchestrator.files import JsonLines
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.retention import expendable
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.version import VERSION


def mark_left_over(run: RunDirectory, notes: JsonLines, is_owner: Callable[[], bool] = lambda: True) -> None:
    """Mark what the newest attempt's ranks had put on disk whole when their supervisor was lost.

    For a supervisor before its own first ranks start.
    """
    attempts = [attempt for attempt in run.attempts() if attempt.plan.exists()]
    if attempts and attempts[-1].read_outcome() is None:
        CheckpointKeeper(run, attempts[-1], read_plan(attempts[-1].plan), notes, is_owner).look()


class CheckpointKeeper:
    """Keeps the checkpoints of one attempt's ranks.

    Args:
        is_owner: whether this process is the run's supervisor still; asked before each marking.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: AttemptDirectory,
        plan: TrainingPlan,
        notes: JsonLines,
        is_owner: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._plan = plan
        self._notes = notes
        self._is_owner = is_owner
        self._offset = 0
        self._ancestry: tuple[str, ...] = ()
        self._losses: dict[int, float] = {}
        self._waiting: list[SaveEvent] = []
        self._has_ended = False
        self.has_stepped = False
        """Whether the ranks have done a step."""

    def look(self) -> None:
        """Read what the ranks have told, and mark what they have put on disk since.

        Raises:
            CheckpointError: what the ranks wrote makes no whole checkpoint.
            RunError: the run has another supervisor by now.
            OSError: such as a full disk.
        """
        for after, event in read_events(self._attempt.events, self._offset):
            self._offset = after
            if isinstance(event, StartEvent):
                self._ancestry = tuple(event.ancestry)
            elif isinstance(event, ValidationEvent):
                self._losses[event.step] = event.loss
            elif isinstance(event, DamageEvent):
                path = self._run.checkpoint_path(event.name)
                if (path / MARKER).exists():  # not deleted meanwhile
                    mark_damaged(path, event.problems, event.time)
            elif isinstance(event, SaveEvent):
                self._waiting.append(event)
            elif isinstance(event, StepEvent):
                self.has_stepped = True
            elif isinstance(event, EndEvent):
                self._has_ended = True
        for save in list(self._waiting):
            if self._mark_if_written(save):
                self._waiting.remove(save)
                self._let_go()

    @property
    def told_bytes(self) -> int:
        """How much the ranks have told so far."""
        return self._offset

    @property
    def is_settled(self) -> bool:
        """Whether the ranks have said that they leave, and all that they saved is marked."""
        return self._has_ended and not self._waiting

    def discard_unfinished(self) -> None:
        """Remove what this attempt's ranks have begun and will not finish, to give back its space."""
        if not self._is_owner():
            return
        for path in self._folders():
            place = parse_name(path.name)
            if place is not None and place[1] == self._attempt.number and not (path / MARKER).exists():
                self._remove(path, "never completed: the attempt has ended")

    def _mark_if_written(self, save: SaveEvent) -> bool:
        path = self._run.checkpoint_path(save.name)
        if (path / MARKER).exists():
            return True
        parts = read_parts(path, self._plan.layout.world_size)
        if parts is None:
            return False
        if not self._is_owner():
            raise RunError(f"run {self._run.name} has another supervisor by now; {save.name} was not marked")
        settings = self._plan.settings
        facts = CheckpointFacts(
            step=save.step,
            attempt=self._attempt.number,
            ancestry=self._ancestry,
            consumed_samples=save.consumed_samples,
            data_fingerprint=save.data_fingerprint,
            tokenizer_sha256=save.tokenizer_sha256,
            model=settings.model,
            layout=self._plan.layout.describe(),
            precision=settings.precision.label,
            validation_loss=self._losses.get(save.step),
            code_version=VERSION,
            written=time.time(),
            skipped=tuple((first, last) for first, last in save.skipped),
            recent_losses=tuple(save.recent_losses),
            recent_norms=tuple(save.recent_norms),
        )
        checkpoint = mark_complete(path, facts, parts)
        slowest = max(parts, key=lambda part: part.write_seconds)
        event = CheckpointEvent(
            time=facts.written,
            step=save.step,
            name=save.name,
            bytes=checkpoint.size_bytes,
            seconds=max(0.0, facts.written - (save.time - save.stall_seconds)),
            write_seconds=slowest.write_seconds,
            hash_seconds=slowest.hash_seconds,
        )
        self._notes.append(event_record(event))
        return True

    def _let_go(self) -> None:
        """Delete what the settings do not keep."""
        if not self._is_owner():
            return
        marked = marked_checkpoints(self._run)
        names = [path.name for path in self._folders()]
        for name, why in expendable(names, marked, self._plan.settings.checkpoint, self._attempt.number).items():
            self._remove(self._run.checkpoint_path(name), why)

    def _remove(self, path: Path, why: str) -> None:
        """Delete a checkpoint, its marker first: what is left of an interrupted deletion is no checkpoint."""
        (path / MARKER).unlink(missing_ok=True)
        (path / DAMAGED).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        place = parse_name(path.name)
        step = place[0] if place else 0
        self._notes.append(event_record(RemovedEvent(time=time.time(), step=step, name=path.name, why=why)))

    def _folders(self) -> list[Path]:
        folder = self._run.checkpoints_folder
        return sorted(folder.iterdir()) if folder.exists() else []
