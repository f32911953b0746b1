"""Where an up-scaled model comes from: the content of its lineage.json. Standard library only."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.files import read_json, sha256_of

LINEAGE_FILE = "lineage.json"
EVALUATION_FILE = "evaluation.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What a model folder holds: its size and SHA-256 checksums, in hexadecimal."""

    num_layers: int
    parameters: int
    tensors: Mapping[str, str]
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What base and result make of the same held-out tokens, computed in fp32 from the weights as they are stored.

    Attributes:
        text: what they were cut from, as it was given.
        sequence_length: predictions in each sequence.
        base_loss: nats a token.
        result_loss: nats a token, before any training.
        file: has the token ids, and each token's loss in both.
    """

    text: str
    sequences: int
    sequence_length: int
    base_loss: float
    result_loss: float
    file: str = EVALUATION_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an up-scaled model comes from.

    Attributes:
        drop: layers that each copy lost, by SOLAR's rule; None with others.
        layer_sources: for each layer of the result the base's layer.
        zeroed_layers: layers of the result whose o_proj and down_proj are zero.
        cosines: of each base layer's input and output, where the rule chose by them.
        base_revision: the hub's commit, where the base lies in the hub's cache.
        licence: the base's, as an id of the hub; `unknown` where the folder has none.
        dtype: of the result's weights; where the base's differ they were rounded to the nearest, ties to even.
        base: checksums of the tensors that were copied.
    """

    strategy: str
    paper: str
    drop: int | None
    layer_sources: tuple[int, ...]
    zeroed_layers: tuple[int, ...]
    cosines: tuple[float, ...]
    base_name: str
    base_path: str
    base_revision: str | None
    licence: str
    base_dtype: str
    dtype: str
    base: ModelRecord
    result: ModelRecord
    evaluation: EvaluationRecord | None
    orchestrate_version: str
    created: str


def read_lineage(folder: Path) -> dict[str, Any]:
    """Return what a model folder tells of where it comes from; nothing where it has no lineage.json.

    Raises:
        ModelFolderError: the file is damaged.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except OrchestrateError as error:
        raise ModelFolderError(str(error)) from error
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path} should hold a JSON object, found {type(found).__name__}; restore it")
    return found


def has_evaluation(folder: Path) -> bool:
    """Return whether a model folder has losses to compare a first loss with.

    Raises:
        ModelFolderError: its lineage is damaged.
    """
    return read_lineage(folder).get("evaluation") is not None


def changed_files(folder: Path) -> list[str]:
    """Return the files of an up-scaled folder that are not those that its lineage was written of.

    Reads all of them, so that it takes minutes for a large model.
    """
    recorded: Mapping[str, str] = read_lineage(folder)["result"]["files"]
    return [
        name for name, digest in recorded.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]
