"""Which versions of the libraries on GPUs belong together, and which are known to fail. Pure.

Sources: the requirements and CI of megatron-core's releases, NVIDIA's images, and what Transformer Engine's
`common/__init__.py` (2.11) checks when it is imported. None of it has run here on a GPU but where docs/log.md says so.
Standard library only: a rank asks before it imports anything heavy.
"""

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibraryVersions:
    """What is installed; None for what is not, or not known."""

    megatron_core: str | None = None
    transformer_engine: str | None = None
    """Of the meta package; in NVIDIA's images of all of it, which is one package there."""
    transformer_engine_cores: tuple[tuple[str, str], ...] = ()
    """Name and version of each of transformer-engine-cu12 and -cu13 that is installed."""
    transformer_engine_torch: str | None = None
    torch: str | None = None
    cuda: str | None = None
    """With which torch was built; None for a CPU build."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Releases that upstream builds and tests together; both ends of a range count."""

    megatron_core: str
    transformer_engine: tuple[str, str]
    torch: str = ""
    cuda: str = ""
    where: str
    """In which image, by whom tested, or how installed."""


PAIRS = (
    Pair(
        megatron_core="0.16", transformer_engine=("2.11", "2.11"), torch="2.11.0", cuda="13.0",
        where="pip, without a container: above",
    ),
    Pair(
        megatron_core="0.16", transformer_engine=("2.9", "2.12"),
        where="upstream's tests, on the image pytorch 25.11",
    ),
    Pair(megatron_core="0.16", transformer_engine=("2.12", "2.12"), where="the image NeMo 26.02"),
    Pair(megatron_core="0.17", transformer_engine=("2.14", "2.14"), where="the image NeMo 26.04; not for this project"),
    Pair(megatron_core="0.18", transformer_engine=("2.16", "2.16"), where="the image NeMo 26.06; not for this project"),
    Pair(megatron_core="0.19", transformer_engine=("2.17", "2.17"), where="upstream's tests; not for this project"),
)  # fmt: skip

MEGATRON_CORE = "0.16"
"""For which megatron_solar/compat.py is written."""
TRANSFORMER_ENGINE = "2.11.0"
"""Of the `gpu` extra of pyproject.toml, and of the second step after it."""
WITHOUT_SEQUENCE_FAULT = "2.2"
"""From 1.13 to 2.1 Transformer Engine's sequence parallelism under megatron is wrong (its pull request 1528)."""

REMOVE = "pip uninstall transformer-engine transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch"
INSTALL = (
    f"pip install 'transformer-engine[core_cu13]=={TRANSFORMER_ENGINE}', then pip install --no-build-isolation "
    f"transformer-engine-torch=={TRANSFORMER_ENGINE}"
)
REMEDY = f"install its three parts again in one version: {REMOVE}; {INSTALL} (docs/clusters.md)"


def pair_problems(versions: LibraryVersions) -> list[str]:
    """Return what is known to fail among installed versions, each with its remedy."""
    found = []
    core = versions.megatron_core
    if core is not None and numbers(core)[:2] != numbers(MEGATRON_CORE):
        found.append(
            f"megatron-core {core} is not what this project is written for; pip install 'megatron-core==0.16.1'"
        )
    return found + _transformer_engine_problems(versions)


def _transformer_engine_problems(versions: LibraryVersions) -> list[str]:
    meta, binding = versions.transformer_engine, versions.transformer_engine_torch
    parts = {
        "transformer-engine": meta,
        **dict(versions.transformer_engine_cores),
        "transformer-engine-torch": binding,
    }
    there = {name: version for name, version in parts.items() if version is not None}
    if not there:
        return []
    said = ", ".join(f"{name} {version}" for name, version in there.items())
    found = []
    if len(versions.transformer_engine_cores) > 1:
        found.append(f"two cores of Transformer Engine are installed ({said}), of which it takes any; {REMEDY}")
    elif len({public(version) for version in there.values()}) > 1:
        found.append(f"the parts of Transformer Engine are of different versions ({said}); {REMEDY}")
    if meta is None:
        found.append(f"Transformer Engine has no transformer-engine package ({said}); {REMEDY}")
    elif versions.transformer_engine_cores and binding is None:
        found.append(f"Transformer Engine has no extension for torch ({said}); {INSTALL.partition(', then ')[2]}")
    elif binding is not None and not versions.transformer_engine_cores:
        found.append(f"Transformer Engine has no core ({said}); {REMEDY}")
    if versions.torch is not None and versions.cuda is None:
        found.append(
            f"Transformer Engine {meta or binding} is there and torch {versions.torch} is a CPU build, with which it "
            f"cannot be imported; install torch's CUDA build, or {REMOVE}"
        )
    for name, version in versions.transformer_engine_cores:
        wanted = name.rpartition("-cu")[2]
        if versions.cuda is not None and versions.cuda.partition(".")[0] != wanted:
            found.append(
                f"{name} {version} is for CUDA {wanted} and torch {versions.torch} for CUDA {versions.cuda}; install "
                f"the core of torch's CUDA: {REMOVE}; pip install "
                f"'transformer-engine[core_cu{versions.cuda.partition('.')[0]}]=={TRANSFORMER_ENGINE}', and the second "
                "step of docs/clusters.md"
            )
    if meta is not None and numbers("1.13") <= numbers(meta) < numbers(WITHOUT_SEQUENCE_FAULT):
        found.append(f"Transformer Engine {meta} computes sequence parallelism wrongly under megatron; {REMEDY}")
    return found


def pair_warnings(versions: LibraryVersions) -> list[str]:
    """Return which versions nobody is known to have tried together; they may work."""
    core, engine = versions.megatron_core, versions.transformer_engine
    if core is None or engine is None:
        return []
    tried = [pair for pair in PAIRS if numbers(core)[:2] == numbers(pair.megatron_core)]
    if any(_lies_within(engine, pair.transformer_engine) for pair in tried):
        return []
    ranges = " or ".join(dict.fromkeys(_range(pair.transformer_engine) for pair in tried)) or "none that is known"
    return [f"megatron-core {core} with Transformer Engine {engine} is no pair that upstream tests: {ranges}"]


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without what follows them: 2.11.0+abc is (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def public(version: str) -> str:
    """Return a version without its local part, which a build from source has."""
    return version.partition("+")[0]


def versions_table(pairs: Sequence[Pair] = PAIRS) -> str:
    """Return the table of docs/clusters.md."""
    rows = [("megatron-core", "Transformer Engine", "torch", "CUDA", "where"), ("---",) * 5]
    rows += [
        (pair.megatron_core, _range(pair.transformer_engine), pair.torch or "–", pair.cuda or "–", pair.where)
        for pair in pairs
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lies_within(version: str, ends: tuple[str, str]) -> bool:
    low, high = map(numbers, ends)
    return low <= numbers(version)[: len(low)] and numbers(version)[: len(high)] <= high


def _range(ends: tuple[str, str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"
