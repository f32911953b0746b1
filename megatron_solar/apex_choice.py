"""What is taken from NVIDIA's Apex: the kernel that adds weight gradients up, on GPUs; nothing else, whatever is there.

megatron-core 0.16.1 takes what it finds by the name `apex`, at its import: Adam and the norm of gradients
(optimizer/), a norm that refuses RMSNorm (fusions/fused_layer_norm.py, by any package of that name). It catches
ImportError alone, so that a package that is broken in another way kills it. Its choice would be another where
Transformer Engine is missing, on the CPU too, where Apex's kernels cannot run. So it is shown no Apex at all; the
kernel is a module of its own. Never run with the genuine Apex.
"""

import importlib
import sys
from typing import Literal

import torch

from orchestrator.gpu_libraries import WEIGHT_GRADIENT_KERNEL, apex_kind

HIDDEN = ("apex", "amp_C")


def choose_apex() -> bool:
    """Hide Apex from whatever is imported later, and return whether its weight-gradient kernel is there to be used.

    For a process that has not imported megatron yet.
    """
    # By torch's build, not by its devices: a look at those must not come before ranks are forked.
    is_usable = torch.version.cuda is not None and apex_kind() == "genuine"
    has_kernel = is_usable and _can_import("amp_C") and _can_import(WEIGHT_GRADIENT_KERNEL)
    for name in (*HIDDEN, *(() if has_kernel else (WEIGHT_GRADIENT_KERNEL,))):
        sys.modules[name] = None  # type: ignore[assignment]  # by which an import says that there is none
    return has_kernel


def weight_gradient_fusion(
    device: str, *, has_transformer_engine: bool, has_kernel: bool
) -> Literal["none", "layers", "all"]:
    """Return which matrix products add weight gradients to those of earlier micro-batches in fp32 by themselves.

    Otherwise a gradient is written in the weights' type first, and added afterwards. Transformer Engine's layers do
    it alone, and so need no Apex; the output layer is megatron's own and does it with the kernel
    (tensor_parallel/layers.py of megatron-core 0.16.1 refuses the option without it).
    """
    if device == "cpu":
        return "none"
    if has_kernel:
        return "all"
    return "layers" if has_transformer_engine else "none"


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # whatever a kernel built against other libraries raises
        return False
    return True
