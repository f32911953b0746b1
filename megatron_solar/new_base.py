"""A small base of new weights, from which a rehearsal is up-scaled as a real run is from its own.

The weights are drawn by name (docs/decisions/007), so the same seed and shape give the same folder.
"""

from pathlib import Path

from megatron_solar.model_folder import expected_tensors
from megatron_solar.model_writer import write_model_folder
from megatron_solar.weights import PRECISION_DTYPES, RandomWeights
from orchestrator.model_shape import TransformerShape


def write_new_base(output: Path, shape: TransformerShape, *, seed: int, precision: str, tokenizer: Path) -> None:
    """Write a Hugging Face folder of new weights, whole or not at all.

    Args:
        precision: as `precision.dtype` has it.
        tokenizer: file that goes with the model.

    Raises:
        ModelFolderError: the disk is too small.
        OrchestrateError: `output` exists already.
    """
    weights = RandomWeights(shape, seed)
    write_model_folder(
        output,
        shape,
        ((name, weights.tensor(name)) for name in expected_tensors(shape)),
        dtype=PRECISION_DTYPES[precision],
        tokenizer_files=[tokenizer],
    )
