"""What a run has read of which data set in which phase, and what it will: counted in its sample index, not reckoned.

What counts is the surviving trajectory: up to the last step told while an attempt goes on, otherwise up to the newest
checkpoint, from which the next one would begin. Steps that a guard skipped have read their samples, which the weights
do not know; they are counted apart. Samples of a run that this one was branched from are among its own.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_solar.sample_order import BLEND_SHARDS, BlendSource, SamplePlaces, index_problem
from megatron_solar.sample_request import SampleRequest, request_of, unique_names
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.doubts import surviving
from orchestrator.events import Event, StartEvent, StepEvent, read_events
from orchestrator.phases import planned_phases
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.step_documents import index_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One data set in one phase."""

    phase: int
    """From 0, which is `data.train`."""
    data_set: str
    """Name of its folder, with a number behind it where another is called so."""
    folder: str
    samples: int
    """Read, those of skipped steps included."""
    skipped_samples: int
    """Read by steps whose gradients were dropped."""
    tokens: int
    """Of `samples`."""
    epochs: float
    """`samples` as a multiple of the data set's."""
    share: float | None
    """Of what the phase has read; None before its first sample."""
    share_asked: float
    planned_samples: int | None
    """Still to be read; None where the index of the whole plan is not built yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerPhase:
    """A phase as the plan has it."""

    number: int
    first_step: int
    first_sample: int
    end_sample: int
    """Before which the next one begins, or the plan ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataLedger:
    """What a run has read, and what it will."""

    run: str
    step: int
    """Up to which it counts."""
    is_saved: bool
    """Whether that is the newest checkpoint's; otherwise steps after it would be read again after a failure."""
    samples: int
    tokens: int
    skipped_steps: int
    planned_samples: int
    """Of the whole plan."""
    data_fingerprint: str
    """Of what was read."""
    phases: tuple[LedgerPhase, ...]
    entries: tuple[LedgerEntry, ...]
    epochs: dict[str, float]
    """Of each data set over all phases."""


def data_ledger(run: RunDirectory, index: Path | None = None) -> DataLedger:
    """Count what a run has read.

    Args:
        index: a folder of `orchestrate data index` to read, instead of the run's own index.

    Raises:
        DataError: data sets or index are no longer those of the run.
    """
    plan = read_plan(run.plan)
    request = request_of(plan)
    told = [[event for _, event in read_events(attempt.events)] for attempt in run.attempts()]
    step, is_saved = _position(run, told)
    consumed = plan.consumed_samples(step)
    skipped = [number for number in _skipped_steps(run, told) if number <= step]
    given = index or (Path(plan.settings.data.index) if plan.settings.data.index else run.data_index)
    folder = index_of(run, plan, request, consumed, index) if consumed else given / "train"
    is_whole = not index_problem(folder, request.digests()["train"])
    places = _places(request.train, folder) if consumed or is_whole else None
    spans = [(plan.consumed_samples(number - 1), plan.consumed_samples(number)) for number in skipped]
    phases = _phases(plan)
    folders = _folders_of_shards(request)
    entries = tuple(
        entry
        for phase in phases
        for entry in _entries(request, phase, folders, places, consumed, spans, is_whole=is_whole)
    )
    read: Counter[str] = Counter()
    for entry in entries:
        read[entry.data_set] += entry.samples
    of_folder = _epoch_samples(request, folders)
    sizes = {entry.data_set: of_folder[entry.folder] for entry in entries}
    return DataLedger(
        run=run.name,
        step=step,
        is_saved=is_saved,
        samples=consumed,
        tokens=plan.consumed_tokens(step),
        skipped_steps=len(skipped),
        planned_samples=request.train.samples,
        data_fingerprint=request.fingerprint_at(consumed),
        phases=phases,
        entries=entries,
        epochs={name: count / sizes[name] for name, count in read.items()},
    )


def _position(run: RunDirectory, told: Sequence[Sequence[Event]]) -> tuple[int, bool]:
    """Return the step up to which the run has come, and whether its newest checkpoint is of it."""
    attempts, checkpoints = run.attempts(), complete_checkpoints(run)
    saved = checkpoints[-1].step if checkpoints else 0
    steps = [event.step for event in told[-1] if isinstance(event, StartEvent | StepEvent)] if told else []
    goes_on = bool(steps) and attempts[-1].read_outcome() is None
    step = steps[-1] if goes_on else saved
    return step, step == saved


