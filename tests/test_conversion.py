"""Hugging Face to training and back: the same bits after no step, the same numbers as `transformers` after some.

2e-5 is what sums in another order make of fp32 logits of this size; measured values are in docs/log.md.
`tests/test_parity.py` has every shape at every layout.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from megatron_solar.checkpoint_files import KINDS, open_verified, tensor_name
from megatron_solar.export import export
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.upscale import upscale
from megatron_solar.weights import canonical_keys
from orchestrator import exit_codes
from orchestrator.checkpoints import choose_checkpoint, complete_checkpoints
from orchestrator.commands.export import command
from orchestrator.config import recompose
from orchestrator.errors import ModelFolderError
from orchestrator.plan import make_plan, read_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.values import to_plain
from orchestrator.verify import LOGIT_TOLERANCE, verify_export
from tests.conftest import Trainer, losses, relative_difference
from tests.random_base import write_random_base

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
EVERYTHING: Mapping[str, object] = {
    "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 32003, "head_dim": 24,
    "rope_parameters": LLAMA3,
}  # fmt: skip
"""One KV head for all ranks, rows to pad at every layout, heads that hidden does not give."""
SHAPES: dict[str, Mapping[str, object]] = {
    "grouped": {},
    "everything": EVERYTHING,
    "Mistral": {
        "model_type": "mistral",
        "vocab_size": 32001,
        "hidden_size": 60,
        "num_attention_heads": 8,
        "head_dim": 8,
    },
}  # fmt: skip
TP4 = ("layout.tensor_parallel=4", "layout.pipeline_parallel=1", "layout.sequence_parallel=true")
TP2_PP2 = ("layout.tensor_parallel=2", "layout.pipeline_parallel=2", "cluster.ranks_per_node=4")


def make_base(folder: Path, tokenizer: Path, **different: object) -> Path:
    """Let transformers write a random model, its norms not all ones, with a vocabulary file beside it."""
    write_random_base(folder, **{"vocab_size": 32000, **different})
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def shape_overrides(base: Path) -> list[str]:
    """Return the settings of a base's shape."""
    return [f"model.{name}={json.dumps(value)}" for name, value in to_plain(ModelFolder.open(base).shape).items()]


def load_without_a_step(trainer: Trainer, base: Path, *overrides: str) -> RunDirectory:
    """Start ranks from a folder and let them leave before the first step; step 0 is saved."""
    run, plan = trainer.make_run(*shape_overrides(base), f"base={base}", *overrides, steps=1)
    trainer.train(run, plan)
    return run


def exported(run: RunDirectory, output: Path, step: int) -> Path:
    export(choose_checkpoint(run, step), read_plan(run.plan), output, run_name=run.name)
    return output


@pytest.mark.parametrize("name", SHAPES)
def test_hugging_face_to_megatron_and_back_keeps_every_bit(
    trainer: Trainer, tmp_path: Path, tokenizer: Path, name: str
) -> None:
    base = make_base(tmp_path / "base", tokenizer, **SHAPES[name])
    run = load_without_a_step(trainer, base, *TP2_PP2)
    back = exported(run, tmp_path / "back", step=0)

    before, after = ModelFolder.open(base), ModelFolder.open(back)
    assert after.shape == before.shape
    names = list(expected_tensors(before.shape))
    assert [name for name in names if not torch.equal(before.tensor(name), after.tensor(name))] == []
    model, unused = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(unused.values())
    theirs = transformers.AutoConfig.from_pretrained(base)
    for key in ("model_type", "architectures", "rope_parameters", "head_dim", "sliding_window", "tie_word_embeddings"):
        assert getattr(model.config, key, None) == getattr(theirs, key, None), key


