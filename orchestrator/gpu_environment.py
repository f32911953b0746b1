"""Which variables a launch sets for ranks on GPUs: each follows from layout and precision, with the reason. Pure.

Values and reasons, read in source and never measured here on more than one GPU:

- Megatron-LM's arguments.py (core 0.16) wants CUDA_DEVICE_MAX_CONNECTIONS=1 with tensor or context parallelism
  before Blackwell, and megatron-core's tensor_parallel/layers.py orders its kernels by it; Megatron-Bridge's
  recipes/run_plugins.py (PerfEnvPlugin) has the same, and the margin of 16 for Transformer Engine's norms.
- megatron-core's deterministic mode and torch name what they need for equal bits.
- TORCH_NCCL_AVOID_RECORD_STREAMS is not among them: what it asked for is torch's default since 2.8, which warns of it.

What a site says in `cluster.environment` counts more; an empty value there takes the variable away.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from orchestrator.layout import ParallelLayout
from orchestrator.settings import RunSettings

NORM_MARGIN = 16
"""Streaming multiprocessors, of an H100's 132, that Transformer Engine's norms leave to NCCL."""
FROM_THE_SITE = "from cluster.environment"

ATTENTION_SWITCH = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", "training.deterministic: torch asks for it"),
    "NCCL_ALGO": ("Ring", "training.deterministic: sums in one order, which megatron-core asks for"),
    ATTENTION_SWITCH: ("0", "training.deterministic: Transformer Engine's attention"),
}
_ALSO_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": {":4096:8", ":16:8"}, "NCCL_ALGO": {"Ring", "Tree"}}
"""Other values with which torch and megatron-core do the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable of the ranks' environment."""

    name: str
    value: str
    """Empty where the site takes it away."""
    why: str


def gpu_variables(settings: RunSettings, layout: ParallelLayout) -> dict[str, tuple[str, str]]:
    """Return by its name each variable's value and why it is set; none where ranks are on the CPU."""
    if settings.cluster.device == "cpu":
        return {}
    found = {
        "PYTORCH_CUDA_ALLOC_CONF": ("expandable_segments:True", "less memory is lost to pieces"),
        "NCCL_NVLS_ENABLE": ("0", "the buffers of NVLink SHARP take memory"),
    }
    if needs_one_connection(settings, layout):
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = ("1", f"{_split(layout)}: kernels run in the order of their launch")
    overlap = overlapped(layout)
    if overlap:
        why = f"{overlap}: norms leave {NORM_MARGIN} multiprocessors to it"
        found |= {f"NVTE_{way}_LAYERNORM_SM_MARGIN": (str(NORM_MARGIN), why) for way in ("FWD", "BWD")}
    if settings.training.deterministic:
        found |= _DETERMINISTIC
    return found


def needs_one_connection(settings: RunSettings, layout: ParallelLayout) -> bool:
    """Whether communication overlaps only where kernels start in the order in which they were launched.

    A GPU of unknown name counts as one before Blackwell, for which megatron-core no longer wants it.
    """
    return not is_blackwell(settings.cluster.gpu) and max(layout.tensor_parallel, layout.context_parallel) > 1


def is_blackwell(gpu: str) -> bool:
    """Whether a GPU's name, such as b200 or GB300, is that of compute capability 10 or later."""
    return re.search(r"\bg?b[1-3]\d\d", gpu.lower()) is not None


def overlapped(layout: ParallelLayout) -> Literal["", "gradient reduction", "weight gathering", "pipeline transfers"]:
    """Return what is communicated while layers are computed, or nothing."""
    if layout.overlap_gradient_reduce:
        return "gradient reduction"
    if layout.overlap_parameter_gather:
        return "weight gathering"
    return "pipeline transfers" if layout.virtual_pipeline_parallel > 1 else ""


def rank_variables(settings: RunSettings, layout: ParallelLayout) -> list[Variable]:
    """Return what a launch sets and what the site says, each once, the site's values counting more."""
    site = settings.cluster.environment
    chosen = gpu_variables(settings, layout)
    found = [
        Variable(name=name, value=value, why=why) if name not in site else _of_site(name, site[name], value)
        for name, (value, why) in chosen.items()
    ]
    return found + [_of_site(name, value, None) for name, value in site.items() if name not in chosen]


def set_variables(variables: Sequence[Variable]) -> dict[str, str]:
    """Return those that have a value."""
    return {variable.name: variable.value for variable in variables if variable.value}


def unset_variables(variables: Sequence[Variable]) -> list[str]:
    """Return the names of those that a rank must not have, whatever the job inherited or an image sets."""
    return [variable.name for variable in variables if not variable.value]


def environment_problems(settings: RunSettings, layout: ParallelLayout) -> list[str]:
    """Return where the site's environment contradicts what the layout or the training needs, each with its remedy."""
    site = settings.cluster.environment
    if settings.cluster.device == "cpu":
        return []
    found = []
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if needs_one_connection(settings, layout) and site.get(name, "1") != "1":
        found.append(
            f"cluster.environment.{name}={site[name]!r} contradicts {_split(layout)}, which needs 1 "
            f"on {settings.cluster.gpu or 'a GPU before Blackwell'}; leave it out, and the launch sets it"
        )
    if settings.training.deterministic:
        for name, (value, _) in _DETERMINISTIC.items():
            if site.get(name, value) not in _ALSO_DETERMINISTIC.get(name, {value}):
                found.append(
                    f"cluster.environment.{name}={site[name]!r} contradicts training.deterministic=true, which needs "
                    f"{value}; leave it out, and the launch sets it, or set training.deterministic=false"
                )
    return found


def _of_site(name: str, value: str, otherwise: str | None) -> Variable:
    replaced = "" if otherwise is None or otherwise == value else f", in place of {otherwise}"
    return Variable(name=name, value=value, why=FROM_THE_SITE + (": taken away" if not value else "") + replaced)


def _split(layout: ParallelLayout) -> str:
    sizes = {"tensor_parallel": layout.tensor_parallel, "context_parallel": layout.context_parallel}
    return ", ".join(f"layout.{name}={size}" for name, size in sizes.items() if size > 1)
