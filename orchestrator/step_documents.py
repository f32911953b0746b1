"""Which documents a step of a run saw: from its plan and its sample index, without ranks, torch or megatron.

A sample of a shard's epoch is cut from its documents in the order that megatron wrote down, in three arrays:
`shuffle_index` (the sample's place), `sample_index` (in which document of the order a place begins, and at which
token; the next row is where it ends) and `document_index` (the order). A sample has one token more than the
sequence, its last label; so the last token of a sample is the first of the one beside it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_solar.prebuilt_index import prebuilt_problems
from megatron_solar.sample_order import SamplePlaces, index_problem
from megatron_solar.sample_request import SampleRequest, request_of
from orchestrator.errors import DataError, OrchestrateError, RunError
from orchestrator.events import StepEvent, read_events
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.tokenize.decoder import load_decoder
from orchestrator.tokenize.shard_reader import ShardReader

SHOWN_TOKENS = 40
"""Decoded of each part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentPart:
    """Tokens [start, stop) of a document, as one sample has them."""

    document: int
    """Number in its data set, from 0."""
    document_in_shard: int
    start: int
    stop: int
    document_tokens: int
    """Of the whole document, its end included."""
    begins: str
    """The text of its first tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleDocuments:
    """Where a sample's tokens come from."""

    sample: int
    """Number in the run, from 0."""
    folder: str
    """The data set."""
    shard: str
    """Its name in the data set."""
    epoch: int
    """Of the shard, from 0."""
    parts: tuple[DocumentPart, ...]
    """One after another they are sequence_length + 1 tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDocuments:
    """The samples of a step and which attempt trained on them."""

    step: int
    attempt: int
    others: tuple[int, ...]
    """Earlier attempts that did the step as well; their result counts no more."""
    global_batch_size: int
    """Samples of the step."""
    samples: tuple[SampleDocuments, ...]
    """Those asked for, from its first."""


def step_documents(
    run: RunDirectory, step: int, *, count: int | None = None, index: Path | None = None
) -> StepDocuments:
    """Say which documents a step saw; the attempt that did it last counts.

    Args:
        step: from 1, as in the events.
        count: of the step's samples; by default all.
        index: a folder of `orchestrate data index` to read, instead of the run's own index.

    Raises:
        RunError: no attempt has done the step.
        DataError: data sets or index are no longer those of the run.
    """
    done = [attempt for attempt in run.attempts() if _has_done(attempt, step)]
    if not done:
        origin = run.branched_from()
        before = f", though it went on from {origin} of another run" if origin is not None else ""
        raise RunError(f"run {run.name} has not done step {step}{before}; see `orchestrate status {run.name}`")
    plan = read_plan(done[-1].plan)
    request = request_of(plan)
    first, end = plan.consumed_samples(step - 1), plan.consumed_samples(step)
    folder = index_of(run, plan, request, end, index)
    size = end - first
    reader = SampleReader(request, folder)
    return StepDocuments(
        step=step,
        attempt=done[-1].number,
        others=tuple(attempt.number for attempt in done[:-1]),
        global_batch_size=size,
        samples=tuple(reader.sample(number) for number in range(first, first + min(size, count or size))),
    )


def _has_done(attempt: AttemptDirectory, step: int) -> bool:
    return any(isinstance(event, StepEvent) and event.step == step for _, event in read_events(attempt.events))


def index_of(
    run: RunDirectory, plan: TrainingPlan, request: SampleRequest, samples: int, given: Path | None = None
) -> Path:
    """Return the folder with the training split's index for the first samples of an attempt's.

    An order begins the same however long it is and whatever phases follow, so that the index of a run that was
    prolonged since, or given another phase, serves as well.

    Raises:
        DataError: there is none, and how to make one.
    """
    own = Path(plan.settings.data.index) if plan.settings.data.index else run.data_index
    candidates = [given] if given is not None else [own, run.data_index]
    problems = []
    for folder in candidates:
        problem = index_problem(folder / "train", request.digests()["train"])
        if not problem or (given is None and _begins_the_same(run, folder, request, samples)):
            return folder / "train"
        problems.append(problem)
    if given is not None:
        problems = prebuilt_problems(given, request)
    raise DataError(
        f"run {run.name}: no sample index of the attempt's samples is there any more; build it again with `orchestrate "
        f"data index {run.config} --output DIR`, then add --index DIR:",
        list(dict.fromkeys(problems)),
    )


def _begins_the_same(run: RunDirectory, folder: Path, request: SampleRequest, samples: int) -> bool:
    """Return whether the folder's index was built for another attempt, and has the same first samples."""
    shards = request.train.prefixes
    for attempt in run.attempts():
        try:
            other = request_of(read_plan(attempt.plan))
        except (OSError, OrchestrateError):  # of a start that never came to it, or of another version
            continue
        is_same_order = other.fingerprint_at(samples) == request.fingerprint_at(samples)
        is_long_enough = other.train.samples >= samples
        # Both number the shards of their first phases the same.
        both = min(len(shards), len(other.train.prefixes))
        is_same_place = other.train.prefixes[:both] == shards[:both]
        is_built = is_same_order and is_long_enough and is_same_place
        if is_built and not index_problem(folder / "train", other.digests()["train"]):
            return True
    return False


