"""How much the GPU check computes, and the settings of its runs. Standard library only: nothing here imports torch.

Read are conf/model and conf/precision, without a YAML parser, since the machine may have none.
"""

import dataclasses
from pathlib import Path
from typing import Any

from orchestrator.model_shape import TransformerShape
from orchestrator.settings import (
    RANDOM_BASE,
    ClusterSettings,
    DataSettings,
    LayoutSettings,
    PrecisionSettings,
    RunSettings,
    TrainingSettings,
)
from orchestrator.values import from_plain

REPOSITORY = Path(__file__).resolve().parent.parent
PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 SXM or H200, by their data sheets."""
SEED = 1234
PRECISIONS = ("bf16", "fp8-tensorwise", "fp8-delayed", "fp8-blockwise")
"""Files of conf/precision that are checked on a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed."""

    shape: TransformerShape
    sequence_length: int
    sequences: int
    """Of a step."""
    steps: int


def read_flat(path: Path) -> dict[str, Any]:
    """Read a YAML file of one level, as conf/model and conf/precision have them; nothing may be there that reads YAML.

    Raises:
        ValueError: it has more than `name: value` lines.
    """
    values: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        content = line.partition("#")[0].rstrip()
        if not content:
            continue
        name, colon, text = content.partition(": ")
        if not colon or name != name.strip():
            raise ValueError(f"{path} should have lines of `name: value`, found {line!r}")
        values[name] = _value(text.strip())
    return values


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def precision_of(name: str) -> PrecisionSettings:
    """Return the settings of a file of conf/precision."""
    return _read(PrecisionSettings, REPOSITORY / "conf" / "precision" / f"{name}.yaml")


def solar(layers: int) -> TransformerShape:
    """Return SOLAR's shape with fewer layers."""
    shape = _read(TransformerShape, REPOSITORY / "conf" / "model" / "solar-10.7b.yaml")
    return dataclasses.replace(shape, num_layers=layers)


def _read(kind: type[Any], path: Path) -> Any:
    problems: list[str] = []
    found = from_plain(kind, read_flat(path), "", problems)
    if found is None:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return found


FULL = Size(shape=solar(4), sequence_length=4096, sequences=8, steps=20)
TINY = Size(
    shape=TransformerShape(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=250,
        max_position_embeddings=32,
    ),
    sequence_length=32,
    sequences=4,
    steps=8,
)


def settings_of(
    size: Size, precision: PrecisionSettings, device: str, *, micro_batch_size: int = 1, recompute: str = "none"
) -> RunSettings:
    """Return the settings of a run of one rank that reads no files."""
    layout: Any = {"recompute": recompute, "micro_batch_size": micro_batch_size}
    return RunSettings(
        name="gpu-check",
        base=RANDOM_BASE,
        model=size.shape,
        data=DataSettings(train=("drawn",), sequence_length=size.sequence_length),
        training=TrainingSettings(
            tokens=size.steps * size.sequences * size.sequence_length,
            learning_rate=3e-4 if device == "cuda" else 3e-3,  # narrow layers want more
            warmup_steps=4,
            decay="constant",
            seed=SEED,
        ),
        layout=LayoutSettings(global_batch_size=size.sequences, **layout),
        precision=precision,
        cluster=ClusterSettings(
            name="gpu-check",
            scheduler="local",
            device="cuda" if device == "cuda" else "cpu",
            ranks_per_node=1,
            gpu="h100" if device == "cuda" else "",
            peak_tflops=PEAK_TFLOPS,  # on the CPU as well, where a peak would first be measured
        ),
    )
