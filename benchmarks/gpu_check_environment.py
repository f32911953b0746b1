"""What a machine has: GPU, libraries, and whether Transformer Engine's kernels run on it."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check_report import in_a_line
from benchmarks.gpu_check_sizes import FULL, PRECISIONS, TINY, precision_of, settings_of
from orchestrator.packages import package_versions
from orchestrator.plan import make_plan
from orchestrator.settings import PrecisionSettings

MORE_PACKAGES = ("transformer-engine-cu13", "transformer-engine-torch", "torchao", "flash-attn", "apex")
HOPPER = (9, 0)

Found = tuple[str, str, list[str], str, dict[str, object]]


def environment(device: str) -> Iterator[Found]:
    """Tell of GPU and libraries; on a GPU let Transformer Engine compute a little in bf16 and in FP8."""
    import torch

    has_gpu = device == "cuda" and torch.cuda.is_available()
    if device == "cuda":
        yield ("environment", "GPU", *_gpu())
    versions = {name: version for name, version in (*package_versions().items(), *_more_versions()) if version}
    versions |= {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    versions["cudnn"] = str(torch.backends.cudnn.version())
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "environment", "libraries", [], told, {**versions}
    if device == "cpu":
        return
    if importlib.util.find_spec("transformer_engine") is None:
        yield "environment", "Transformer Engine", ["it is not installed"], "", {}
        return
    for name in PRECISIONS[1:]:
        try:
            recipe = str(recipe_of(precision_of(name), "cuda"))
        except Exception as error:
            yield "environment", f"recipe of {name}", [in_a_line(error, 300)], "", {}
        else:
            yield "environment", f"recipe of {name}", [], recipe.partition(", fp8_quant")[0], {"recipe": recipe}
    if has_gpu:
        try:
            found = _engine()
        except Exception as error:
            found = [in_a_line(error, 300)], "", {}
        yield ("environment", "Transformer Engine", *found)


def _gpu() -> tuple[list[str], str, dict[str, object]]:
    import torch

    if not torch.cuda.is_available():
        return ["torch sees no GPU"], "", {}
    properties = torch.cuda.get_device_properties(0)
    capability = torch.cuda.get_device_capability(0)
    free, total = torch.cuda.mem_get_info(0)
    wrong = [] if capability == HOPPER else [f"compute capability should be 9.0 (Hopper), found {capability}"]
    told = (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, {free / 1e9:.1f} of {total / 1e9:.1f} "
        "GB free"
    )
    state = _driver_state()
    figures: dict[str, object] = {"name": properties.name, "capability": list(capability), "state": state}
    return wrong, f"{told}; {state}", figures | {"free_bytes": free, "total_bytes": total}


def _driver_state() -> str:
    """Return what the driver says of the first GPU: version, MIG mode, clock and temperature."""
    fields = ("driver_version", "mig.mode.current", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.limit")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    values = said.stdout.strip().split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(fields, values, strict=False))


def _engine() -> tuple[list[str], str, dict[str, object]]:
    """Multiply two small matrices with Transformer Engine, in bf16 and in FP8."""
    import torch

    te = importlib.import_module("transformer_engine.pytorch")
    said = {
        "FP8": te.is_fp8_available(return_reason=True),
        "FP8 in blocks": te.is_fp8_block_scaling_available(return_reason=True),
    }
    x_MK = torch.ones(128, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
    layer(x_MK).sum().backward()
    with te.autocast(enabled=True, recipe=importlib.import_module("transformer_engine.common.recipe").DelayedScaling()):
        output = layer(x_MK)
    output.sum().backward()
    torch.cuda.synchronize()
    wrong = [f"{name} is not available: {reason}" for name, (is_there, reason) in said.items() if not is_there]
    return wrong, "a small product ran in bf16 and in FP8, forward and backward", {}


def _more_versions() -> Iterator[tuple[str, str | None]]:
    for name in MORE_PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None


def recipe_of(precision: PrecisionSettings, device: str) -> Any | None:
    """Return the recipe that megatron makes of a run's settings, or None for bf16."""
    if precision.fp8 == "none":
        return None
    from megatron_solar import compat

    settings = settings_of(TINY, precision, device)
    plan = make_plan(settings)
    return compat.fp8_recipe(
        compat.transformer_config(settings.model, plan.layout, settings.training, precision, device)
    )


def launch_variables() -> dict[str, str]:
    """Return what a launch of a run on one GPU sets. Imports no torch."""
    from orchestrator.gpu_environment import gpu_variables

    settings = settings_of(FULL, PrecisionSettings(), "cuda")
    return {name: value for name, (value, _) in gpu_variables(settings, make_plan(settings).layout).items()}
