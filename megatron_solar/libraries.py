"""Whether a rank's libraries belong together, asked before megatron is imported.

A half-installed Transformer Engine kills `import megatron.core` with RuntimeError or FileNotFoundError, which name
neither package nor remedy; and without any, megatron's `fp8` does nothing and says nothing. Here both are errors of
the configuration, which no restart mends.
"""

import importlib
import importlib.util
import logging

import torch

from orchestrator.errors import ConfigError
from orchestrator.fp8_rules import version_problems
from orchestrator.gpu_libraries import library_versions
from orchestrator.library_pairs import INSTALL, REMEDY, pair_problems, pair_warnings
from orchestrator.settings import RunSettings

logger = logging.getLogger(__name__)


def check_libraries(settings: RunSettings) -> None:
    """Refuse libraries that are known to fail together, half installed, or too few for the precision asked for.

    On the CPU only FP8 asks for anything.

    Raises:
        ConfigError: all that is wrong, each with its remedy.
    """
    precision = settings.precision
    if settings.cluster.device == "cpu" and precision.fp8 == "none":
        return
    versions = library_versions(torch.version.cuda)
    found = pair_problems(versions)
    if importlib.util.find_spec("transformer_engine") is not None:
        found += _import_problems() if not found else []
        if versions.transformer_engine is not None:
            found += version_problems(precision, versions.transformer_engine, versions.cuda or "")
    elif precision.fp8 != "none":
        found.append(f"precision.fp8={precision.fp8} needs Transformer Engine, which is not installed; {INSTALL}")
    if found:
        raise ConfigError("the libraries of this rank's Python do not fit; to mend:", found)
    for warning in pair_warnings(versions):
        logger.warning(warning)


def _import_problems() -> list[str]:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever a library's own import raises
        return [f"Transformer Engine cannot be imported ({type(error).__name__}: {error}); {REMEDY}"]
    return []
