"""Compare an exported folder with the checkpoint it came from: Megatron's logits beside transformers'.

    python -m megatron_solar.verify RUN CHECKPOINT FOLDER [--prompt TEXT]

A process of its own, one rank on the CPU in fp32, whatever the layout that trained the checkpoint.
Prints one JSON object in its last line.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_solar.checkpoint_files import WEIGHT, open_verified, tensor_name
from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.model_folder import tokenizer_files
from megatron_solar.weights import PRECISION_DTYPES, canonical_key, rank_part
from orchestrator.checkpoints import Checkpoint, read_checkpoint
from orchestrator.plan import TrainingPlan, read_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import PrecisionSettings

SAMPLES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found."""

    largest_logit_difference: float
    largest_logit: float
    tokens_compared: int
    generated: str
    """Nothing where the folder has no tokenizer."""


def compare(run: RunDirectory, checkpoint: Checkpoint, folder: Path, prompt: str) -> Comparison:
    """Run the same random tokens through both models, and let the exported one go on with a prompt."""
    plan = read_plan(run.plan)
    length = min(plan.settings.data.sequence_length, 128)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, plan.settings.model.vocab_size, (SAMPLES, length), generator=generator)
    megatron = megatron_logits(plan, checkpoint, tokens_BS)
    import transformers

    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hugging_face = model(tokens_BS).logits
    return Comparison(
        largest_logit_difference=float((megatron - hugging_face).abs().max()),
        largest_logit=float(hugging_face.abs().max()),
        tokens_compared=tokens_BS.numel(),
        generated=_generate(transformers, model, folder, prompt),
    )


def megatron_logits(plan: TrainingPlan, checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return [batch, sequence, vocabulary] of megatron's model on one CPU rank in fp32.

    Its weights are those that the ranks computed with, so that a checkpoint of a run in bf16 is rounded.
    """
    settings = plan.settings
    alone = dataclasses.replace(
        plan.layout,
        tensor_parallel=1,
        pipeline_parallel=1,
        virtual_pipeline_parallel=1,
        sequence_parallel=False,
        context_parallel=1,
        data_parallel=1,
    )
    with cuda_calls_on_cpu():
        from megatron_solar import compat

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            compat.initialize_parallel(alone, settings.training.seed)
            in_fp32 = PrecisionSettings(dtype="fp32")
            config = compat.transformer_config(settings.model, alone, settings.training, in_fp32, "cpu")
            chunk = compat.build_chunk(settings.model, config, tokens_BS.shape[1], "cpu", None)
            tensors = open_verified(checkpoint)
            with torch.no_grad():
                for name, parameter in chunk.named_parameters():
                    key = canonical_key(name, 0, is_tied=settings.model.tie_embeddings)
                    whole = tensors.whole(tensor_name(WEIGHT, key), PRECISION_DTYPES[settings.precision.dtype])
                    parameter.copy_(rank_part(key, whole, 0, 1))
            positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
            with torch.no_grad():
                logits: torch.Tensor = chunk.eval()(tokens_BS, positions_BS, None)
            return logits[..., : settings.model.vocab_size]
        finally:
            torch.distributed.destroy_process_group()


def _generate(transformers: Any, model: Any, folder: Path, prompt: str) -> str:
    if not tokenizer_files(folder):
        return ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def main() -> None:
    """Compare, and print the result as JSON."""
    parser = argparse.ArgumentParser(prog="verify")
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="import os\n\ndef ")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = compare(RunDirectory(options.run), read_checkpoint(options.checkpoint), options.folder, options.prompt)
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
    sys.exit()
