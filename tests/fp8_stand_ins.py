"""What stands for Transformer Engine's modules where it cannot run; the real ones were never looked at on a GPU.

They keep what Transformer Engine 2.11.0 keeps by its source: `TransformerEngineBaseModule.__init__` and
`init_fp8_metadata` (module/base.py), the recipes (common/recipe), their states (quantization.py) and the cached FP8
weight of `get_weight_workspace`. No number is computed.
"""

import enum
from typing import Any

import torch


class Format(enum.Enum):
    """Names as `transformer_engine.common.recipe.Format` has them."""

    E4M3 = 1
    HYBRID = 2


class StandInRecipe:
    """A recipe that answers to what it is."""

    def __init__(self, kind: str, fp8_format: Format = Format.HYBRID) -> None:
        self.kind = kind
        self.fp8_format = fp8_format
        self.amax_history_len = 1024
        self.amax_compute_algo = "max"

    def delayed(self) -> bool:
        """Whether it is delayed scaling."""
        return self.kind == "delayed"

    def float8_current_scaling(self) -> bool:
        """Whether it is tensorwise scaling."""
        return self.kind == "tensorwise"

    def float8_block_scaling(self) -> bool:
        """Whether it is blockwise scaling."""
        return self.kind == "blockwise"

    def mxfp8(self) -> bool:
        """Whether it is MXFP8."""
        return self.kind == "mxfp8"

    def __repr__(self) -> str:
        return f"StandInRecipe({self.kind}, {self.fp8_format.name})"


class StandInState:
    """The state of a recipe in one direction; histories with delayed scaling only."""

    def __init__(self, recipe: StandInRecipe, columns: int) -> None:
        if recipe.delayed():
            self.scale = torch.full((columns,), 8.0)
            self.amax_history = torch.zeros(recipe.amax_history_len, columns)
            self.amax_history[-1] = 3.5


class StandInTensor:
    """A weight in FP8, kept as bytes: under one name by tensor, under another by blocks."""

    def __init__(self, recipe: StandInRecipe) -> None:
        name = "_rowwise_data" if recipe.float8_block_scaling() else "_data"
        setattr(self, name, torch.zeros(4, 4, dtype=torch.uint8))


class StandInLinear(torch.nn.Module):
    """A linear after a training step: in FP8 with a recipe, in bf16 without."""

    def __init__(self, recipe: StandInRecipe | None) -> None:
        super().__init__()
        self.fp8 = self.fp8_initialized = recipe is not None
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": self.fp8}
        self.quantizers: dict[str, Any] = {"scaling_fwd": {}, "scaling_bwd": {}}
        self._fp8_workspaces: dict[str, Any] = {}
        if recipe is not None:
            self.fp8_meta |= {"recipe": recipe, "scaling_fwd": StandInState(recipe, 3),
                              "scaling_bwd": StandInState(recipe, 2)}  # fmt: skip
            self.quantizers = {"scaling_fwd": [object()] * 3, "scaling_bwd": [object()] * 2}
            self._fp8_workspaces["weight"] = StandInTensor(recipe)


StandInLinear.__module__ = "transformer_engine.pytorch.module.linear"
