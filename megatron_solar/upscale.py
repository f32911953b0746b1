"""Write a deeper model: each layer a copy of one of the base's, tensor by tensor, with its lineage.

Depth up-scaling, arXiv 2312.15166. Nothing is computed on weights, so every tensor of the result is
bit for bit one of the base; their checksums, taken while copying, say so in lineage.json. Memory holds
one tensor, whatever the model's size.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from megatron_solar.depth import STRATEGIES, DepthMap, depth_map
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.model_writer import Checksums, write_model_folder
from orchestrator.errors import ModelFolderError
from orchestrator.files import sha256_of
from orchestrator.model_shape import TransformerShape
from orchestrator.units import format_count, format_time
from orchestrator.values import to_plain
from orchestrator.version import VERSION

LINEAGE_FILE = "lineage.json"
KEPT_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
# Ids of the Hugging Face hub, by words at the head of the licence's text.
LICENCE_HEADS = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 2 community": "llama2",
    "llama 3 community": "llama3",
    "llama 3.1 community": "llama3.1",
}

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What a model folder holds: its size and SHA-256 checksums, in hexadecimal."""

    num_layers: int
    parameters: int
    tensors: Mapping[str, str]
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an up-scaled model comes from; the content of its lineage.json.

    Attributes:
        layer_sources: for each layer of the result the base's layer.
        base_revision: the hub's commit, where the base lies in the hub's cache.
        licence: the base's, as an id of the hub; `unknown` where the folder has none.
    """

    strategy: str
    paper: str
    drop: int
    layer_sources: tuple[int, ...]
    base_name: str
    base_path: str
    base_revision: str | None
    licence: str
    dtype: str
    base: ModelRecord
    result: ModelRecord
    orchestrate_version: str
    created: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscalePlan:
    """What an up-scaling would do: the layers, and the sizes before and after."""

    strategy: str
    drop: int
    layers: DepthMap
    base_shape: TransformerShape
    shape: TransformerShape
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """Name of the weights' type, as config.json has it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def base_bytes(self) -> int:
        """Size of the base's weights."""
        return self.base_shape.parameters() * self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Size of the result's weights."""
        return self.shape.parameters() * self.dtype.itemsize


def plan_upscale(base: ModelFolder, *, drop: int, strategy: str = "solar") -> UpscalePlan:
    """Decide the layers and the shape of the result.

    Raises:
        ConfigError: no such strategy, or a drop that gives no deeper model.
    """
    layers = depth_map(strategy, base.shape.num_layers, drop)
    return UpscalePlan(
        strategy=strategy,
        drop=drop,
        layers=layers,
        base_shape=base.shape,
        shape=dataclasses.replace(base.shape, num_layers=len(layers.sources)),
        dtype=base.dtype,
    )


