"""Random models written by transformers, for tests that compare with it."""

from pathlib import Path
from typing import Any

import torch
import transformers


def write_random_base(folder: Path, *, seed: int = 7, **different: Any) -> Path:
    """Let transformers write a small random model whose norms are not all ones.

    Args:
        different: keys of config.json with other values, `model_type` among them.
    """
    kind = different.pop("model_type", "llama")
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.12,  # so that attention is far from uniform
        **({"sliding_window": None} if kind == "mistral" else {}),
        **different,
    }
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder
