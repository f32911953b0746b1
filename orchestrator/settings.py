"""The typed schema of a run's configuration, with its defaults. Values only.

Standard library only: the workers read the same types from the run's plan.json. What is composed
from YAML and overrides is `config.py`'s business. Each field's type says what a resume may do to it.
"""

import dataclasses
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from orchestrator.model_shape import TransformerShape

RANDOM_BASE = "random"

T = TypeVar("T")


class Rule(StrEnum):
    """What may happen to a field when a run is resumed."""

    FREE = "free"
    """Changes nothing that is trained."""
    RECORDED = "recorded"
    """May change what follows; allowed, and written down with the resume."""
    PHASE = "needs a phase"
    """Which samples come, in which order: from some token on, never in between."""
    FIXED = "fixed"
    """Another value is another run."""


Free = Annotated[T, Rule.FREE]
Recorded = Annotated[T, Rule.RECORDED]
Phase = Annotated[T, Rule.PHASE]
Fixed = Annotated[T, Rule.FIXED]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """A blend that follows the one before it."""

    from_tokens: int
    """It begins with the first step before which the run has read at least so many tokens."""
    train: tuple[str, ...]
    """Data set folders; one that was read before goes on where it was left."""
    weights: tuple[float, ...] = ()
    """Share of the phase's samples from each data set; empty means in proportion to their tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on."""

    train: Phase[tuple[str, ...]]
    """Data set folders, each written by `orchestrate tokenize`."""
    weights: Phase[tuple[float, ...]] = ()
    """Share of samples from each data set; empty means in proportion to their tokens."""
    phases: Phase[tuple[PhaseSettings, ...]] = ()
    """Blends that follow the first one, which is `train` with `weights`; in the order of their tokens."""
    validation: Recorded[tuple[str, ...]] = ()
    """Held-out data set folders, each with a loss of its own; empty means no validation."""
    sequence_length: Fixed[int] = 4096
    """Tokens a sample."""
    index: Free[str] = ""
    """Folder that `orchestrate data index` made for this run; empty means that rank 0 builds the index at the start."""
    stage_to: Free[str] = ""
    """Folder on a disk of each node, such as /scratch, to which shards are copied and from which ranks read them."""
    wait_alarm_share: Free[float] = 0.1
    """Share of a step from which on it is told that a rank waited for its samples."""

    @property
    def training_folders(self) -> tuple[str, ...]:
        """The training data sets of all phases, each once."""
        return tuple(dict.fromkeys([*self.train, *(folder for phase in self.phases for folder in phase.train)]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchStage:
    """A part of the run with a global batch of its own."""

    global_batch_size: int
    """Sequences a step, over all ranks."""
    until_tokens: int
    """Of the whole run; the step that reaches it is the stage's last one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenPart:
    """What of the model keeps its bits over the first steps of the run."""

    what: str
    """`embeddings`, `output`, `final norm`, `layers 0-23,40-47`, or of an up-scaled base `old layers`, `new layers`."""
    steps: int
    """From the first step on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How it is trained."""

    tokens: Recorded[int]
    """Tokens to train on, rounded up to whole steps."""
    learning_rate: Recorded[float] = 3e-5
    minimum_learning_rate: Recorded[float] = 3e-6
    warmup_share: Recorded[float] = 0.01
    """Share of the steps over which the rate rises to the full one."""
    warmup_steps: Recorded[int | None] = None
    """Steps of the warm-up instead of a share, so that it stays what it is where the run is prolonged."""
    warmup_from: Recorded[float] = 0.0
    """Rate from which the warm-up rises; a continued pretraining may begin at the rate that the base ended with."""
    decay: Recorded[Literal["cosine", "linear", "constant", "wsd"]] = "cosine"
    """How the rate falls to the minimum at the last step; `wsd` is warm-up, stable, decay."""
    decay_share: Recorded[float] = 0.1
    """Share of the steps, the last ones, over which `wsd` decays."""
    decay_form: Recorded[Literal["1-sqrt", "linear"]] = "1-sqrt"
    """How `wsd` decays."""
    batch_ramp: Recorded[tuple[BatchStage, ...]] = ()
    """Stages with other batches, before `layout.global_batch_size`; a resume may change what is still to come."""
    frozen: Recorded[tuple[FrozenPart, ...]] = ()
    """Parts of the model that are not trained at first; a resume may change what is still to come."""
    weight_decay: Recorded[float] = 0.1
    """Of matrices; norms have none."""
    decay_embeddings: Recorded[bool] = True
    """Whether the word embeddings, and an output layer tied to them, have weight decay."""
    adam_beta1: Recorded[float] = 0.9
    adam_beta2: Recorded[float] = 0.95
    adam_eps: Recorded[float] = 1e-8
    gradient_clip: Recorded[float] = 1.0
    """Largest global gradient norm."""
    deterministic: Recorded[bool] = False
    """Deterministic kernels, so that a GPU gives the same bits again; slower there. A CPU gives them anyway."""
    seed: Fixed[int] = 1234
    check_tokenizer: Free[bool] = True
    """Whether a start from a base wants data made with a tokenizer that lies in the base's folder."""
    check_first_loss: Free[bool] = True
    """Whether a start from a base compares its loss with the one recorded in the base, and stops where they differ."""
    validation_interval_steps: Free[int] = 500
    validation_samples: Recorded[int] = 512
    """Held-out sequences a validation reads, rounded up to whole passes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """In which numbers it is trained; conf/precision has the usual ones, and docs/precision.md says what each is."""

    dtype: Recorded[Literal["fp32", "bf16"]] = "bf16"
    """Of weights and activations. Master weights, moments and sums of gradients are fp32."""
    fp8: Recorded[Literal["none", "tensorwise", "delayed", "blockwise", "mxfp8"]] = "none"
    """How Transformer Engine scales the matrix products of the layers, of attention's own not, when they are in FP8."""
    fp8_format: Recorded[Literal["hybrid", "e4m3"]] = "hybrid"
    """`hybrid` has E4M3 forward and E5M2 for gradients."""
    first_bf16_layers: Recorded[int] = 0
    """So many first layers stay in bf16."""
    last_bf16_layers: Recorded[int] = 0
    amax_history: Recorded[int] = 1024
    """With `delayed`: steps over which the largest value is looked for; megatron-core's default of 1 is no history."""
    amax_choice: Recorded[Literal["max", "most_recent"]] = "max"
    """With `delayed`: what of that history scales."""
    gap_check_steps: Free[int] = 500
    """With FP8: how often the same held-out batch is computed in bf16 and in FP8; 0 is never."""
    gap_alarm: Free[float] = 0.01
    """Relative difference of these two losses that is told as an alarm."""
    ffn_input_steps: Free[int] = 100
    """How often the largest input of each layer's second FFN matrix is told; 0 is never."""
    ffn_input_alarm: Free[float] = 10_000.0
    """Largest input that is told as an alarm: outliers there precede the divergence of FP8 runs (arXiv 2409.12517)."""

    @property
    def label(self) -> str:
        """What it is called: `fp32`, `bf16`, `fp8-tensorwise`."""
        return self.dtype if self.fp8 == "none" else f"fp8-{self.fp8}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericsSettings:
    """What is done about numbers that are not as they should be; a step in doubt is computed again before anything."""

    window: Recorded[int] = 128
    """Steps, the newest ones that were applied, with which a loss and a gradient norm are compared."""
    spike_score: Recorded[float] = 10.0
    """Robust standard deviations above their median from which a loss or a norm is a spike; 0 looks for none. Batches
    of 128 tokens, as noisy as they come, stay below 8."""
    on_not_finite: Recorded[Literal["skip", "rollback", "stop"]] = "skip"
    """After a batch that gives no finite loss or gradients: its gradients are dropped, or also the steps since the
    newest checkpoint are taken back, or the run stops."""
    on_spike: Recorded[Literal["record", "skip", "rollback", "stop"]] = "skip"
    """After a batch that gives a spike; `record` applies its gradients all the same, and only says so."""
    max_skipped_steps: Recorded[int] = 4
    """Skips and rollbacks allowed within `window` steps, a rollback counted once; the next one stops the run."""
    max_hardware_events: Free[int] = 2
    """Steps of an attempt that one node may compute wrongly; with the last of them the run leaves it."""
    replica_check_steps: Free[int] = 500
    """How often the data-parallel replicas' weights are compared, and before each save as well; 0 is never."""
    rank_time_steps: Free[int] = 100
    """How often each rank's seconds of computing are measured; 0 is never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """The rank grid; data parallelism is what is left of the ranks."""

    tensor_parallel: Recorded[int] = 1
    pipeline_parallel: Recorded[int] = 1
    virtual_pipeline_parallel: Recorded[int] = 1
    """Model chunks a pipeline rank holds; 1 is the plain schedule."""
    sequence_parallel: Recorded[bool] = False
    context_parallel: Recorded[int] = 1
    """Ranks that share each sequence, of which each has an early and a late part."""
    micro_batch_size: Recorded[int] = 1
    global_batch_size: Fixed[int] = 1024
    """Sequences a step, over all ranks."""
    overlap_gradient_reduce: Recorded[bool] = False
    """Whether gradients are reduced over the replicas while the rest of the backward pass is computed."""
    overlap_parameter_gather: Recorded[bool] = False
    """Whether the new weights are gathered while the next forward pass is computed; needs the former."""
    bucket_parameters: Recorded[int] = 0
    """Parameters that are reduced at once with overlap; 0 is megatron-core's own choice, 40 million or more."""
    recompute: Recorded[Literal["none", "selective", "full"]] = "none"
    """What the backward pass computes again instead of keeping it: nothing, the core of attention, or whole layers."""
    recompute_method: Recorded[Literal["uniform", "block"]] = "uniform"
    """With `full`: `uniform` cuts the layers of a model chunk into groups of `recompute_layers` and keeps each group's
    input; `block` recomputes the first `recompute_layers` of a chunk and keeps all of the others."""
    recompute_layers: Recorded[int] = 1
    """Layers, as the method says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Which steps of which ranks are traced with torch's profiler; nothing of it is loaded where none are."""

    steps: Free[str] = ""
    """First and last step, `20-22`, or one, `20`; counted from 1 as everywhere. Empty traces none."""
    ranks: Free[tuple[int, ...]] = (0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the state is saved, and which checkpoints stay; the end and every interruption save as well.

    The newest two stay whatever is said here.
    """

    interval_steps: Recorded[int] = 500
    keep_last: Free[int] = 3
    """How many of the newest stay."""
    keep_every_steps: Free[int] = 0
    """Those of every so many steps stay for ever; 0 keeps none for that."""
    keep_best: Free[int] = 1
    """How many with the lowest held-out loss stay; it is known where a validation falls on the same step."""
    asynchronous: Free[bool] = True
    """Whether training goes on while ranks write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatienceSettings:
    """How long a phase may last before the run counts as hung; a hung rank leaves its stacks and is started again.

    A limit should be several times what the phase takes: a run that is only slow must not be ended for it.
    """

    start_seconds: Free[float] = 1800
    """Until the first step of an attempt is done: imports, rendezvous, loading, what is compiled."""
    step_seconds: Free[float] = 600
    """Of a step after the first."""
    validation_seconds: Free[float] = 1800
    save_seconds: Free[float] = 1800
    """Of a save until a rank's part is on disk, also while training goes on."""
    storage_seconds: Free[float] = 300
    """How long the run's folder may fail or not answer before the ranks are given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What a site asks of a job beyond partition, account and time; each is left to Slurm where it is not set."""

    qos: Free[str | None] = None
    reservation: Free[str | None] = None
    constraint: Free[str | None] = None
    """Features of the nodes, as `--constraint` takes them."""
    exclusive: Free[bool] = False
    """Whole nodes for this job alone."""
    exclude: Free[tuple[str, ...]] = ()
    """Nodes that are never taken."""
    switches: Free[str | None] = None
    """Most switches and how long to wait for them: `2@01:00:00`."""
    gpus: Free[Literal["gpus-per-node", "gres", "none"]] = "gpus-per-node"
    """How the GPUs of a node are asked for; `none` where whole nodes come with theirs."""
    gpu_type: Free[str | None] = None
    """The site's name of the GPUs, put before their number."""
    memory: Free[str | None] = None
    """Of a node, as `--mem` takes it; `0` is all of it."""
    cpus_per_rank: Free[int | None] = None
    """Asked of sbatch and of srun, which inherits it no more since Slurm 22.05."""
    cpu_bind: Free[str | None] = None
    """srun's `--cpu-bind`."""
    memory_bind: Free[str | None] = None
    """srun's `--mem-bind`; `local` keeps a rank on its NUMA node."""
    requeue: Free[bool] = True
    """Whether the site lets a job be requeued; otherwise the run goes on in a successor."""
    modules: Free[tuple[str, ...]] = ()
    """Environment modules to load before the supervisor."""
    setup: Free[tuple[str, ...]] = ()
    """Shell lines of the job's script before the supervisor."""
    pre_command: Free[tuple[str, ...]] = ()
    """Words before each rank's command, such as a binding script of the site."""
    sbatch_lines: Free[tuple[str, ...]] = ()
    """Further options of sbatch, each as it is written: `--comment=pretraining`."""
    srun_lines: Free[tuple[str, ...]] = ()
    """Further options of srun where it starts ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """In what the ranks run; the supervisor runs outside of it."""

    runtime: Recorded[Literal["none", "pyxis", "apptainer"]] = "none"
    image: Recorded[str] = ""
    """A file of the shared disk, or what the runtime can fetch."""
    mounts: Recorded[tuple[str, ...]] = ()
    """`from:to` or `from:to:ro`; run folder, data and base are mounted anyway."""
    arguments: Recorded[tuple[str, ...]] = ()
    """Further options of the runtime, each as it is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeCheckSettings:
    """What a node must pass before ranks start on it."""

    enabled: Free[bool] = True
    seconds: Free[int] = 120
    """Within which a node must have answered."""
    without: Free[tuple[str, ...]] = ()
    """Names of checks to leave out."""
    limits: Free[dict[str, float]] = dataclasses.field(default_factory=dict)
    """Other limits than a check's own, by its name."""
    own: Free[dict[str, str]] = dataclasses.field(default_factory=dict)
    """A site's checks by name: shell commands run on each node, that fail with what is wrong as their last line."""
    silent_seconds: Free[float] = 15.0
    """A node from which nothing was heard for so long counts as dead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Where it runs and what an hour costs."""

    name: Recorded[str]
    scheduler: Recorded[Literal["local", "slurm"]]
    device: Recorded[Literal["cpu", "cuda"]]
    nodes: Recorded[int] = 1
    ranks_per_node: Recorded[int] = 8
    """One rank a GPU."""
    spare_nodes: Free[int] = 0
    """Nodes beyond `nodes` to ask for; one that fails is replaced by one of them, in the same allocation."""
    gpu: Recorded[str] = ""
    gpu_memory_gb: Free[float | None] = None
    """Decimal gigabytes of one device."""
    peak_tflops: Free[float | None] = None
    """Dense bf16 peak of one device; where missing, workers measure a matrix product at the start."""
    partition: Free[str | None] = None
    account: Free[str | None] = None
    time_limit: Free[str] = "24:00:00"
    """Of one job, as Slurm writes it: [days-]hours:minutes:seconds."""
    warning_seconds: Free[int] = 300
    """How long before the time limit the run is told to save and leave."""
    price_per_gpu_hour: Free[float | None] = None
    node_write_gb_per_second: Free[float] = 0.5
    """Decimal gigabytes a second that a node can be counted on to write while all others do."""
    worker_python: Recorded[str | None] = None
    """Interpreter of the workers; empty means the one that launched."""
    environment: Recorded[dict[str, str]] = dataclasses.field(default_factory=dict)
    """Variables of the ranks. They count more than what a launch sets by itself; an empty value takes one away."""
    one_machine: Free[bool] = False
    """Whether all nodes are this machine, as in a sandbox, and see its disk."""
    fork_ranks: Recorded[bool] = False
    """Whether CPU ranks are forked from one preloaded process; for nodes that are one machine, never on GPUs."""
    slurm: SlurmSettings = SlurmSettings()
    container: ContainerSettings = ContainerSettings()
    checks: NodeCheckSettings = NodeCheckSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The MLflow store."""

    uri: Free[str] = ""
    """Empty means a SQLite file beside the runs."""
    experiment: Free[str] = "orchestrate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathSettings:
    """Where things live; ~ is the home directory."""

    runs: Fixed[str] = "~/orchestrate/runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that a recipe says."""

    name: Fixed[str]
    """Of the run and of its folder."""
    base: Fixed[str]
    """Hugging Face folder to start from, or `random` for new weights."""
    model: Fixed[TransformerShape]
    data: DataSettings
    training: TrainingSettings
    layout: LayoutSettings = LayoutSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profile: ProfileSettings = ProfileSettings()
    precision: PrecisionSettings = PrecisionSettings()
    numerics: NumericsSettings = NumericsSettings()
    cluster: ClusterSettings
    tracking: TrackingSettings = TrackingSettings()
    paths: PathSettings = PathSettings()
    patience: PatienceSettings = PatienceSettings()
    max_restarts_without_progress: Free[int] = 2
    """Failures in a row that saved nothing new after which the run stops; preemptions are not counted here."""
    max_preemptions_without_progress: Free[int] = 10
    """Preemptions, and jobs with too few healthy nodes, in a row that saved nothing new after which it stops."""
