"""What config.json says of a Llama-like model, and what is written there.

Covered are Llama and Mistral as `transformers` 4 and 5 write them. What makes a model another one (biases,
windows shorter than the context, other rope scaling, quantised weights, ...) is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.errors import ModelFolderError
from orchestrator.model_shape import RopeScaling, TransformerShape

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
    rope_theta, rope_scaling = _rope(config, problems)
    heads = _whole(config, "num_attention_heads", problems)
    hidden = _whole(config, "hidden_size", problems)
    groups_default = {"llama": heads, "mistral": 8}[kind]  # the defaults of transformers
    head_dim = _whole(config, "head_dim", problems, hidden // max(1, heads))
    shape = TransformerShape(
        num_layers=_whole(config, "num_hidden_layers", problems),
        hidden_size=hidden,
        ffn_hidden_size=_whole(config, "intermediate_size", problems),
        num_attention_heads=heads,
        num_query_groups=_whole(config, "num_key_value_heads", problems, groups_default),
        vocab_size=_whole(config, "vocab_size", problems),
        max_position_embeddings=_whole(config, "max_position_embeddings", problems),
        rope_theta=rope_theta,
        rms_norm_eps=_number(config, "rms_norm_eps", problems, 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False) is True,
        head_dim=None if head_dim * heads == hidden else head_dim,
        rope_scaling=rope_scaling,
    )
    if not problems:
        problems += shape.problems()
    if not problems:
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


def config_of(shape: TransformerShape, dtype: torch.dtype, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json, under the names that transformers 4 and 5 both read.

    Args:
        extra: keys beyond the shape, which go before those here.
    """
    # transformers' Llama has no heads of a size of their own where hidden_size does not divide; its Mistral has.
    kind = "mistral" if shape.hidden_size % shape.num_attention_heads else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rope_scaling": _rope_scaling_of(shape.rope_scaling),
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model made from a base keeps of its config.json: special ids, and the name that it goes by."""
    kept = {key: config[key] for key in _KEPT if key in config}
    return kept | {"model_type": config["model_type"], "architectures": [ARCHITECTURES[config["model_type"]]]}


def _rope_scaling_of(scaling: RopeScaling | None) -> dict[str, object] | None:
    if scaling is None:
        return None
    return {"rope_type": scaling.rope_type} | {key: getattr(scaling, key) for key in _ROPE_KEYS[scaling.rope_type]}


def _rope(config: Mapping[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Return rotary base and scaling; transformers 5 keeps both under rope_parameters, others apart."""
    found: dict[str, Mapping[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            found[key] = value
        elif value is not None:
            problems.append(f"{key} should be a mapping or null, found {value!r}")
    nested = found.get("rope_parameters", {})
    theta = float(_number(nested if nested.get("rope_theta") is not None else config, "rope_theta", problems, 10000.0))
    if nested.get("rope_theta") is not None and config.get("rope_theta") not in (None, theta):
        problems.append(f"rope_theta={config['rope_theta']} and rope_parameters.rope_theta={theta} disagree")
    scalings = [scaling for key, value in found.items() if (scaling := _scaling(value, key, problems)) is not None]
    if len(set(scalings)) > 1:
        problems.append(f"rope_scaling={config['rope_scaling']} and rope_parameters={nested} disagree")
    return theta, scalings[0] if scalings else None


def _scaling(rope: Mapping[str, Any], key: str, problems: list[str]) -> RopeScaling | None:
    """Return the scaling that a mapping of config.json asks for; None where it asks for none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, Mapping) for value in rope.values()):
        problems.append(f"{key} differs from layer to layer, which is not covered")
        return None
    if kind == "default":
        return None
    if kind not in _ROPE_KEYS:
        problems.append(
            f"{key} asks for rope scaling of type {kind!r}, which is not covered; {' and '.join(_ROPE_KEYS)} are"
        )
        return None
    values: dict[str, float] = {}
    for name in _ROPE_KEYS[kind]:
        read = _whole if name == "original_max_position_embeddings" else _number
        part: list[str] = []
        values[name] = read(rope, name, part)
        problems += [f"{key}.{problem}" for problem in part]
    return RopeScaling(rope_type=kind, **values)  # type: ignore[arg-type]  # one of them is whole


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


def _uncovered(config: Mapping[str, Any]) -> list[str]:
    """Return each setting that makes the model another than a plain Llama."""
    rope = config.get("rope_parameters")
    partial = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return [
        f"{key}={value!r} is not covered; a plain Llama has {plain!r}"
        for key, value, plain in (
            ("attention_bias", config.get("attention_bias"), False),
            ("mlp_bias", config.get("mlp_bias"), False),
            ("hidden_act", config.get("hidden_act"), "silu"),
            ("quantization_config", config.get("quantization_config"), None),
            ("partial_rotary_factor", config.get("partial_rotary_factor"), 1.0),
            ("rope_parameters.partial_rotary_factor", partial, 1.0),
        )
        if value not in (None, plain)
    ]
