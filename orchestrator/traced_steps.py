"""Which steps of which ranks are traced: what `profile.steps` says, and whether a run still comes to them. Pure."""

import re

from orchestrator.settings import ProfileSettings


def traced_steps(profile: ProfileSettings) -> range:
    """Return the steps to trace, counted from 1; none where none are asked for, or where they make no sense."""
    parts = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", profile.steps)
    if parts is None:
        return range(0)
    first = int(parts[1])
    return range(max(1, first), int(parts[2] or first) + 1)


def profile_problems(profile: ProfileSettings, world_size: int) -> list[str]:
    """Return what is wrong with the choice itself, each with its remedy."""
    if not profile.steps:
        return []
    found = []
    if not traced_steps(profile):
        found.append(f"profile.steps={profile.steps!r} should read FIRST-LAST, counted from 1; write it as 20-22")
    if not profile.ranks:
        found.append("profile.ranks is empty; name ranks, or leave profile.steps away")
    missing = [rank for rank in profile.ranks if not 0 <= rank < world_size]
    if missing:
        found.append(f"profile.ranks has {missing}, and the run has {world_size} ranks; use 0 to {world_size - 1}")
    return found


def unreachable_problems(profile: ProfileSettings, done_steps: int, total_steps: int) -> list[str]:
    """Return whether a start after so many steps does not come to all the traced ones."""
    steps = traced_steps(profile)
    if not steps or (done_steps < steps[0] and steps[-1] <= total_steps):
        return []
    return [
        f"profile.steps={profile.steps} should lie within {done_steps + 1}-{total_steps}, the steps that are to come; "
        "choose others, or leave it away"
    ]
