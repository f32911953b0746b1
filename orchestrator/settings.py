"""The typed schema of a run's configuration, with its defaults. Values only.

Standard library only: the workers read the same types from the run's plan.json. What is composed
from YAML and overrides is `config.py`'s business.
"""

import dataclasses
from typing import Literal

from orchestrator.model_shape import TransformerShape

RANDOM_BASE = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on."""

    train: tuple[str, ...]
    """Data set folders, each written by `orchestrate tokenize`."""
    weights: tuple[float, ...] = ()
    """Share of samples from each data set; empty means in proportion to their tokens."""
    validation: tuple[str, ...] = ()
    """Held-out data set folders; empty means no validation."""
    sequence_length: int = 4096
    """Tokens a sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is trained."""

    tokens: int
    """Tokens to train on, rounded up to whole steps."""
    learning_rate: float = 3e-5
    minimum_learning_rate: float = 3e-6
    warmup_share: float = 0.01
    """Share of the steps over which the rate rises from zero."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    gradient_clip: float = 1.0
    """Largest global gradient norm."""
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 1234
    validation_interval_steps: int = 500
    validation_samples: int = 512
    """Held-out sequences a validation reads, rounded up to whole passes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """The rank grid; data parallelism is what is left of the ranks."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    """Model chunks a pipeline rank holds; 1 is the plain schedule."""
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1024
    """Sequences a step, over all ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the state is saved; the end and every interruption save as well."""

    interval_steps: int = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Where it runs and what an hour costs."""

    name: str
    scheduler: Literal["local", "slurm"]
    device: Literal["cpu", "cuda"]
    nodes: int = 1
    ranks_per_node: int = 8
    """One rank a GPU."""
    gpu: str = ""
    gpu_memory_gb: float | None = None
    """Decimal gigabytes of one device."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one device; where missing, workers measure a matrix product at the start."""
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"
    """Of one job, as Slurm writes it: [days-]hours:minutes:seconds."""
    warning_seconds: int = 300
    """How long before the time limit the run is told to save and leave."""
    price_per_gpu_hour: float | None = None
    worker_python: str | None = None
    """Interpreter of the workers; empty means the one that launched."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables set for the workers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The MLflow store."""

    uri: str = ""
    """Empty means a SQLite file beside the runs."""
    experiment: str = "orchestrate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSettings:
    """Where things live; ~ is the home directory."""

    runs: str = "~/orchestrate/runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that a recipe says."""

    name: str
    """Of the run and of its folder."""
    base: str
    """Hugging Face folder to start from, or `random` for new weights."""
    model: TransformerShape
    data: DataSettings
    training: TrainingSettings
    layout: LayoutSettings = LayoutSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings
    tracking: TrackingSettings = TrackingSettings()
    paths: PathSettings = PathSettings()
    max_restarts_without_progress: int = 2
    """Attempts in a row that saved nothing new after which the run stops."""