def _skipped_steps(run: RunDirectory, told: Sequence[Sequence[Event]]) -> list[int]:
    """Return the steps of the surviving trajectory whose gradients were dropped."""
    checkpoints = complete_checkpoints(run)
    spans = [*(checkpoints[-1].facts.skipped if checkpoints else ()), *(event.skipped for event in surviving(told))]
    return sorted({step for span in spans if span is not None for step in range(span[0], span[1] + 1)})


def _places(source: BlendSource, folder: Path) -> SamplePlaces:
    """Open an index, which may have been built before a later phase's shards were planned, when there was one alone."""
    if not (folder / BLEND_SHARDS).exists():
        source = dataclasses.replace(source, prefixes=source.prefixes[:1], epoch_samples=source.epoch_samples[:1])
    return SamplePlaces(source, folder)


def _phases(plan: TrainingPlan) -> tuple[LedgerPhase, ...]:
    """Return the phases that have steps in the plan."""
    planned, total = planned_phases(plan), plan.consumed_samples(plan.total_steps)
    ends = [*(min(phase.first_sample, total) for phase in planned[1:]), total]
    return tuple(
        LedgerPhase(number=phase.number, first_step=phase.first_step, first_sample=phase.first_sample, end_sample=end)
        for phase, end in zip(planned, ends, strict=True)
        if phase.first_sample < end
    )


def _entries(
    request: SampleRequest,
    phase: LedgerPhase,
    folders: Sequence[str],
    places: SamplePlaces | None,
    consumed: int,
    skipped: Sequence[tuple[int, int]],
    *,
    is_whole: bool,
) -> list[LedgerEntry]:
    """Return what each data set gave and will give to a phase.

    Args:
        folders: the data set's of each shard.
        consumed: samples read in the whole run.
        skipped: first sample and end of each step that was skipped.
        is_whole: whether the index goes to the end of the plan.
    """
    (blend,) = (blend for blend, _ in request.train.phases() if blend.first_sample == phase.first_sample)
    begin, end = phase.first_sample, phase.end_sample
    until = min(max(consumed, begin), end)

    def by_folder(spans: Iterable[tuple[int, int]]) -> Counter[str]:
        found: Counter[str] = Counter()
        for first, last in spans:
            if places is not None and first < last:
                for folder, count in zip(folders, places.count(first, last), strict=False):
                    found[folder] += int(count)
        return found

    read = by_folder([(begin, until)])
    dropped = by_folder(span for span in skipped if begin <= span[0] < until)
    planned = by_folder([(until, end)]) if is_whole else None
    asked: dict[str, float] = {}
    for shard, weight in zip(blend.shards, blend.weights, strict=True):
        asked[folders[shard]] = asked.get(folders[shard], 0.0) + weight / sum(blend.weights)
    sizes = _epoch_samples(request, folders)
    names = dict(zip(request.data.training_folders, unique_names(request.data.training_folders), strict=True))
    return [
        LedgerEntry(
            phase=phase.number,
            data_set=names[folder],
            folder=folder,
            samples=read[folder],
            skipped_samples=dropped[folder],
            tokens=read[folder] * request.data.sequence_length,
            epochs=read[folder] / sizes[folder],
            share=read[folder] / (until - begin) if until > begin else None,
            share_asked=share,
            planned_samples=None if planned is None else planned[folder],
        )
        for folder, share in asked.items()
    ]


def _folders_of_shards(request: SampleRequest) -> list[str]:
    """Return the data set's folder of each shard."""
    of_prefix = {
        str(Path(folder) / shard.name): folder
        for folder, manifest in request.manifests.items()
        for shard in manifest.shards
    }
    return [of_prefix[prefix] for prefix in request.train.prefixes]


def _epoch_samples(request: SampleRequest, folders: Sequence[str]) -> Counter[str]:
    """Return the samples of each data set by its folder, as far as it has been read from there."""
    sizes: Counter[str] = Counter()
    for _prefix, folder, size in set(zip(request.train.prefixes, folders, request.train.epoch_samples, strict=True)):
        sizes[folder] += size
    return sizes