class SampleReader:
    """Reads from an index where a sample's tokens are, and from the shards what they are."""

    def __init__(self, request: SampleRequest, folder: Path) -> None:
        self._source = request.train
        self._seed = request.seed
        self._places = SamplePlaces(request.train, folder)
        self._arrays = _epoch_arrays(folder)
        self._manifests = {str(Path(folder)): manifest for folder, manifest in request.manifests.items()}
        first = request.data.train[0]
        self._decoder = load_decoder(Path(first) / request.manifests[first].tokenizer_file)
        self._shards: dict[str, ShardReader] = {}

    def sample(self, number: int) -> SampleDocuments:
        """Say where a sample of the run is from."""
        shard, epoch, sample = self._places.place(number)
        prefix = self._source.prefixes[shard]
        document_index, sample_index, shuffle_index = self._epoch(prefix, epoch)
        place = int(shuffle_index[sample])
        (first, start), (last, stop) = (tuple(map(int, row)) for row in sample_index[place : place + 2])
        reader, before = self._shard(prefix)
        parts = []
        for index in range(first, last + 1):
            document = int(document_index[index])
            length = int(reader.lengths[document])
            begin = start if index == first else 0
            end = stop + 1 if index == last else length  # the last label
            parts.append(
                DocumentPart(
                    document=before + document,
                    document_in_shard=document,
                    start=begin,
                    stop=end,
                    document_tokens=length,
                    begins=self._decoder.text(reader.document(document, begin, min(end, begin + SHOWN_TOKENS))),
                )
            )
        path = Path(prefix)
        return SampleDocuments(sample=number, folder=str(path.parent), shard=path.name, epoch=epoch, parts=tuple(parts))

    def _shard(self, prefix: str) -> tuple[ShardReader, int]:
        """Return a shard, and the documents of its data set before it."""
        folder, before = Path(prefix).parent, 0
        for shard in self._manifests[str(folder)].shards:
            if shard.name == Path(prefix).name:
                if prefix not in self._shards:
                    self._shards[prefix] = ShardReader(folder, shard)
                return self._shards[prefix], before
            before += shard.documents
        raise DataError(f"{folder} has no shard {Path(prefix).name} any more")

    def _epoch(self, prefix: str, epoch: int) -> Sequence[NDArray[numpy.integer]]:
        base = self._arrays[prefix, self._seed + epoch]
        names = ("document_index", "sample_index", "shuffle_index")
        return [numpy.load(base.with_name(f"{base.name}-{name}.npy"), mmap_mode="r") for name in names]


def _epoch_arrays(folder: Path) -> Mapping[tuple[str, int], Path]:
    """Return where the arrays of each epoch begin, by its shard's prefix and its seed, as the descriptions say."""
    ending = "-description.txt"
    found = {}
    for path in folder.glob(f"*{ending}"):
        facts = json.loads(path.read_text())
        found[str(facts["dataset_path"]), int(facts["random_seed"])] = path.with_name(path.name.removesuffix(ending))
    return found
