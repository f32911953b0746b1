"""Hugging Face folders: those of transformers are read, ours are read by transformers, bad ones refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.model_writer import write_model_folder
from orchestrator.errors import ModelFolderError, OrchestrateError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in one file, as transformers writes it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        ModelFolder.open(folder)
    return str(caught.value)


def all_tensors(folder: ModelFolder) -> dict[str, torch.Tensor]:
    return {name: folder.tensor(name) for name in expected_tensors(folder.shape)}


# Reading


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_transformers_is_read_tensor_by_tensor(tmp_path: Path, shard_size: str, tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    read = ModelFolder.open(tmp_path)
    assert read.dtype == torch.bfloat16
    assert (read.shape.rope_theta, read.shape.num_query_groups, read.shape.tie_embeddings) == (
        50000.0,
        2,
        tied,
    )
    assert read.shape.parameters() == sum(parameter.numel() for parameter in model.parameters())
    theirs = model.state_dict()
    for name, tensor in all_tensors(read).items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_mistral_folder_and_an_older_config_with_rope_theta_on_top_are_read(tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6, "rope_scaling": None}))
    assert ModelFolder.open(tmp_path).shape.rope_theta == 1e6


def test_rows_and_columns_are_parts_of_the_tensor(folder: Path) -> None:
    read = ModelFolder.open(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read.rows(name, 8, 16), read.tensor(name)[8:16])
    assert torch.equal(read.columns(name, 24, 48), read.tensor(name)[:, 24:48])


def test_all_tokenizer_files_are_found(folder: Path) -> None:
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"chat_template.jinja", "additional_chat_templates/tool.jinja"}
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / name).write_text(name)
    found = ModelFolder.open(folder).tokenizer_files()
    assert {str(file.relative_to(folder)) for file in found} == names


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling of type 'llama3'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window=32"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_size": "many"}, "hidden_size should be a number, found 'many'"),
        ({"vocab_size": 96.5}, "vocab_size should be a whole number, found 96.5"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(folder: Path, changes: dict[str, object], named: str) -> None:
    edit_config(folder, **changes)
    assert named in refusal(folder)


def test_several_settings_that_are_not_covered_are_named_at_once(folder: Path) -> None:
    edit_config(folder, attention_bias=True, hidden_act="gelu", vocab_size=None)
    assert all(name in refusal(folder) for name in ("attention_bias", "hidden_act", "vocab_size"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    assert "GPT2LMHeadModel" in refusal(tmp_path)


def test_a_folder_that_is_none_or_has_no_config_or_no_weights_is_refused(tmp_path: Path, folder: Path) -> None:
    assert "hf download" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no weights" in refusal(folder)
    assert "pytorch_model.bin is not read" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "should hold JSON" in refusal(folder)


def test_missing_extra_and_misshapen_tensors_are_all_reported(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["lm_head.weight"] = torch.zeros(95, 32)
    save_file(tensors, folder / "model.safetensors")
    found = refusal(folder)
    assert "model.norm.weight is missing" in found
    assert "model.layers.0.self_attn.q_proj.bias is not a tensor" in found
    assert "lm_head.weight has shape (95, 32), config.json gives (96, 32)" in found


def test_weights_of_several_types_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    assert "1 of BF16 (model.norm.weight)" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 4, 300, -1])
def test_a_truncated_file_is_refused(folder: Path, kept_bytes: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept_bytes])
    assert "model.safetensors is truncated" in refusal(folder)


# Writing


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_folder_round_trips_here_and_in_transformers(
    tmp_path: Path, folder: Path, shard_bytes: int, dtype: torch.dtype
) -> None:
    base = ModelFolder.open(folder)
    ours = {name: tensor.to(dtype) for name, tensor in all_tensors(base).items()}
    shuffled = sorted(ours.items(), key=lambda item: item[0][::-1])
    sums = write_model_folder(tmp_path / "out", base.shape, shuffled, dtype=dtype, shard_bytes=shard_bytes)
    assert (tmp_path / "out/model.safetensors").exists() == (shard_bytes == 10**9)
    assert set(sums.files) == {file.name for file in (tmp_path / "out").iterdir()}

    read = ModelFolder.open(tmp_path / "out")
    assert (read.shape, read.dtype) == (base.shape, dtype)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == dtype
    for name, tensor in all_tensors(read).items():
        assert torch.equal(tensor, ours[name]), name
        assert torch.equal(model.state_dict()[name], ours[name]), name


def test_the_written_config_gives_the_rotary_base_and_the_special_tokens(tmp_path: Path, folder: Path) -> None:
    base = ModelFolder.open(folder)
    write_model_folder(
        tmp_path / "out",
        base.shape,
        all_tensors(base).items(),
        dtype=base.dtype,
        config_extra={"eos_token_id": 7, "pad_token_id": 3},
    )
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_theta"] == 50000.0
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 7, 3)
    plain = json.loads((tmp_path / "out/config.json").read_text())
    # The names that transformers 4 reads.
    assert (plain["rope_theta"], plain["torch_dtype"], plain["head_dim"]) == (50000.0, "float32", 8)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == 7


def test_a_tied_model_is_written_without_its_output_layer(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    base = ModelFolder.open(tmp_path / "model")
    write_model_folder(tmp_path / "out", base.shape, all_tensors(base).items(), dtype=base.dtype)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, base.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.norm.weight": None}, "the first model.norm.weight"),
        ({"model.rotary.weight": torch.zeros(1)}, "model.rotary.weight was given, which is no tensor"),
        ({"lm_head.weight": torch.zeros(32, 96)}, "should have shape (96, 32), found (32, 96)"),
        ({"lm_head.weight": torch.full((96, 32), torch.nan)}, "lm_head.weight has 3072 of 3072 values NaN"),
        (
            {"model.norm.weight": torch.full((32,), 1e39, dtype=torch.float64)},
            "model.norm.weight has 32 of 32 values",
        ),
    ],
)
def test_wrong_tensors_are_refused_and_leave_nothing(
    tmp_path: Path, folder: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    base = ModelFolder.open(folder)
    given = [(name, tensor) for name, tensor in (all_tensors(base) | changes).items() if tensor is not None]
    with pytest.raises(ModelFolderError) as caught:
        write_model_folder(tmp_path / "out", base.shape, given, dtype=base.dtype)
    assert named in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_given_twice_is_refused(tmp_path: Path, folder: Path) -> None:
    base = ModelFolder.open(folder)
    given = [*all_tensors(base).items(), ("model.norm.weight", base.tensor("model.norm.weight"))]
    with pytest.raises(ModelFolderError, match="given twice"):
        write_model_folder(tmp_path / "out", base.shape, given, dtype=base.dtype)


def test_an_output_that_exists_is_left_as_it_is(tmp_path: Path, folder: Path) -> None:
    base = ModelFolder.open(folder)
    before = sorted((file.name, file.read_bytes()) for file in folder.iterdir())
    with pytest.raises(OrchestrateError, match="exists already"):
        write_model_folder(folder, base.shape, all_tensors(base).items(), dtype=base.dtype)
    assert sorted((file.name, file.read_bytes()) for file in folder.iterdir()) == before
