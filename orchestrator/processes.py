"""Whether a recorded process still lives: the same number may belong to another one by now."""

import psutil


def living_process(number: int, created: float) -> psutil.Process | None:
    """Return the process of this host with a number and a time of creation, unless it has ended.

    Args:
        created: Unix time; within a second, which is how far two readings of it may differ.
    """
    try:
        process = psutil.Process(number)
        is_same = abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if is_same else None
