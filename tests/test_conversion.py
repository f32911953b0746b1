"""Hugging Face to training and back: the same numbers as `transformers`, the same bits after no step.

2e-5 is what sums in another order make of fp32 logits of this size; measured values are in docs/log.md.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers

from megatron_solar.checkpoint_files import KINDS, open_verified, tensor_name
from megatron_solar.export import export
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.upscale import upscale
from megatron_solar.weights import canonical_keys
from orchestrator import exit_codes
from orchestrator.checkpoints import choose_checkpoint, complete_checkpoints
from orchestrator.errors import ModelFolderError
from orchestrator.plan import read_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.verify import LOGIT_TOLERANCE, verify_export
from tests.conftest import Trainer

SHAPES: dict[str, Mapping[str, object]] = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "full": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "deep, wide FFN, other theta": {"num_hidden_layers": 6, "intermediate_size": 160, "rope_theta": 50000.0},
}
TP2 = ("layout.tensor_parallel=2", "layout.sequence_parallel=true", "cluster.ranks_per_node=2")
TP2_PP2 = ("layout.tensor_parallel=2", "layout.pipeline_parallel=2", "cluster.ranks_per_node=4")


def make_base(folder: Path, tokenizer: Path, **different: object) -> Path:
    """Let transformers write a random Llama, its norms not all ones, with a vocabulary file beside it."""
    sizes: dict[str, object] = {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **different,
    }
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def shape_overrides(base: Path) -> list[str]:
    """Return the settings of a base's shape."""
    shape = ModelFolder.open(base).shape
    return [f"model.{field.name}={str(getattr(shape, field.name)).lower()}" for field in dataclasses.fields(shape)]


def load_without_a_step(trainer: Trainer, base: Path, *overrides: str) -> RunDirectory:
    """Start ranks from a folder and let them leave before the first step; step 0 is saved."""
    run, plan = trainer.make_run(*shape_overrides(base), f"base={base}", *overrides, steps=1)
    trainer.train(run, plan)
    return run


def exported(run: RunDirectory, output: Path, step: int) -> Path:
    export(choose_checkpoint(run, step), read_plan(run.plan), output, run_name=run.name)
    return output


@pytest.mark.parametrize("name", SHAPES)
def test_hugging_face_to_megatron_and_back_keeps_every_bit_and_the_logits(
    trainer: Trainer, tmp_path: Path, tokenizer: Path, name: str
) -> None:
    base = make_base(tmp_path / "base", tokenizer, **SHAPES[name])
    parallel = TP2_PP2 if name in ("grouped", "tied") else () if name == "multi-query" else TP2
    run = load_without_a_step(trainer, base, *parallel)
    back = exported(run, tmp_path / "back", step=0)

    before, after = ModelFolder.open(base), ModelFolder.open(back)
    assert after.shape == before.shape
    names = list(expected_tensors(before.shape))
    assert [name for name in names if not torch.equal(before.tensor(name), after.tensor(name))] == []
    found = verify_export(run, choose_checkpoint(run, 0), base)
    print(f"{name}: largest logit difference {found.largest_logit_difference:.1e}")
    assert found.largest_logit_difference < LOGIT_TOLERANCE


def test_an_upscaled_base_trains_at_tp2_and_its_export_has_the_logits_of_the_trained_model(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    base = make_base(tmp_path / "base", tokenizer)
    upscale(base, tmp_path / "upscaled", drop=1)
    run, plan = trainer.make_run(
        *shape_overrides(tmp_path / "upscaled"), f"base={tmp_path / 'upscaled'}", *TP2, steps=3
    )
    trainer.train(run, plan)
    fresh = verify_export(run, choose_checkpoint(run, 0), tmp_path / "upscaled")
    trained = verify_export(run, choose_checkpoint(run, 3), exported(run, tmp_path / "trained", step=3))
    print(f"up-scaled {fresh.largest_logit_difference:.1e}, trained {trained.largest_logit_difference:.1e}")
    assert plan.settings.model.num_layers == 6
    assert fresh.largest_logit_difference < LOGIT_TOLERANCE
    assert trained.largest_logit_difference < LOGIT_TOLERANCE
    with pytest.raises(ModelFolderError, match="do not use it"):  # the comparison can tell them apart
        verify_export(run, choose_checkpoint(run, 3), tmp_path / "upscaled")


def test_the_tokenizer_of_an_export_gives_sentencepieces_ids(trainer: Trainer, tmp_path: Path, tokenizer: Path) -> None:
    import sentencepiece

    run, plan = trainer.make_run(steps=1)
    trainer.train(run, plan)
    folder = exported(run, tmp_path / "model", step=1)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    source = Path(dataclasses.__file__).read_text()
    texts = [
        "",
        " ",
        "a  b   c",
        "  indented\n\ttabs",
        "naïve café, 한국어, 日本語, 🙂",
        "\x00",
        *source.splitlines(),
        source,
    ]
    for text in texts:
        assert loaded(text).input_ids == [reference.bos_id(), *reference.encode(text)]


def test_every_tensor_of_a_checkpoint_is_the_models_or_the_optimizers(trainer: Trainer) -> None:
    run, plan = trainer.make_run(*TP2_PP2, steps=1)
    trainer.train(run, plan)
    tensors = open_verified(choose_checkpoint(run, 1))
    keys = canonical_keys(plan.settings.model)
    assert set(tensors.names()) == {tensor_name(kind, key) for kind in KINDS for key in keys}
    shapes = {key: tensors.shape(tensor_name("weight", key)) for key in keys}
    assert sum(math.prod(shape) for shape in shapes.values()) == plan.parameters


def test_a_base_of_another_shape_is_refused_before_a_step(trainer: Trainer, tmp_path: Path, tokenizer: Path) -> None:
    base = make_base(tmp_path / "base", tokenizer)
    run, plan = trainer.make_run(f"base={base}", steps=1)
    attempt, ranks = trainer.start(run, plan)
    assert trainer.wait(run, attempt, ranks) == [exit_codes.BAD_CONFIG]
    log = attempt.rank_log(0).read_text()
    assert "model.hidden_size: the base has 64, the settings say 32" in log
    assert complete_checkpoints(run) == []