def test_an_upscaled_base_trains_at_tp2_pp2_and_tp4_and_its_export_has_the_logits_of_the_trained_model(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    base = upscaled_base(tmp_path, tokenizer)
    shape = (*shape_overrides(base), f"base={base}")
    alone, plan = trainer.make_run(*shape, steps=4)
    expected = losses(trainer.train(alone, plan))

    run, plan = trainer.make_run(*shape, *TP2_PP2, "checkpoint.interval_steps=2", steps=4)
    first = losses(trainer.train(run, plan))
    shutil.rmtree(choose_checkpoint(run, 4).path)
    then = losses(trainer.train(run, make_plan(recompose(plan.settings, TP4))))  # goes on at step 2, resharded
    assert relative_difference(first, expected) < 1e-6
    assert len(then) == 2 and relative_difference(then, expected[2:]) < 1e-6

    found = verify_export(run, choose_checkpoint(run, 4), exported(run, tmp_path / "trained", step=4))
    print(f"trained: largest logit difference {found.largest_logit_difference:.1e}")
    assert found.largest_logit_difference < LOGIT_TOLERANCE
    with pytest.raises(ModelFolderError, match="do not use it"):  # the comparison can tell them apart
        verify_export(run, choose_checkpoint(run, 4), base)


def test_the_export_of_a_run_in_bf16_has_the_logits_of_the_trained_model(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    base = upscaled_base(tmp_path, tokenizer)
    run, plan = trainer.make_run(*shape_overrides(base), f"base={base}", "precision=bf16", steps=2)
    trainer.train(run, plan)
    folder = exported(run, tmp_path / "trained", step=2)
    assert ModelFolder.open(folder).dtype == torch.bfloat16
    found = verify_export(run, choose_checkpoint(run, 2), folder)  # whose master weights are fp32
    assert found.largest_logit_difference < LOGIT_TOLERANCE


def upscaled_base(folder: Path, tokenizer: Path) -> Path:
    """Return a base of six layers with everything that is not plain."""
    upscale(make_base(folder / "base", tokenizer, **EVERYTHING), folder / "upscaled", drop=1)
    return folder / "upscaled"


def test_an_export_has_what_its_base_has_beside_the_weights(trainer: Trainer, tmp_path: Path, tokenizer: Path) -> None:
    base = upscaled_base(tmp_path, tokenizer)
    beside = {"LICENSE": b"Apache License\n", "chat_template.jinja": b"{{ messages }}", "tokenizer.json": b"{}"}
    beside["generation_config.json"] = b'{"eos_token_id": [2, 7], "temperature": 0.6}'
    for name, content in beside.items():
        (base / name).write_bytes(content)
    run = load_without_a_step(trainer, base)
    folder = exported(run, tmp_path / "model", step=0)
    assert {name: (folder / name).read_bytes() for name in beside} == beside
    lineage = json.loads((folder / "lineage.json").read_text())
    assert (lineage["run"], lineage["step"], lineage["consumed_tokens"]) == (run.name, 0, 0)
    assert lineage["base_lineage"]["layer_sources"] == [0, 1, 2, 1, 2, 3]
    assert lineage["base_lineage"] == json.loads((base / "lineage.json").read_text())


def test_an_export_whose_base_is_gone_says_what_it_lacks(
    trainer: Trainer, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", tokenizer)
    run = load_without_a_step(trainer, base)
    shutil.rmtree(base)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/defaults.yaml").write_text(f"paths: {{runs: {run.path.parent}}}")
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(command, [f"{run.name}@0", "--output", "model"])
    assert told.exit_code == 0, told.output
    assert f"the base {base} is gone" in told.stderr
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("a").input_ids[0] == 1  # the data's


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


def test_a_base_with_values_that_are_no_numbers_is_refused_before_a_step(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    base = make_base(tmp_path / "base", tokenizer)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = math.nan
    save_file(tensors, base / "model.safetensors")
    run, plan = trainer.make_run(*shape_overrides(base), f"base={base}", steps=1)
    attempt, ranks = trainer.start(run, plan)
    assert trainer.wait(run, attempt, ranks) == [exit_codes.BAD_CONFIG]
    log = attempt.rank_log(0).read_text()
    assert "model.layers.3.mlp.up_proj.weight has 1 of" in log and "NaN or infinite" in log
    assert complete_checkpoints(run) == []
