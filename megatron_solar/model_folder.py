"""Read Hugging Face folders of Llama-like models, one tensor at a time.

Reading checks everything that later work relies on before the first weight is touched: the
configuration is a plain Llama's, and every tensor is there with its shape. What is not covered (rope
scaling, biases, sliding windows, quantised weights, ...) is refused by name. Weights are mapped into
memory, so a rank that needs a part of a tensor reads only that part.

The safetensors format: https://github.com/huggingface/safetensors#format
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import torch

from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.files import read_json
from orchestrator.model_shape import TransformerShape

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
        dtype: the type of all its weights.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shape: TransformerShape,
        dtype: torch.dtype,
        handles: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.config = config
        self.shape = shape
        self.dtype = dtype
        self._handles = handles

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read the configuration, map the weights and check both.

        Raises:
            ModelFolderError: no such folder, another architecture, or tensors that are missing, too
                many, misshapen or of several types; all of them at once.
        """
        config = _read_config(path)
        shape = shape_from_config(config, str(path / "config.json"))
        handles = _open_weights(path)
        return cls(path, config, shape, _check_weights(path, shape, handles), handles)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor, mapped from the file: pages are read when touched."""
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor; nothing else of it is read."""
        part: torch.Tensor = self._handles[name].get_slice(name)[start:stop]
        return part

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return columns `start` to `stop` of a matrix; nothing else of it is kept."""
        part: torch.Tensor = self._handles[name].get_slice(name)[:, start:stop]
        return part

    def tokenizer_files(self) -> list[Path]:
        """Return every file that belongs to the tokenizer, chat templates included."""
        found = {file for pattern in TOKENIZER_PATTERNS for file in self.path.glob(pattern) if file.is_file()}
        return sorted(found)


def shape_from_config(config: Mapping[str, Any], where: str) -> TransformerShape:
    """Return the shape that a config.json describes.

    Raises:
        ModelFolderError: another architecture, or a Llama with what is not covered.
    """
    kind, names = config.get("model_type"), config.get("architectures") or []
    if kind not in ARCHITECTURES or any(name not in ARCHITECTURES.values() for name in names):
        raise ModelFolderError(
            f"{where} describes model_type={kind!r}, architectures={names}; "
            f"only {' and '.join(ARCHITECTURES.values())} can be read"
        )
    problems = _uncovered(config)
    rope_theta = _rope_theta(config, problems)
    heads = _whole(config, "num_attention_heads", problems)
    groups_default = {"llama": heads, "mistral": 8}[kind]  # the defaults of transformers
    shape = TransformerShape(
        num_layers=_whole(config, "num_hidden_layers", problems),
        hidden_size=_whole(config, "hidden_size", problems),
        ffn_hidden_size=_whole(config, "intermediate_size", problems),
        num_attention_heads=heads,
        num_query_groups=_whole(config, "num_key_value_heads", problems, groups_default),
        vocab_size=_whole(config, "vocab_size", problems),
        max_position_embeddings=_whole(config, "max_position_embeddings", problems),
        rope_theta=rope_theta,
        rms_norm_eps=_number(config, "rms_norm_eps", problems, 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False) is True,
    )
    if not problems:
        problems += shape.problems()
    if not problems:
        head_dim = config.get("head_dim") or shape.head_size
        if head_dim != shape.head_size:
            problems.append(
                f"head_dim={head_dim} is not hidden_size/num_attention_heads={shape.head_size}; not covered"
            )
        # Mistral's class has 4096 where the key is absent, and no window where it is null.
        window = config.get("sliding_window", 4096) if kind == "mistral" else None
        if window is not None and window < shape.max_position_embeddings:
            problems.append(
                f"sliding_window={window} is shorter than "
                f"max_position_embeddings={shape.max_position_embeddings}; up to {window} positions a window "
                f"changes nothing: set sliding_window to null and max_position_embeddings to {window}"
            )
    if problems:
        raise ModelFolderError(f"{where} describes a model that cannot be read", problems)
    return shape


def open_base(path: Path, shape: TransformerShape) -> ModelFolder:
    """Open a folder as the base of a run whose settings say which shape it has.

    Fewer positions than the base has are accepted: rotary positions are computed, not learnt.

    Raises:
        ModelFolderError: it is no model, or of another shape; every difference is named.
    """
    folder = ModelFolder.open(path)
    differing = [
        f"model.{field.name}: the base has {getattr(folder.shape, field.name)}, the settings say "
        f"{getattr(shape, field.name)}"
        for field in fields(shape)
        if getattr(folder.shape, field.name) != getattr(shape, field.name)
        and not (
            field.name == "max_position_embeddings"
            and shape.max_position_embeddings < getattr(folder.shape, field.name)
        )
    ]
    if differing:
        raise ModelFolderError(f"the base {path} is not of the shape in the settings:", differing)
    return folder


def _read_config(path: Path) -> dict[str, Any]:
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


def _whole(config: Mapping[str, Any], key: str, problems: list[str], default: int | None = None) -> int:
    value = _number(config, key, problems, default)
    if not float(value).is_integer():
        problems.append(f"{key} should be a whole number, found {value!r}")
    return int(value)


def _number(config: Mapping[str, Any], key: str, problems: list[str], default: float | None = None) -> float:
    """Return a number of the configuration; 1, with a problem noted, where there is none."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problems.append(f"{key} should be a number, found {value!r}")
        return 1
    return value


