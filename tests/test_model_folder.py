"""Hugging Face folders: those of transformers are read, ours are read by transformers, bad ones refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from megatron_solar.model_config import config_of, kept_config
from megatron_solar.model_folder import ModelFolder, expected_tensors, open_base
from megatron_solar.model_writer import write_model_folder
from megatron_solar.rope import inverse_frequencies
from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.model_shape import RopeScaling, TransformerShape

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

SHAPE = TransformerShape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=96,
    max_position_embeddings=64,
)


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


LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_parameters": None, "rope_scaling": None}, None),
        ({"rope_parameters": LINEAR}, RopeScaling(rope_type="linear", factor=2.5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, RopeScaling(rope_type="linear", factor=2.5)),
        ({"rope_scaling": LLAMA3}, RopeScaling(**LLAMA3)),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, RopeScaling(**LLAMA3)),
    ],
)
def test_rope_scaling_is_read_where_transformers_4_and_5_keep_it(
    folder: Path, rope: dict[str, object], scaling: RopeScaling | None
) -> None:
    edit_config(folder, **({"rope_parameters": None, "rope_theta": 3e4} | rope))
    shape = ModelFolder.open(folder).shape
    assert (shape.rope_theta, shape.rope_scaling) == (3e4, scaling)


@pytest.mark.parametrize("scaling", [RopeScaling(rope_type="linear", factor=2.5), RopeScaling(**LLAMA3)])
def test_the_frequencies_are_those_of_transformers_to_the_last_bit(folder: Path, scaling: RopeScaling) -> None:
    base = ModelFolder.open(folder)
    shape = dataclasses.replace(base.shape, rope_scaling=scaling, head_dim=48, rope_theta=5e5)
    config = config_of(shape, torch.float32, {})
    model = LlamaForCausalLM(AutoConfig.for_model(**config)).model
    assert torch.equal(inverse_frequencies(shape), model.rotary_emb.inv_freq)


def test_heads_of_their_own_size_are_told_from_those_that_follow(folder: Path) -> None:
    assert ModelFolder.open(folder).shape.head_dim is None  # config.json says 8, which is 32 / 4
    LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)).save_pretrained(folder)
    shape = ModelFolder.open(folder).shape
    assert (shape.head_dim, shape.query_size, shape.key_size) == (16, 64, 32)


def test_a_head_size_that_follows_from_the_others_may_be_named_in_the_settings(folder: Path) -> None:
    shape = ModelFolder.open(folder).shape
    assert open_base(folder, dataclasses.replace(shape, head_dim=8)).shape == shape
    with pytest.raises(ModelFolderError, match=r"model\.head_dim: the base has 8, the settings say 16"):
        open_base(folder, dataclasses.replace(shape, head_dim=16))


def test_rope_scaling_that_the_settings_lack_is_told_as_they_should_have_it(folder: Path) -> None:
    plain = ModelFolder.open(folder).shape
    edit_config(folder, rope_parameters=LLAMA3 | {"rope_theta": 50000.0})
    with pytest.raises(ModelFolderError) as caught:
        open_base(folder, plain)
    told = re.search(r"model.rope_scaling: the base has (.+), the settings say null", str(caught.value))
    assert told and json.loads(told[1]) == LLAMA3


def test_a_mistral_folder_and_an_older_config_with_rope_theta_on_top_are_read(tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6, "rope_scaling": None}))
    assert ModelFolder.open(tmp_path).shape.rope_theta == 1e6


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
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling of type 'yarn'"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "rope_parameters differs from layer to layer"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling should be a mapping or null, found 'linear'"),
        ({"rope_theta": 1e4}, "rope_theta=10000.0 and rope_parameters.rope_theta=50000.0 disagree"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor should be a number, found None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "model.rope_scaling.factor should be above 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4 should be below high_freq_factor=4"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 15}, "model.head_dim=15 should be even"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window=32"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_query_groups=3"),
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
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)
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


def test_matrices_of_several_types_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    assert "matrices should be of one type, found 1 of BF16 (lm_head.weight)" in refusal(folder)


def test_norms_wider_than_the_matrices_lose_nothing(tmp_path: Path) -> None:
    """The folder counts as of the narrowest type that holds every weight, which is what a copy is written in."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.norm.weight"] = torch.full((32,), 1.0001)
    save_file(tensors, tmp_path / "model/model.safetensors")
    base = ModelFolder.open(tmp_path / "model")
    assert base.dtype == torch.float32
    write_model_folder(tmp_path / "out", base.shape, all_tensors(base).items(), dtype=base.dtype)
    for name, tensor in all_tensors(ModelFolder.open(tmp_path / "out")).items():
        assert torch.equal(tensor, base.tensor(name).float()), name


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64"])
def test_weights_of_a_type_that_is_not_covered_are_refused(folder: Path, dtype: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    assert "are not covered; save them as bf16" in refusal(folder)


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


# PyTorch's files


def as_pickles(folder: Path, shards: int) -> list[Path]:
    """Turn a folder's safetensors into what torch.save writes: one file, or shards with their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return [folder / "pytorch_model.bin"]
    files = [folder / f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    names = {file: list(tensors)[number::shards] for number, file in enumerate(files)}
    for file, part in names.items():
        torch.save({name: tensors[name] for name in part}, file)
    weight_map = {name: file.name for file, part in names.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_pytorchs_files_is_read_as_one_of_safetensors(folder: Path, shards: int) -> None:
    before = {name: tensor.clone() for name, tensor in all_tensors(ModelFolder.open(folder)).items()}
    as_pickles(folder, shards)
    read = ModelFolder.open(folder)
    assert read.dtype == torch.float32
    for name, tensor in all_tensors(read).items():
        assert torch.equal(tensor, before[name]), name


def test_reading_pytorchs_files_takes_the_memory_of_no_more_than_a_tensor(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 20_000, "hidden_size": 512}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    as_pickles(tmp_path, 1)
    read = """
import sys, pathlib
from megatron_solar.model_folder import ModelFolder, expected_tensors
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = anonymous()
folder = ModelFolder.open(pathlib.Path(sys.argv[1]))
total = sum(float(folder.tensor(name).sum()) for name in expected_tensors(folder.shape))
print(anonymous() - before)
"""
    made = subprocess.run([sys.executable, "-c", read, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(made.stdout) * 1024 < 20_000_000 < (tmp_path / "pytorch_model.bin").stat().st_size / 4


def test_safetensors_count_where_a_folder_has_both(folder: Path) -> None:
    torch.save({"nothing": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert ModelFolder.open(folder).shape.num_layers == 3


@pytest.mark.parametrize("kept_share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_of_pytorch_is_refused(folder: Path, kept_share: float) -> None:
    (file,) = as_pickles(folder, 1)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept_share)])
    assert "pytorch_model.bin is truncated or no file of torch.save" in refusal(folder)


def test_a_file_of_pytorch_that_cannot_be_mapped_is_refused(folder: Path) -> None:
    (file,) = as_pickles(folder, 1)
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert "no file of torch.save since torch 1.6" in refusal(folder)


def test_what_a_file_of_pytorch_would_execute_is_refused(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (file,) = as_pickles(folder, 1)
    torch.save({"model.norm.weight": Attack()}, file)
    assert "holds more than tensors, which is never executed" in refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {"model": {"norm": torch.zeros(1)}}])
def test_a_file_of_pytorch_with_something_else_than_named_tensors_is_refused(folder: Path, content: object) -> None:
    (file,) = as_pickles(folder, 1)
    torch.save(content, file)
    assert "pytorch_model.bin should hold tensors by their names" in refusal(folder)


def test_a_missing_shard_and_a_misshapen_tensor_of_pytorchs_files_are_named(folder: Path) -> None:
    files = as_pickles(folder, 2)
    tensors = torch.load(files[0])
    name = next(name for name in tensors if "embed_tokens" in name or "q_proj" in name)
    torch.save(tensors | {name: torch.zeros(3, 3)}, files[0])
    assert f"{name} has shape (3, 3), config.json gives" in refusal(folder)
    files[1].unlink()
    assert f"shard {files[1].name} is missing; pytorch_model.bin.index.json lists it" in refusal(folder)


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


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3])
def test_rope_scaling_is_written_so_that_transformers_reads_it(
    tmp_path: Path, folder: Path, rope: dict[str, object]
) -> None:
    edit_config(folder, rope_parameters=rope | {"rope_theta": 3e4})
    base = ModelFolder.open(folder)
    write_model_folder(tmp_path / "out", base.shape, all_tensors(base).items(), dtype=base.dtype)
    assert ModelFolder.open(tmp_path / "out").shape == base.shape
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == rope | {"rope_theta": 3e4}
    plain = json.loads((tmp_path / "out/config.json").read_text())
    assert (plain["rope_scaling"], plain["rope_theta"]) == (rope, 3e4)  # the names that transformers 4 reads


def test_a_model_made_from_mistrals_keeps_its_name_and_has_no_window(tmp_path: Path) -> None:
    config = MistralConfig(**SIZES, sliding_window=None, pad_token_id=5, head_dim=12)
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    base = ModelFolder.open(tmp_path / "model")
    write_model_folder(
        tmp_path / "out",
        base.shape,
        all_tensors(base).items(),
        dtype=base.dtype,
        config_extra=kept_config(base.config),
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(model, MistralForCausalLM)
    assert not any(info.values())
    assert (model.config.sliding_window, model.config.pad_token_id, model.config.head_dim) == (None, 5, 12)


def test_heads_that_hidden_does_not_give_are_written_under_a_name_that_transformers_loads(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, hidden_size=36, num_attention_heads=8, head_dim=6)
    tensors = {name: torch.ones(size) for name, size in expected_tensors(shape).items()}
    write_model_folder(tmp_path / "out", shape, tensors.items(), dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.sliding_window is None
    assert ModelFolder.open(tmp_path / "out").shape == shape


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
