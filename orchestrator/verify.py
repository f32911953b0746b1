"""Compare an exported folder with its checkpoint, in a process of its own that may import torch and megatron."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from orchestrator.checkpoints import Checkpoint
from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.run_directory import RunDirectory

LOGIT_TOLERANCE = 2e-5
"""Largest difference of fp32 logits of small models that sums in another order explain; 1.0e-5 was seen."""
RELATIVE_TOLERANCE = 1e-5
"""The same as a share of the largest logit, of any model; 2 to 3.4e-6 was seen at 64 to 1024 wide, 6 to 24 layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What the comparison found."""

    largest_logit_difference: float
    largest_logit: float
    tokens_compared: int
    generated: str
    """The prompt and what the exported model made of it, greedily; nothing where it has no tokenizer."""


def verify_export(
    run: RunDirectory, checkpoint: Checkpoint, folder: Path, prompt: str = "import os\n\ndef "
) -> Verified:
    """Run the same tokens through the trained Megatron model and through transformers on the exported folder.

    Raises:
        ModelFolderError: the logits differ by more than both tolerances.
        OrchestrateError: transformers is not installed, or the comparison could not run.
    """
    if importlib.util.find_spec("transformers") is None:
        raise OrchestrateError("comparing an export needs transformers; `pip install 'orchestrate[demo]'`")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "megatron_solar.verify", str(run.path), str(checkpoint.path), str(folder),
         "--prompt", prompt],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if result.returncode:
        raise OrchestrateError(f"the exported model could not be compared:\n{result.stderr.strip()[-2000:]}")
    found = Verified(**json.loads(result.stdout.splitlines()[-1]))
    allowed = max(LOGIT_TOLERANCE, RELATIVE_TOLERANCE * found.largest_logit)
    if not found.largest_logit_difference <= allowed:
        raise ModelFolderError(
            f"{folder} does not compute what checkpoint {checkpoint.name} does: logits differ by up to "
            f"{found.largest_logit_difference:.2e}, allowed are {allowed:.0e}; do not use it"
        )
    return found
