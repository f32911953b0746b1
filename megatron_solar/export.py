"""A checkpoint of any layout as a Hugging Face folder, one tensor at a time, without megatron or ranks.

A checkpoint holds each tensor once for the whole model, whatever the layout it was trained at; a single
process reads them by their canonical keys.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron_solar.checkpoint_files import WEIGHT, open_verified, tensor_name
from megatron_solar.lineage import LINEAGE_FILE, read_lineage
from megatron_solar.model_config import kept_config
from megatron_solar.model_folder import read_config, tokenizer_files
from megatron_solar.model_writer import Checksums, write_model_folder
from megatron_solar.upscale import kept_files
from megatron_solar.weights import PRECISION_DTYPES, to_hugging_face
from orchestrator.checkpoints import Checkpoint
from orchestrator.plan import TrainingPlan
from orchestrator.settings import RANDOM_BASE
from orchestrator.tokenize import hugging_face
from orchestrator.tokenize.manifest import read_manifest
from orchestrator.values import to_plain
from orchestrator.version import VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Companions:
    """What goes beside the weights.

    Attributes:
        config: keys of config.json beyond the shape.
        files: content of more files by name: licence, generation settings, a tokenizer made here.
        lineage: of the base; nothing where it has none.
    """

    tokenizer_files: Sequence[Path]
    config: Mapping[str, object]
    files: Mapping[str, str | bytes]
    lineage: Mapping[str, object]


def export(
    checkpoint: Checkpoint,
    plan: TrainingPlan,
    output: Path,
    *,
    run_name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checksums:
    """Write a checkpoint as a Hugging Face folder with tokenizer and lineage, or leave nothing.

    Args:
        progress: called with the parameters written and their total.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
        ModelFolderError: a tensor is not finite, or the disk is too small.
    """
    settings = plan.settings
    stored = open_verified(checkpoint)
    companions = _companions(plan)
    dtype = PRECISION_DTYPES[settings.precision.dtype]
    done = 0

    def read(key: str) -> Tensor:
        return stored.whole(tensor_name(WEIGHT, key), dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name, tensor in to_hugging_face(settings.model, read):
            yield name, tensor
            done += tensor.numel()
            progress(done, plan.parameters)

    lineage = {
        "run": run_name,
        "step": checkpoint.step,
        "consumed_samples": checkpoint.facts.consumed_samples,
        "consumed_tokens": plan.consumed_tokens(checkpoint.step),
        "checkpoint": checkpoint.name,
        "checkpoint_files": to_plain(checkpoint.files),
        "data_fingerprint": checkpoint.facts.data_fingerprint,
        "plan_fingerprint": plan.fingerprint,
        "parameters": plan.parameters,
        "orchestrate_version": VERSION,
        "base": settings.base,
        "base_lineage": companions.lineage or None,
    }
    return write_model_folder(
        output,
        settings.model,
        tensors(),
        dtype=dtype,
        config_extra=companions.config,
        tokenizer_files=companions.tokenizer_files,
        extra_files=companions.files,
        describe=lambda sums: {
            LINEAGE_FILE: json.dumps({**lineage, "tensors": {**sums.tensors}, "files": {**sums.files}}, indent=2)
        },
    )


def _companions(plan: TrainingPlan) -> _Companions:
    """Return what the base has beside its weights; where there is no base any more, the tokenizer of the data."""
    settings, base = plan.settings, Path(plan.settings.base)
    if settings.base != RANDOM_BASE and base.is_dir():
        found = tokenizer_files(base)
        return _Companions(
            tokenizer_files=found,
            config=kept_config(read_config(base)),
            files={**_made_tokenizer(found), **kept_files(base)},
            lineage=read_lineage(base),
        )
    data = Path(settings.data.train[0])
    manifest = read_manifest(data)
    found = [data / manifest.tokenizer_file]
    ids: dict[str, object] = {"bos_token_id": manifest.begin_of_document, "eos_token_id": manifest.end_of_document}
    return _Companions(tokenizer_files=found, config=ids, files=_made_tokenizer(found), lineage={})


def _made_tokenizer(files: Sequence[Path]) -> dict[str, str]:
    """Return the tokenizer.json that a lone SentencePiece model lacks."""
    return hugging_face.tokenizer_files(files[0]) if [file.name for file in files] == ["tokenizer.model"] else {}
