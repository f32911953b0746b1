"""Which checkpoints a run may let go: one pure function of what is there and what the settings keep."""

from collections.abc import Sequence

from orchestrator.checkpoints import Checkpoint, lineage, parse_name
from orchestrator.settings import CheckpointSettings

UNTOUCHABLE = 2
"""The newest complete checkpoints that are never deleted: one may turn out to be damaged."""


def expendable(
    folders: Sequence[str], marked: Sequence[Checkpoint], settings: CheckpointSettings, attempt: int
) -> dict[str, str]:
    """Return the names of checkpoint folders that may be deleted, each with the reason.

    Args:
        folders: every folder name under checkpoints/.
        marked: the complete checkpoints that were not found damaged, of all branches.
        attempt: the start that is running; what it is writing is not touched.
    """
    branch = lineage(marked)
    if len(branch) < UNTOUCHABLE:
        return {}  # nothing goes before something newer is there twice
    steps = [checkpoint.step for checkpoint in branch]
    kept = set(steps[-max(UNTOUCHABLE, settings.keep_last) :])
    if settings.keep_every_steps:
        kept |= {step for step in steps if step % settings.keep_every_steps == 0}
    kept |= {checkpoint.step for checkpoint in best_checkpoints(branch, settings.keep_best)}
    stays = {checkpoint.name for checkpoint in branch if checkpoint.step in kept}
    on_branch, complete = {c.name for c in branch}, {c.name for c in marked}
    found = {}
    for name in folders:
        place = parse_name(name)
        if place is None or name in stays:
            continue
        if name in on_branch:
            found[name] = "newer ones are kept"
        elif name in complete:
            found[name] = "an abandoned branch: a later attempt went on from before it"
        elif place[1] < attempt and sum(step > place[0] for step in steps) >= UNTOUCHABLE:
            found[name] = "never completed, or damaged"
    return found


def best_checkpoints(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """Return those with the lowest held-out losses, the best first; of equal ones the earlier."""
    measured = [
        (checkpoint.facts.validation_loss, checkpoint.step, checkpoint)
        for checkpoint in checkpoints
        if checkpoint.facts.validation_loss is not None
    ]
    return [checkpoint for _, _, checkpoint in sorted(measured, key=lambda entry: entry[:2])[:count]]


def kept_at_most(total_steps: int, settings: CheckpointSettings) -> int:
    """Return how many checkpoints lie on the disk at once, the one being written included."""
    for_ever = total_steps // settings.keep_every_steps + 1 if settings.keep_every_steps else 0  # step 0 as well
    written = total_steps // settings.interval_steps + 2  # step 0, and the last or an interruption
    return min(written, max(UNTOUCHABLE, settings.keep_last) + settings.keep_best + for_ever + 1)
