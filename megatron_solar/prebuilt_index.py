"""A sample index that was built ahead, by `orchestrate data index`: what lies in it, and whether it is a run's.

    DIR/
      request.json           what the samples were asked for with, for people and for messages
      train/ validation/     as in `sample_order`, each with its complete.json

Training reads it and never writes there. No torch here: a launch is refused before it is submitted.
"""

from pathlib import Path

from megatron_solar.sample_order import index_problem
from megatron_solar.sample_request import SampleRequest
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json

REQUEST = "request.json"

# Of one epoch of a shard: its description as text, and three arrays, each behind numpy's header.
_FILES_AN_EPOCH = 4
_NUMPY_HEADER_BYTES = 128
_DESCRIPTION_BYTES = 700


def check_prebuilt(folder: Path, request: SampleRequest) -> None:
    """Refuse a folder that does not hold the whole index of a request.

    Raises:
        DataError: what is missing or differs, and how to make it.
    """
    problems = prebuilt_problems(folder, request)
    if problems:
        raise DataError(
            f"data.index={folder} should be the sample index of this run; make one with `orchestrate data index "
            "RECIPE [SECTION.FIELD=VALUE]... --output DIR` and the very words of the launch (for a resume: the run's "
            "config.yaml and what changes), or leave data.index empty, so that rank 0 builds it:",
            problems,
        )


def prebuilt_problems(folder: Path, request: SampleRequest) -> list[str]:
    """Return why a folder does not hold the index of a request; nothing where it does."""
    digests = request.digests()
    problems = [problem for name in digests if (problem := index_problem(folder / name, digests[name]))]
    if not problems:
        return []
    differences = _differences(folder, request)
    return differences or problems


def _differences(folder: Path, request: SampleRequest) -> list[str]:
    """Return where the folder's request is another one, in words."""
    try:
        made_for = read_json(folder / REQUEST)
    except (OSError, OrchestrateError):
        return []
    if not isinstance(made_for, dict):
        return []
    return [
        f"{name}: the index is for {made_for.get(name)}, the run wants {wanted}"
        for name, wanted in request.facts().items()
        if made_for.get(name) != wanted
    ]


def expected_size(request: SampleRequest) -> tuple[int, int]:
    """Return about how many files and bytes the index of a request takes.

    A blend may give a shard a sample more or less than its share, and so an epoch.
    """
    documents = {
        str(Path(folder) / shard.name): shard.documents
        for folder, manifest in request.manifests.items()
        for shard in manifest.shards
    }
    files, size = 1, 0
    for source in request.sources.values():
        files += 1
        if len(source.prefixes) > 1:
            files += 2
            size += source.samples * (2 + 8) + 2 * _NUMPY_HEADER_BYTES
        read = [0.0] * len(source.prefixes)
        for phase, end in source.phases():
            for shard, weight in zip(phase.shards, phase.weights, strict=True):
                read[shard] += (end - phase.first_sample) * weight / sum(phase.weights)
        for prefix, count, samples in zip(source.prefixes, read, source.epoch_samples, strict=True):
            epochs = -(-round(count) // samples)
            arrays = 4 * documents[prefix] + 8 * (samples + 1) + 4 * samples + 3 * _NUMPY_HEADER_BYTES
            files += _FILES_AN_EPOCH * epochs
            size += epochs * (arrays + _DESCRIPTION_BYTES)
    return files, size
