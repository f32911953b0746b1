"""Write a deeper model: each layer a copy of one of the base's, tensor by tensor, with its lineage.

Depth up-scaling, arXiv 2312.15166 and others (depth.py). Nothing is computed on weights, unless another precision or a
layer that adds nothing is asked for, so every tensor of the result is bit for bit one of the base; their checksums,
taken while copying, say so in lineage.json. Memory holds one tensor, whatever the model's size.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_solar.depth import DepthMap, paper_of, rule_of, solar_depth_map
from megatron_solar.evaluate import Evaluation
from megatron_solar.lineage import EVALUATION_FILE, LINEAGE_FILE, EvaluationRecord, Lineage, ModelRecord
from megatron_solar.model_config import kept_config
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.model_writer import Checksums, write_model_folder
from orchestrator.errors import ModelFolderError
from orchestrator.files import sha256_of
from orchestrator.model_shape import TransformerShape
from orchestrator.units import format_count, format_time
from orchestrator.values import to_plain
from orchestrator.version import VERSION

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
ZEROED = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
"""What each layer adds to the hidden state goes through these two."""
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
class UpscalePlan:
    """What an up-scaling would do: the layers, and the sizes before and after.

    Attributes:
        cosines: by which the layers were chosen; empty where they were not.
    """

    layers: DepthMap
    base_shape: TransformerShape
    shape: TransformerShape
    base_dtype: torch.dtype
    dtype: torch.dtype
    cosines: tuple[float, ...] = ()

    @property
    def drop(self) -> int | None:
        """Layers that each of two copies loses, which is how SOLAR's paper counts; None of other rules."""
        layers = self.layers
        return layers.base_layers - len(layers.sources) // 2 if layers.strategy == "solar" else None

    @property
    def base_bytes(self) -> int:
        """Size of the base's weights."""
        return self.base_shape.parameters() * self.base_dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Size of the result's weights."""
        return self.shape.parameters() * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def plan_upscale(
    base: ModelFolder, layers: DepthMap, *, dtype: torch.dtype | None = None, cosines: tuple[float, ...] = ()
) -> UpscalePlan:
    """Decide the shape of the result.

    Args:
        dtype: of its weights; the base's where it is None.
        cosines: by which the layers were chosen.
    """
    return UpscalePlan(
        layers=layers,
        base_shape=base.shape,
        shape=dataclasses.replace(base.shape, num_layers=len(layers.sources)),
        base_dtype=base.dtype,
        dtype=base.dtype if dtype is None else dtype,
        cosines=cosines,
    )