def _rope_theta(config: Mapping[str, Any], problems: list[str]) -> float:
    """Return the rotary base, which transformers 5 keeps under rope_parameters and others on top."""
    nested = config.get("rope_parameters")
    if nested is None:
        return float(_number(config, "rope_theta", problems, 10000.0))
    if not isinstance(nested, dict) or "rope_theta" not in nested:
        problems.append(f"rope_parameters should hold rope_theta, found {nested!r}")
        return 1.0
    theta = float(_number(nested, "rope_theta", problems))
    if config.get("rope_theta") not in (None, theta):
        problems.append(f"rope_theta={config['rope_theta']} and rope_parameters.rope_theta={theta} disagree")
    return theta


def _uncovered(config: Mapping[str, Any]) -> list[str]:
    """Return each setting that makes the model another than a plain Llama."""
    found = [
        f"{key}={config[key]!r} is not covered; a plain Llama has {plain!r}"
        for key, plain in (
            ("attention_bias", False),
            ("mlp_bias", False),
            ("hidden_act", "silu"),
            ("quantization_config", None),
            ("partial_rotary_factor", 1.0),
        )
        if config.get(key) not in (None, plain)
    ]
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        kind = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, dict) else "default"
        if kind != "default":
            found.append(f"{key} asks for rope scaling of type {kind!r}, which is not covered yet")
    return found


def _open_weights(path: Path) -> dict[str, Any]:
    """Map every weight file; return for each tensor name the open file that has it."""
    handles: dict[str, Any] = {}
    problems: list[str] = []
    for file in _weight_files(path):
        if not file.is_file():
            problems.append(f"shard {file.name} is missing; {INDEX_FILE} lists it")
            continue
        try:
            handle: Any = safetensors.safe_open(file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{file.name} is truncated or no safetensors file: {error}; fetch it again")
            continue
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if name in handles:
                problems.append(f"{name} is in {file.name} and in another shard")
            handles[name] = handle
    if problems:
        raise ModelFolderError(f"weights of {path} cannot be read", problems)
    return handles


def _weight_files(path: Path) -> list[Path]:
    """Return the weight files, looked for in the order of transformers."""
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).is_file():
        try:
            return sorted({path / name for name in read_json(path / INDEX_FILE)["weight_map"].values()})
        except (OrchestrateError, KeyError, TypeError, AttributeError) as error:
            raise ModelFolderError(f"{path / INDEX_FILE} should map tensors to files: {error!r}") from error
    if shards := sorted(path.glob("model-*-of-*.safetensors")):
        return shards
    pickled = next(path.glob("pytorch_model*.bin"), None)
    hint = f"; {pickled.name} is not read: save it once as safetensors" if pickled else ""
    raise ModelFolderError(f"{path} has no weights: {SINGLE_FILE} or {INDEX_FILE} with its shards{hint}")


def _check_weights(path: Path, shape: TransformerShape, handles: Mapping[str, Any]) -> torch.dtype:
    """Compare names, shapes and types with what the configuration says; return the one type."""
    expected = expected_tensors(shape)
    problems = [f"{name} is missing" for name in expected if name not in handles]
    dtypes: dict[str, list[str]] = {}
    for name, handle in handles.items():
        if name not in expected:
            # transformers ignores a stored output layer where config.json ties it to the embedding.
            if not _ROTARY_BUFFER.fullmatch(name) and name != "lm_head.weight":
                problems.append(f"{name} is not a tensor of {shape.num_layers} plain Llama layers")
            continue
        part = handle.get_slice(name)
        if tuple(part.get_shape()) != expected[name]:
            problems.append(f"{name} has shape {tuple(part.get_shape())}, config.json gives {expected[name]}")
        dtypes.setdefault(part.get_dtype(), []).append(name)
    if len(dtypes) > 1:
        counts = ", ".join(f"{len(names)} of {dtype} ({names[0]})" for dtype, names in sorted(dtypes.items()))
        problems.append(f"weights should be of one type, found {counts}")
    uncovered = sorted(dtypes.keys() - DTYPES)
    problems += [f"weights of type {dtype} are not covered; save them as bf16" for dtype in uncovered]
    if problems:
        rest = len(problems) - SHOWN_PROBLEMS
        shown = [*problems[:SHOWN_PROBLEMS], f"and {rest} more"] if rest > 0 else problems
        raise ModelFolderError(f"weights of {path} are not those that its config.json describes", shown)
    return DTYPES[next(iter(dtypes))]
