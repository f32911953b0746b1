"""Which of the libraries on GPUs are installed: their versions, and whose `apex` it is. Imports none of them.

The package `apex` of the Python index is an unrelated web toolkit. NVIDIA's has `apex.optimizers` and kernels, of
which `amp_C` is the first.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Literal

from orchestrator.library_pairs import LibraryVersions

WEIGHT_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
"""Of Apex, built with its CUDA extensions; the only part that is used."""
CORES = ("transformer-engine-cu12", "transformer-engine-cu13")


def library_versions(cuda: str | None) -> LibraryVersions:
    """Return what this interpreter would import, by its installed packages.

    Args:
        cuda: with which torch was built.
    """
    cores = [(name, version) for name in CORES if (version := installed_version(name)) is not None]
    return LibraryVersions(
        megatron_core=installed_version("megatron-core"),
        transformer_engine=installed_version("transformer-engine"),
        transformer_engine_cores=tuple(cores),
        transformer_engine_torch=installed_version("transformer-engine-torch"),
        torch=installed_version("torch"),
        cuda=cuda,
    )


def cuda_of_torch() -> str | None:
    """Return the CUDA with which torch was built, None for a CPU build, by its file: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found is not None and found.origin is not None else None
    if file is None or not file.exists():
        return None
    said = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", file.read_text(), re.MULTILINE)
    return said[1] if said else None


def installed_version(package: str) -> str | None:
    """Return a package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def apex_kind() -> Literal["absent", "genuine", "unrelated"]:
    """Return whose `apex` an import would find, by its folder: importing the unrelated one may do anything."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "absent"
    folders = [Path(folder) / "optimizers" for folder in found.submodule_search_locations or []]
    has_kernels = importlib.util.find_spec("amp_C") is not None
    return "genuine" if has_kernels and any(folder.is_dir() for folder in folders) else "unrelated"
