"""Every error that a user can meet, in one tree.

    OrchestrateError            exit code 1
    ├── ConfigError             2   the configuration or the command line asks for what cannot be
    │   └── LayoutError             a size that does not divide
    ├── DataError               1   text, tokenizer or data set
    ├── ModelFolderError        1   a Hugging Face folder that is none, or of another kind
    ├── CheckpointError         1   missing, incomplete or damaged
    ├── NumericsError           1   numbers that are not as they should be
    │   ├── NotFiniteError          a batch gives no finite loss or gradients
    │   ├── SpikeError              a batch gives a loss or gradients far above those before
    │   ├── HardwareError           a rank computed wrongly
    │   └── PrecisionError          FP8 was asked for and did not run
    ├── DiskFullError           1   no space, quota or inodes for what has to be written
    ├── StorageError            1   the file system of a run does not answer
    ├── RunError                1   a run folder: taken, missing, in the wrong state
    ├── SchedulerError          3   Slurm or the local executor refuses or does not answer
    └── TrackingError           3   the tracking store refuses or does not answer

A message says what was wanted, what was found and what to do. `problems` holds several at once.
"""

from collections.abc import Sequence


class OrchestrateError(Exception):
    """An error for the user, printed without a traceback.

    Args:
        message: what was wanted, what was found, what to do.
        problems: more than one finding, each printed on a line of its own under the message.
    """

    exit_code = 1

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class ConfigError(OrchestrateError):
    """The configuration or the command line asks for what cannot be."""

    exit_code = 2


class LayoutError(ConfigError):
    """A size that cannot be divided as asked."""


class DataError(OrchestrateError):
    """Text, a tokenizer or a data set that cannot be used."""


class ModelFolderError(OrchestrateError):
    """A Hugging Face folder that is none, is incomplete, or holds another architecture."""


class CheckpointError(OrchestrateError):
    """A checkpoint that is missing, incomplete, damaged, or of another model."""


class NumericsError(OrchestrateError):
    """Numbers of the training that are not as they should be."""


class NotFiniteError(NumericsError):
    """A batch gives a loss or a gradient norm that is NaN or infinite, and gives it again."""


class SpikeError(NumericsError):
    """A batch gives a loss or a gradient norm far above those before, and gives it again."""


class HardwareError(NumericsError):
    """A rank computed wrongly.

    Args:
        message: what was wanted, what was found, what to do.
        ranks: that are to blame, as far as that is known.
        hosts: of these ranks.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), hosts: Sequence[str] = ()) -> None:
        self.ranks = tuple(ranks)
        self.hosts = tuple(hosts)
        super().__init__(message)


class PrecisionError(NumericsError):
    """A rank did not compute in the numbers that were asked for."""


class DiskFullError(OrchestrateError):
    """No space, quota or inodes are left for what has to be written."""


class StorageError(OrchestrateError):
    """The file system of a run's folder fails or does not answer; nothing is wrong with what lies there."""


class RunError(OrchestrateError):
    """A run folder that is taken, missing, or in the wrong state for the request."""


class SchedulerError(OrchestrateError):
    """Slurm or the local executor refused or did not answer."""

    exit_code = 3


class TrackingError(OrchestrateError):
    """The tracking store refused or did not answer."""

    exit_code = 3
