"""Versions of the packages on which the numbers of a run rest. Standard library only."""

import importlib.metadata

RECORDED_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "safetensors",
    "submitit",
    "mlflow",
    "omegaconf",
)


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages on which a run's numbers rest, None for one that is not there."""
    return {name: _version(name) for name in RECORDED_PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
