"""Make what a rehearsal reads: data sets where the run's own are not there, and always a base of its size.

    FOLDER/
      train/  validation/          a part of the standard library's sources, tokenized
      new-4-layers-1a2b3c4d/       new weights, fewer layers
      base-4-layers-1a2b3c4d/      the same up-scaled by SOLAR's rule: what the ranks start from

The digits stand for the model's shape, seed and precision, so that one folder serves several rehearsals.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from orchestrator.demo import find_vocabulary
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.settings import RANDOM_BASE, RunSettings
from orchestrator.tokenize.manifest import DatasetManifest, read_manifest
from orchestrator.tokenize.stage import tokenize_corpus
from orchestrator.values import to_plain

PACKAGES = ("asyncio", "email", "http", "json", "logging", "urllib", "xml")
"""Of the standard library; about 2 MB."""
VALIDATION_EVERY = 20


def make_inputs(folder: Path, settings: RunSettings, *, given: frozenset[str] = frozenset()) -> RunSettings:
    """Return a rehearsal's settings with data sets and a base that are there and fit.

    Args:
        folder: where what has to be made goes; what an earlier rehearsal made there is taken again.
        given: fields that a person set on the command line; a vocabulary size among them is kept.

    Raises:
        DataError: no data sets, and no vocabulary to make some with.
        ConfigError: SOLAR's rule does not give so many layers.
    """
    return _with_base(folder, _with_data(folder, settings, given))


def _with_data(folder: Path, settings: RunSettings, given: frozenset[str]) -> RunSettings:
    data = settings.data
    if data.train and all(_fits(Path(path), settings) for path in (*data.training_folders, *data.validation)):
        return settings
    train, validation = folder / "train", folder / "validation"
    manifest = _made_data(train, validation)
    vocab_size = settings.model.vocab_size
    if "model.vocab_size" not in given:
        tensor = settings.layout.tensor_parallel
        vocab_size = -(-manifest.vocab_size // tensor) * tensor
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, vocab_size=vocab_size),
        data=dataclasses.replace(data, train=(str(train),), weights=(), phases=(), validation=(str(validation),)),
    )


def _fits(path: Path, settings: RunSettings) -> bool:
    """Return whether a data set is there and the model knows its ids."""
    try:
        return read_manifest(path).vocab_size <= settings.model.vocab_size
    except DataError:
        return False


def _made_data(train: Path, validation: Path) -> DatasetManifest:
    try:
        read_manifest(validation)
        return read_manifest(train)
    except DataError:
        pass
    try:
        vocabulary = find_vocabulary()
    except OrchestrateError as error:
        raise DataError(
            "a rehearsal needs data sets; the recipe's cannot be used, and no vocabulary is here to make some with; "
            "`pip install 'orchestrate[demo]'` brings one, or give what `orchestrate tokenize` wrote: "
            "data.train=FOLDER data.validation=FOLDER"
        ) from error
    library = Path(os.__file__).parent
    return tokenize_corpus(
        [library / package for package in PACKAGES],
        vocabulary,
        train,
        validation_output=validation,
        validation_every=VALIDATION_EVERY,
        progress=False,
    )


def _with_base(folder: Path, settings: RunSettings) -> RunSettings:
    if settings.base == RANDOM_BASE or _is_base(Path(settings.base), settings):
        return settings
    decisive = {"model": to_plain(settings.model), "seed": settings.training.seed}
    decisive["precision"] = settings.precision.dtype
    digits = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    base = folder / f"base-{settings.model.num_layers}-layers-{digits}"
    if not _is_base(base, settings):
        _make_base(folder, base, digits, settings)
    return dataclasses.replace(settings, base=str(base))


def _is_base(path: Path, settings: RunSettings) -> bool:
    """Return whether a folder holds a model of this shape."""
    from megatron_solar.model_folder import open_base  # imports torch

    try:
        open_base(path, settings.model)
    except OrchestrateError:
        return False
    return True


def _make_base(folder: Path, base: Path, digits: str, settings: RunSettings) -> None:
    """Write new weights of two thirds of the layers, as SOLAR's 32 of 48, and up-scale them."""
    from megatron_solar.depth import depth_map
    from megatron_solar.model_folder import ModelFolder
    from megatron_solar.new_base import write_new_base
    from megatron_solar.upscale import plan_upscale, write_upscaled

    layers = settings.model.num_layers
    fewer = max(1, round(layers * 2 / 3))
    deeper = depth_map("solar", fewer, layers)
    new = folder / f"new-{fewer}-layers-{digits}"
    data = Path(settings.data.train[0])
    if not new.exists():
        write_new_base(
            new,
            dataclasses.replace(settings.model, num_layers=fewer),
            seed=settings.training.seed,
            precision=settings.precision.dtype,
            tokenizer=data / read_manifest(data).tokenizer_file,
        )
    written = ModelFolder.open(new)
    write_upscaled(written, plan_upscale(written, deeper), base)
