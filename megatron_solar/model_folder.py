"""Read Hugging Face folders of Llama-like models, one tensor at a time.

Reading checks everything that later work relies on before the first weight is touched: the
configuration is one that is covered (`megatron_solar/model_config.py`), and every tensor is there with its
shape. Weights are mapped into memory (`megatron_solar/weight_files.py`).
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron_solar.model_config import shape_from_config
from megatron_solar.weight_files import DTYPES, WeightFile, open_weight_files
from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.files import read_json
from orchestrator.model_shape import TransformerShape
from orchestrator.values import to_plain

TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.*",
    f"{TEMPLATE_FOLDER}/*",
)
SHOWN_PROBLEMS = 20
# Old Llama folders store this buffer; it follows from the configuration.
_ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def expected_tensors(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor, in the order in which folders are written."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (shape.query_size, hidden),
        "self_attn.k_proj.weight": (shape.key_size, hidden),
        "self_attn.v_proj.weight": (shape.key_size, hidden),
        "self_attn.o_proj.weight": (hidden, shape.query_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for number in range(shape.num_layers):
        tensors |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


class ModelFolder:
    """A checked Hugging Face folder whose tensors are read when asked for.

    Attributes:
        path: the folder.
        config: its config.json as it is.
        shape: the sizes that config.json gives.
        dtype: the type of its weights; where norms are wider than matrices, the narrowest that holds each of
            them exactly.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shape: TransformerShape,
        dtype: torch.dtype,
        files: Mapping[str, WeightFile],
    ) -> None:
        self.path = path
        self.config = config
        self.shape = shape
        self.dtype = dtype
        self._files = files

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read the configuration, map the weights and check both.

        Raises:
            ModelFolderError: no such folder, another architecture, or tensors that are missing, too
                many, misshapen or of a type that is not covered; all of them at once.
        """
        config = read_config(path)
        shape = shape_from_config(config, str(path / "config.json"))
        files = open_weight_files(path)
        return cls(path, config, shape, _check_weights(path, shape, files), files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor, mapped from the file: pages are read when touched."""
        return self._files[name].tensor(name)

    def tokenizer_files(self) -> list[Path]:
        """Return every file that belongs to the tokenizer, chat templates included."""
        return tokenizer_files(self.path)


def tokenizer_files(path: Path) -> list[Path]:
    """Return every file of a folder that belongs to the tokenizer, chat templates included."""
    return sorted({file for pattern in TOKENIZER_PATTERNS for file in path.glob(pattern) if file.is_file()})


def open_base(path: Path, shape: TransformerShape) -> ModelFolder:
    """Open a folder as the base of a run whose settings say which shape it has.

    Fewer positions than the base has are accepted: rotary positions are computed, not learnt.

    Raises:
        ModelFolderError: it is no model, or of another shape; every difference is named.
    """
    folder = ModelFolder.open(path)
    differing = [
        f"model.{name}: the base has {_shown(folder.shape, name)}, the settings say {_shown(shape, name)}"
        for name in (field.name for field in fields(shape))
        if _shown(folder.shape, name) != _shown(shape, name)
        and not (
            name == "max_position_embeddings" and shape.max_position_embeddings < folder.shape.max_position_embeddings
        )
    ]
    if differing:
        raise ModelFolderError(f"the base {path} is not of the shape in the settings:", differing)
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder.

    Raises:
        ModelFolderError: there is no such folder, or no such file in it, or it holds something else.
    """
    if not path.is_dir():
        raise ModelFolderError(
            f"{path} should be a Hugging Face folder, found {'a file' if path.exists() else 'nothing'}; "
            "a model of the hub is fetched with: hf download OWNER/NAME --local-dir FOLDER"
        )
    file = path / "config.json"
    if not file.is_file():
        raise ModelFolderError(f"{path} has no config.json; a Hugging Face folder has one beside its weights")
    try:
        config = read_json(file)
    except OrchestrateError as error:
        raise ModelFolderError(str(error)) from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{file} should hold a JSON object, found {type(config).__name__}")
    return config


def _shown(shape: TransformerShape, field: str) -> str:
    """Return a field as YAML has it; a head size that is named is the same as one that follows from the others."""
    return json.dumps(to_plain(shape.head_size if field == "head_dim" else getattr(shape, field)))


def _check_weights(path: Path, shape: TransformerShape, files: Mapping[str, WeightFile]) -> torch.dtype:
    """Compare names, shapes and types with what the configuration says; return the one type that holds all."""
    expected = expected_tensors(shape)
    problems = [f"{name} is missing" for name in expected if name not in files]
    dtypes: dict[str, list[str]] = {}
    for name, file in files.items():
        if name not in expected:
            # transformers ignores a stored output layer where config.json ties it to the embedding.
            if not _ROTARY_BUFFER.fullmatch(name) and name != "lm_head.weight":
                problems.append(f"{name} is not a tensor of {shape.num_layers} plain Llama layers")
            continue
        if file.shape(name) != expected[name]:
            problems.append(f"{name} has shape {file.shape(name)}, config.json gives {expected[name]}")
        dtypes.setdefault(file.dtype(name), []).append(name)
    matrices = {dtype: [name for name in names if len(expected[name]) > 1] for dtype, names in dtypes.items()}
    if sum(map(bool, matrices.values())) > 1:
        counts = ", ".join(
            f"{len(names)} of {dtype} ({names[0]})" for dtype, names in sorted(matrices.items()) if names
        )
        problems.append(f"matrices should be of one type, found {counts}; save them as one")
    uncovered = sorted(dtypes.keys() - DTYPES)
    problems += [f"weights of type {dtype} are not covered; save them as bf16" for dtype in uncovered]
    if problems:
        rest = len(problems) - SHOWN_PROBLEMS
        shown = [*problems[:SHOWN_PROBLEMS], f"and {rest} more"] if rest > 0 else problems
        raise ModelFolderError(f"weights of {path} are not those that its config.json describes", shown)
    return functools.reduce(torch.promote_types, (DTYPES[dtype] for dtype in dtypes))
