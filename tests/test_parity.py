"""The same numbers as `transformers` for every kind of Llama that is covered, at every layout, from folder to folder.

Bases are started from their Hugging Face folders at TP1, 2, 4 x PP1, 2. Logits are compared in fp32, and the losses of
two steps of AdamW with torch's own optimizer on the model of `transformers`: what pads a vocabulary takes no part.
2e-5 is what sums in another order make of logits of this size; the deviation of the weights is 0.12, so that attention
is far from uniform and rotary frequencies show.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_solar.model_folder import ModelFolder
from megatron_solar.upscale import upscale
from orchestrator.checks import settings_problems
from orchestrator.settings import TrainingSettings
from tests.conftest import Trainer
from tests.parity_ranks import STEPS
from tests.random_base import write_random_base

TOLERANCE = 2e-5
BATCHES, BATCH, LENGTH = 2, 2, 48
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SHAPES: dict[str, Mapping[str, object]] = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "full attention": {"num_key_value_heads": 4, "rope_theta": 50000.0, "rms_norm_eps": 1e-6},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 333},
    "wide heads": {"head_dim": 32, "vocab_size": 321},
    "Mistral, heads that hidden does not give": {
        "model_type": "mistral", "hidden_size": 60, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "Llama 3.1's rope": {"rope_parameters": LLAMA3, "vocab_size": 1001},
    "deep, wide FFN": {"num_hidden_layers": 6, "intermediate_size": 160, "rope_theta": 1e6},
    "ranks with nothing but padding": {"vocab_size": 10},
    "everything": {
        "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 334, "head_dim": 24,
        "rope_parameters": LLAMA3,
    },
}  # fmt: skip
UPSCALED = ("grouped", "everything")
LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A base, and what transformers makes of it."""

    folder: Path
    logits: Tensor
    losses: list[float]


def reference(folder: Path, tokens_MBS: Tensor) -> Reference:
    """Compute logits and the losses of some steps with transformers and torch's AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_MBS = tokens_MBS % model.config.vocab_size
    with torch.no_grad():
        logits_MBSV = torch.stack([model(tokens_BS[:, :-1]).logits for tokens_BS in tokens_MBS])
    training = training_settings()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=training.learning_rate, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps,
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        every = [
            torch.nn.functional.cross_entropy(model(tokens_BS[:, :-1]).logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
            for tokens_BS in tokens_MBS
        ]
        loss = torch.stack(every).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return Reference(folder=folder, logits=logits_MBSV, losses=losses)


def training_settings() -> TrainingSettings:
    """Return settings of AdamW whose eps keeps gradients near zero from being blown up to whole steps."""
    return TrainingSettings(tokens=1, learning_rate=1e-3, weight_decay=0.1, adam_eps=1e-5)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 10**6, (BATCHES, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> dict[str, Reference]:
    """Bases of every shape, some of them up-scaled."""
    folder = tmp_path_factory.mktemp("bases")
    bases = {name: write_random_base(folder / str(n), **SHAPES[name]) for n, name in enumerate(SHAPES)}
    for name in UPSCALED:
        upscale(bases[name], folder / f"upscaled-{name}", drop=1)
        bases[f"{name}, up-scaled"] = folder / f"upscaled-{name}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models of this size cost ten times as much with two
    found = {name: reference(base, tokens) for name, base in bases.items()}
    torch.set_num_threads(threads)
    return found


def start_layout(trainer: Trainer, tensor: int, pipeline: int, bases: Mapping[str, Path], tokens: Tensor) -> Any:
    """Run `tests.parity_ranks` at a layout and return what each rank found."""
    training = training_settings()
    run, plan = trainer.make_run(
        f"layout.tensor_parallel={tensor}",
        f"layout.pipeline_parallel={pipeline}",
        f"layout.sequence_parallel={str(tensor > 1).lower()}",
        f"layout.micro_batch_size={BATCH}",
        f"layout.global_batch_size={BATCH * BATCHES}",
        f"cluster.ranks_per_node={tensor * pipeline}",
        "cluster.peak_tflops=1",  # otherwise measured for half a second for each base
        f"data.sequence_length={LENGTH}",
        f"training.learning_rate={training.learning_rate}",
        f"training.weight_decay={training.weight_decay}",
        f"training.adam_eps={training.adam_eps}",
    )
    for base in bases.values():
        shape = ModelFolder.open(base).shape
        assert settings_problems(dataclasses.replace(plan.settings, model=shape)) == []
    (run.path / "bases.json").write_text(json.dumps({name: str(base) for name, base in bases.items()}))
    torch.save(tokens, run.path / "tokens.pt")
    return trainer.found_by_ranks(run, plan, "tests.parity_ranks", seconds=300)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS, ids=lambda size: str(size))
def test_logits_and_losses_from_a_hugging_face_folder_are_those_of_transformers(
    trainer: Trainer, references: dict[str, Reference], tokens: Tensor, tensor: int, pipeline: int
) -> None:
    folders = {name: reference.folder for name, reference in references.items()}
    found = start_layout(trainer, tensor, pipeline, folders, tokens)
    last_stage = found[-tensor:]  # ranks of the last stage are the last, their tensor ranks in order
    off = {}
    for name, expected in references.items():
        logits_MBSV = torch.cat([rank[name]["logits"] for rank in last_stage], dim=-1)
        vocabulary = expected.logits.shape[-1]
        assert logits_MBSV.shape[-1] % (8 * tensor) == 0
        assert logits_MBSV.shape[-1] >= vocabulary
        logits = float((logits_MBSV[..., :vocabulary] - expected.logits).abs().max())
        losses = max(
            abs(ours - theirs)
            for rank in last_stage
            for ours, theirs in zip(rank[name]["losses"], expected.losses, strict=True)
        )
        padding = max(rank[name]["padding"] for rank in found)
        print(f"TP{tensor} PP{pipeline} {name}: logits {logits:.1e}, losses {losses:.1e}, padding {padding}")
        off[name] = (logits, losses, padding)
    assert {name: found for name, found in off.items() if not (max(found[:2]) <= TOLERANCE and found[2] == 0.0)} == {}


@pytest.mark.parametrize("name", ["linear rope", "Llama 3.1's rope", "everything"])
def test_rope_scaling_changes_logits_by_far_more_than_the_tolerance(
    references: dict[str, Reference], tokens: Tensor, name: str
) -> None:
    """What the comparison above would see if scaling were left out."""
    config = transformers.AutoConfig.from_pretrained(references[name].folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(references[name].folder, config=config)
    with torch.no_grad():
        logits_BSV = model(tokens[0, :, :-1] % config.vocab_size).logits
    assert float((logits_BSV - references[name].logits[0]).abs().max()) > 1000 * TOLERANCE