def upscale(
    base: Path,
    output: Path,
    *,
    drop: int,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Lineage:
    """Write a folder's model deepened by SOLAR's rule, whole or not at all.

    Raises:
        ConfigError: a drop that gives no deeper model.
        ModelFolderError, OrchestrateError: as `write_upscaled`; or the base cannot be read.
    """
    folder = ModelFolder.open(base)
    plan = plan_upscale(folder, solar_depth_map(folder.shape.num_layers, drop))
    return write_upscaled(folder, plan, output, progress=progress)


def write_upscaled(
    base: ModelFolder,
    plan: UpscalePlan,
    output: Path,
    *,
    evaluation: Evaluation | None = None,
    text: str = "",
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Lineage:
    """Write the deepened model to `output`, whole or not at all.

    Args:
        evaluation: of base and result, to be recorded.
        text: what it was made on, as it was given.

    Raises:
        ModelFolderError: the base holds NaN, or the disk is too small.
        OrchestrateError: `output` exists already.
    """
    extra_files = kept_files(base.path)
    record = None
    if evaluation is not None:
        extra_files[EVALUATION_FILE] = evaluation.to_bytes()
        record = _evaluation_record(evaluation, text)
    copied = _CopiedTensors(base, plan, progress)
    lineages: list[Lineage] = []

    def describe(checksums: Checksums) -> dict[str, str]:
        lineages.append(_lineage_of(base, plan, copied.base_sums, checksums, record))
        lineage = json.dumps(to_plain(lineages[0]), indent=1, ensure_ascii=False) + "\n"
        return {LINEAGE_FILE: lineage, "README.md": _model_card(lineages[0], plan)}

    write_model_folder(
        output,
        plan.shape,
        copied,
        dtype=plan.dtype,
        config_extra=kept_config(base.config),
        tokenizer_files=base.tokenizer_files(),
        extra_files=extra_files,
        known_sum=copied.known_sum,
        describe=describe,
    )
    return lineages[0]


def source_name(name: str, layers: DepthMap) -> str:
    """Return the base's tensor that a tensor of the result is a copy of."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{layers.sources[int(match[2])]}{match[3]}" if match else name


def kept_files(base: Path) -> dict[str, str | bytes]:
    """Return by name the licence and generation settings of a base, which what is made of it keeps."""
    names = (*LICENCE_FILES, "generation_config.json")
    return {name: (base / name).read_bytes() for name in names if (base / name).is_file()}


def is_zeroed(name: str, layers: DepthMap) -> bool:
    """Return whether a tensor of the result is zero, so that its layer adds nothing at first."""
    match = _LAYER.fullmatch(name)
    return match is not None and int(match[2]) in layers.zeroed and match[3] in ZEROED


class _CopiedTensors:
    """The result's tensors in their order, counted against the formula for the shape.

    A thread reads the next one's source while the one before is written, and takes its checksum, once for all copies.
    """

    def __init__(self, base: ModelFolder, plan: UpscalePlan, progress: Callable[[int, int], None]) -> None:
        self._base = base
        self._plan = plan
        self._progress = progress
        self.base_sums: dict[str, str] = {}
        self._rounded: set[str] = set()  # the base's tensors of another type than the result's

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        plan, names = self._plan, list(expected_tensors(self._plan.shape))
        parameters = 0
        with ThreadPoolExecutor(1) as ahead:
            reading = ahead.submit(self._read, names[0])
            for name, following in zip(names, [*names[1:], None], strict=True):
                tensor = reading.result()
                if following is not None:
                    reading = ahead.submit(self._read, following)
                yield name, torch.zeros_like(tensor) if is_zeroed(name, plan.layers) else tensor
                parameters += tensor.numel()
                self._progress(parameters * plan.dtype.itemsize, plan.result_bytes)
        if parameters != plan.shape.parameters():
            raise ModelFolderError(
                f"result has {parameters:,} parameters, its shape counts {plan.shape.parameters():,}; "
                "please report this with the base's config.json"
            )

    def known_sum(self, name: str) -> str | None:
        """Return the checksum of a tensor of the result where it is its source's."""
        source = source_name(name, self._plan.layers)
        return None if source in self._rounded or is_zeroed(name, self._plan.layers) else self.base_sums[source]

    def _read(self, name: str) -> torch.Tensor:
        source = source_name(name, self._plan.layers)
        tensor = self._base.tensor(source)
        if tensor.dtype != self._plan.dtype:
            self._rounded.add(source)
        if source not in self.base_sums:
            # Through every byte, so that it is in memory from here on.
            self.base_sums[source] = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()
        return tensor


def _evaluation_record(evaluation: Evaluation, text: str) -> EvaluationRecord:
    sequences, length = evaluation.base_losses.shape
    return EvaluationRecord(
        text=text,
        sequences=sequences,
        sequence_length=length,
        base_loss=float(evaluation.base_losses.double().mean()),
        result_loss=float(evaluation.result_losses.double().mean()),
    )


def _lineage_of(
    base: ModelFolder,
    plan: UpscalePlan,
    base_sums: dict[str, str],
    checksums: Checksums,
    evaluation: EvaluationRecord | None,
) -> Lineage:
    name, revision = _name_of(base)
    return Lineage(
        strategy=plan.layers.strategy,
        paper=paper_of(plan.layers.strategy),
        drop=plan.drop,
        layer_sources=plan.layers.sources,
        zeroed_layers=tuple(sorted(plan.layers.zeroed)),
        cosines=plan.cosines,
        base_name=name,
        base_path=str(base.path.resolve()),
        base_revision=revision,
        licence=_licence_of(base.path),
        base_dtype=dtype_name(plan.base_dtype),
        dtype=dtype_name(plan.dtype),
        base=ModelRecord(
            num_layers=plan.base_shape.num_layers,
            parameters=plan.base_shape.parameters(),
            tensors=base_sums,
            files={file.name: sha256_of(file) for file in [base.path / "config.json", *base.tokenizer_files()]},
        ),
        result=ModelRecord(
            num_layers=plan.shape.num_layers,
            parameters=plan.shape.parameters(),
            tensors=checksums.tensors,
            files=checksums.files,
        ),
        evaluation=evaluation,
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
    runs = ", then ".join(str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}"
                          for _, run in plan.layers.runs())  # fmt: skip
    front = ["---", f"license: {lineage.licence}", "library_name: transformers"]
    if "/" in name:  # an id of the hub
        front.append(f"base_model: {name}")
    facts = [
        f"- Parameters: {lineage.result.parameters:,} ({format_count(lineage.result.parameters)}), "
        f"of the base {lineage.base.parameters:,}",
        f"- Weights: {lineage.dtype}" + (f", of the base {lineage.base_dtype}" * (plan.dtype != plan.base_dtype)),
        f"- Licence of the base: {lineage.licence}",
        f"- Written by orchestrate {lineage.orchestrate_version}, {lineage.created}",
    ]
    if lineage.zeroed_layers:
        zeroed = ", ".join(map(str, lineage.zeroed_layers))
        facts.insert(0, f"- Layers {zeroed} add nothing at first: their o_proj and down_proj are zero")
    if (found := lineage.evaluation) is not None:
        facts.insert(
            -1,
            f"- Held-out loss: {found.result_loss:.4f} nats a token, of the base {found.base_loss:.4f}, over "
            f"{found.sequences} sequences of {found.sequence_length} tokens (`{found.file}`)",
        )
    return "\n".join(
        [
            *front,
            "---",
            f"# {name}, deepened to {lineage.result.num_layers} layers",
            "",
            f"Depth up-scaling of `{name}` by the rule `{lineage.strategy}` ({lineage.paper}): "
            f"{rule_of(lineage.strategy)}. "
            f"Its {lineage.result.num_layers} layers are copies of the base's layers {runs}; nothing has been trained "
            "yet: it is a start for pretraining to go on from.",
            "",
            *facts,
            "",
            f"`{LINEAGE_FILE}` has the source of each layer and the SHA-256 of every tensor and file.",
            "",
        ]
    )