def upscale(
    base: Path,
    output: Path,
    *,
    drop: int,
    strategy: str = "solar",
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Lineage:
    """Write the deepened model to `output`, whole or not at all.

    Raises:
        ModelFolderError: the base cannot be read, holds NaN, or the disk is too small.
        ConfigError: no such strategy, or a drop that gives no deeper model.
        OrchestrateError: `output` exists already.
    """
    folder = ModelFolder.open(base)
    plan = plan_upscale(folder, drop=drop, strategy=strategy)
    kept = [name for name in LICENCE_FILES if (base / name).is_file()]
    lineages: list[Lineage] = []

    def describe(checksums: Checksums) -> dict[str, str]:
        lineages.append(_lineage_of(folder, plan, checksums))
        lineage = json.dumps(to_plain(lineages[0]), indent=1, ensure_ascii=False) + "\n"
        return {LINEAGE_FILE: lineage, "README.md": _model_card(lineages[0], plan)}

    write_model_folder(
        output,
        plan.shape,
        _copied_tensors(folder, plan, progress),
        dtype=folder.dtype,
        config_extra={key: folder.config[key] for key in KEPT_CONFIG if key in folder.config},
        tokenizer_files=folder.tokenizer_files(),
        extra_files={
            name: (base / name).read_text(encoding="utf-8", errors="replace")
            for name in [*kept, "generation_config.json"]
            if (base / name).is_file()
        },
        describe=describe,
    )
    return lineages[0]


def source_name(name: str, layers: DepthMap) -> str:
    """Return the base's tensor that a tensor of the result is a copy of."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{layers.sources[int(match[2])]}{match[3]}" if match else name


def _copied_tensors(
    base: ModelFolder, plan: UpscalePlan, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the result's tensors, and count them against the formula for the shape."""
    parameters = 0
    for name in expected_tensors(plan.shape):
        tensor = base.tensor(source_name(name, plan.layers))
        yield name, tensor
        parameters += tensor.numel()
        progress(parameters * plan.dtype.itemsize, plan.result_bytes)
    if parameters != plan.shape.parameters():
        raise ModelFolderError(
            f"result has {parameters:,} parameters, its shape counts {plan.shape.parameters():,}; "
            "please report this with the base's config.json"
        )


def _lineage_of(base: ModelFolder, plan: UpscalePlan, checksums: Checksums) -> Lineage:
    name, revision = _name_of(base)
    tensors = {source_name(target, plan.layers): digest for target, digest in checksums.tensors.items()}
    return Lineage(
        strategy=plan.strategy,
        paper=STRATEGIES[plan.strategy].paper,
        drop=plan.drop,
        layer_sources=plan.layers.sources,
        base_name=name,
        base_path=str(base.path.resolve()),
        base_revision=revision,
        licence=_licence_of(base.path),
        dtype=plan.dtype_name,
        base=ModelRecord(
            num_layers=plan.base_shape.num_layers,
            parameters=plan.base_shape.parameters(),
            tensors=tensors,
            files={file.name: sha256_of(file) for file in [base.path / "config.json", *base.tokenizer_files()]},
        ),
        result=ModelRecord(
            num_layers=plan.shape.num_layers,
            parameters=plan.shape.parameters(),
            tensors=checksums.tensors,
            files=checksums.files,
        ),
        orchestrate_version=VERSION,
        created=format_time(time.time()),
    )


def _name_of(base: ModelFolder) -> tuple[str, str | None]:
    """Return the base's name, and its commit where it lies in the hub's cache."""
    if cached := _HUB_CACHE.search(base.path.absolute().as_posix()):
        return f"{cached[1]}/{cached[2]}", cached[3]
    return base.path.resolve().name, None


def _licence_of(path: Path) -> str:
    """Return the licence that the folder's model card or licence text names."""
    card = path / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        named = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
        if named:
            return named[1]
    for name in LICENCE_FILES:
        if name.startswith("LICEN") and (path / name).is_file():
            head = (path / name).read_text(encoding="utf-8", errors="replace")[:500].lower()
            return next((known for words, known in LICENCE_HEADS.items() if words in head), "other")
    return "unknown"


def _model_card(lineage: Lineage, plan: UpscalePlan) -> str:
    name = lineage.base_name
    runs = ", then ".join(f"{run.start}-{run.stop - 1}" for _, run in plan.layers.runs())
    front = ["---", f"license: {lineage.licence}", "library_name: transformers"]
    if "/" in name:  # an id of the hub
        front.append(f"base_model: {name}")
    return "\n".join(
        [
            *front,
            "---",
            f"# {name}, deepened to {lineage.result.num_layers} layers",
            "",
            f"Depth up-scaling of `{name}` by the rule `{lineage.strategy}` ({lineage.paper}): "
            f"{STRATEGIES[lineage.strategy].rule}. "
            f"Its {lineage.result.num_layers} layers are copies of the base's layers {runs}; "
            "nothing has been trained yet, so it predicts worse than its base until pretraining goes on.",
            "",
            f"- Parameters: {lineage.result.parameters:,} ({format_count(lineage.result.parameters)}), "
            f"of the base {lineage.base.parameters:,}",
            f"- Weights: {lineage.dtype}",
            f"- Licence of the base: {lineage.licence}",
            f"- Written by orchestrate {lineage.orchestrate_version}, {lineage.created}",
            "",
            f"`{LINEAGE_FILE}` has the source of each layer and the SHA-256 of every tensor and file.",
            "",
        ]
    )
