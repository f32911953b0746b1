"""A checkpoint of any layout as a Hugging Face folder, one tensor at a time, without megatron or ranks.

A checkpoint holds each tensor once for the whole model, whatever the layout it was trained at; a single
process reads them by their canonical keys.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_solar.checkpoint_files import WEIGHT, open_verified, tensor_name
from megatron_solar.model_folder import ModelFolder
from megatron_solar.model_writer import Checksums, write_model_folder
from megatron_solar.upscale import LINEAGE_FILE
from megatron_solar.weights import PRECISION_DTYPES, to_hugging_face
from orchestrator.checkpoints import Checkpoint
from orchestrator.plan import TrainingPlan
from orchestrator.settings import RANDOM_BASE
from orchestrator.tokenize import hugging_face
from orchestrator.tokenize.manifest import read_manifest
from orchestrator.values import to_plain
from orchestrator.version import VERSION


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
    done = 0

    def read(key: str) -> Tensor:
        return stored.whole(tensor_name(WEIGHT, key))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name, tensor in to_hugging_face(settings.model, read):
            yield name, tensor
            done += tensor.numel()
            progress(done, plan.parameters)

    tokenizer_files, config, base_lineage = _from_base(plan)
    lineage = {
        "run": run_name,
        "step": checkpoint.step,
        "consumed_samples": checkpoint.facts.consumed_samples,
        "consumed_tokens": checkpoint.step * plan.tokens_per_step,
        "checkpoint": checkpoint.name,
        "checkpoint_files": to_plain(checkpoint.files),
        "data_fingerprint": checkpoint.facts.data_fingerprint,
        "plan_fingerprint": plan.fingerprint,
        "parameters": plan.parameters,
        "orchestrate_version": VERSION,
        "base": settings.base,
        "base_lineage": base_lineage,
    }
    return write_model_folder(
        output,
        settings.model,
        tensors(),
        dtype=PRECISION_DTYPES[settings.training.precision],
        config_extra=config,
        tokenizer_files=tokenizer_files,
        extra_files=_made_tokenizer(tokenizer_files),
        describe=lambda sums: {
            LINEAGE_FILE: json.dumps({**lineage, "tensors": {**sums.tensors}, "files": {**sums.files}}, indent=2)
        },
    )


def _from_base(plan: TrainingPlan) -> tuple[list[Path], dict[str, object], object]:
    """Return tokenizer files, special ids and lineage of the base, or those of the data where it was random."""
    settings = plan.settings
    if settings.base != RANDOM_BASE and Path(settings.base).is_dir():
        folder = ModelFolder.open(Path(settings.base))
        ids: dict[str, object] = {
            key: folder.config[key] for key in ("bos_token_id", "eos_token_id") if key in folder.config
        }
        path = folder.path / LINEAGE_FILE
        return folder.tokenizer_files(), ids, json.loads(path.read_text()) if path.exists() else None
    data = Path(settings.data.train[0])
    manifest = read_manifest(data)
    ids = {"bos_token_id": manifest.begin_of_document, "eos_token_id": manifest.end_of_document}
    return [data / manifest.tokenizer_file], ids, None


def _made_tokenizer(files: Sequence[Path]) -> dict[str, str]:
    """Return the tokenizer.json that a lone SentencePiece model lacks."""
    return hugging_face.tokenizer_files(files[0]) if [file.name for file in files] == ["tokenizer.model"] else {}
