"""How a rank ends, below 128 so that a code is never taken for a signal. Standard library only."""

from enum import StrEnum

FINISHED = 0
EXCEPTION = 1
BAD_CONFIG = 70
BAD_DATA = 71
BAD_CHECKPOINT = 72
NOT_FINITE = 73
DISK_FULL = 74
SAVED_AND_LEFT = 75
HANG = 76
OUT_OF_MEMORY = 77
SUPERSEDED = 78
HARDWARE = 79
SPIKE = 80
PRECISION = 81


class Cause(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    TIME_LIMIT = "time_limit"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    RANK_KILLED = "rank_killed"
    HANG = "hang"
    """A rank stood still for longer than `patience` allows."""
    OUT_OF_MEMORY = "out_of_memory"
    """A rank was killed for its node's memory, or an allocation failed."""
    START_FAILED = "start_failed"
    """srun could not start the ranks."""
    NODE_FAILED = "node_failed"
    NODE_CHECK = "node_check"
    """Too few nodes of the allocation passed their checks."""
    EXCEPTION = "exception"
    NOT_FINITE = "not_finite"
    SPIKE = "spike"
    """The loss or the gradient norm rose at once, and the settings say to stop."""
    HARDWARE = "hardware"
    """A rank computed wrongly: the same step gave another result, or its weights are not those of its replicas."""
    PRECISION = "precision"
    """FP8 was asked for and did not run."""
    BAD_DATA = "bad_data"
    BAD_CONFIG = "bad_config"
    BAD_CHECKPOINT = "bad_checkpoint"
    DISK_FULL = "disk_full"
    STORAGE = "storage"
    """The file system of the run's folder stopped answering."""
    SUPERSEDED = "superseded"
    """Another supervisor took the run over."""
    SUPERVISOR_FAILED = "supervisor_failed"
    """The supervisor met an error of its own, and wrote it down."""
    SUPERVISOR_LOST = "supervisor_lost"
    """It was killed, or its node died: nothing was written down."""


CAUSE_OF_CODE = {
    FINISHED: Cause.FINISHED,
    EXCEPTION: Cause.EXCEPTION,
    BAD_CONFIG: Cause.BAD_CONFIG,
    BAD_DATA: Cause.BAD_DATA,
    BAD_CHECKPOINT: Cause.BAD_CHECKPOINT,
    NOT_FINITE: Cause.NOT_FINITE,
    DISK_FULL: Cause.DISK_FULL,
    HANG: Cause.HANG,
    OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    SUPERSEDED: Cause.SUPERSEDED,
    HARDWARE: Cause.HARDWARE,
    SPIKE: Cause.SPIKE,
    PRECISION: Cause.PRECISION,
}
"""SAVED_AND_LEFT is not here: its cause is the reason of the stop request."""
