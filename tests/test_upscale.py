"""Depth up-scaling against transformers, the paper's layer numbers and the published parameter count."""

import copy
import hashlib
import json
import math
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from megatron_solar.depth import default_drop, depth_map, draw, drop_for_layers, solar_depth_map
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.upscale import upscale
from orchestrator.commands.main import main
from orchestrator.errors import ConfigError, ModelFolderError
from orchestrator.model_shape import TransformerShape
from orchestrator.values import from_plain


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=5,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # of ones otherwise, so that a norm of another layer would not be seen
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def base(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text(f"content of {name}")
    return tmp_path / "base"


def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    """Run `orchestrate upscale` in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["orchestrate", "upscale", *map(str, words)])
    try:
        main()
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# The map


def test_solar_stacks_base_layers_0_to_23_and_8_to_31() -> None:
    assert list(solar_depth_map(32, 8).sources) == [*range(24), *range(8, 32)]
    assert default_drop(32) == 8
    assert drop_for_layers("solar", 32, 48) == 8


@pytest.mark.parametrize("base_layers", range(1, 12))
def test_each_possible_drop_gives_a_deeper_model_that_has_every_base_layer(base_layers: int) -> None:
    for drop in range(math.ceil(base_layers / 2)):
        sources = solar_depth_map(base_layers, drop).sources
        assert len(sources) == 2 * (base_layers - drop) > base_layers
        assert set(sources) == set(range(base_layers))
    for drop in (-1, math.ceil(base_layers / 2), base_layers):
        with pytest.raises(ConfigError, match="gives no deeper model"):
            solar_depth_map(base_layers, drop)


def test_a_depth_that_the_rule_cannot_give_is_refused_with_those_that_it_can() -> None:
    with pytest.raises(ConfigError, match=r"nearest are 44, 46, 48, 50 \(it gives 34 to 64\)"):
        drop_for_layers("solar", 32, 47)
    with pytest.raises(ConfigError, match="did you mean solar"):
        depth_map("soler", 32, 8)


def test_the_drawing_shows_both_copies_and_the_seam() -> None:
    assert draw(solar_depth_map(8, 2)).splitlines() == [
        "result   base   0      7",
        "   0-5    0-5   ██████··",
        "  6-11    2-7   ··██████",
        "seam: base layer 2 follows base layer 5 at result layer 6",
    ]


def test_the_shape_of_solar_has_exactly_the_published_parameters() -> None:
    text = files("orchestrator.conf").joinpath("model/solar-10.7b.yaml").read_text()
    shape = from_plain(TransformerShape, yaml.safe_load(text), "model", [])
    assert shape is not None
    assert shape.parameters() == 10_731_524_096
    assert sum(math.prod(size) for size in expected_tensors(shape).values()) == 10_731_524_096


# The result


def test_every_tensor_of_the_result_is_that_of_its_source_layer(
    tmp_path: Path, base: Path, model: LlamaForCausalLM
) -> None:
    upscale(base, tmp_path / "out", drop=2)
    result = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert result.config.num_hidden_layers == 12
    theirs = model.state_dict()
    sources = [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    for name, tensor in result.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(sources[int(parts[2])])
        assert torch.equal(tensor, theirs[".".join(parts)]), name


def test_logits_are_those_of_a_transformers_model_stacked_by_hand(
    tmp_path: Path, base: Path, model: LlamaForCausalLM
) -> None:
    upscale(base, tmp_path / "out", drop=2)
    stacked = copy.deepcopy(model)
    stacked.model.layers = torch.nn.ModuleList(
        copy.deepcopy(model.model.layers[source]) for source in (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)
    )
    stacked.config.num_hidden_layers = 12
    for number, layer in enumerate(stacked.model.layers):
        layer.self_attn.layer_idx = number
    result = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        wanted = stacked(tokens, use_cache=False).logits
        found = result(tokens, use_cache=False).logits
        shallow = model(tokens, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, shallow, atol=1e-2)


def test_bf16_weights_stay_bf16(tmp_path: Path, model: LlamaForCausalLM) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert upscale(tmp_path / "base", tmp_path / "out", drop=2).dtype == "bfloat16"
    assert ModelFolder.open(tmp_path / "out").dtype == torch.bfloat16


def test_tokenizer_special_tokens_generation_settings_and_licence_come_along(tmp_path: Path, base: Path) -> None:
    (base / "LICENSE").write_text("Apache License\nVersion 2.0")
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    lineage = upscale(base, tmp_path / "out", drop=2)
    for name in ("tokenizer.model", "tokenizer_config.json", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 5
    assert lineage.licence == "apache-2.0"
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "`base`" in card


def test_the_licence_of_a_model_card_is_found_and_without_one_it_is_unknown(tmp_path: Path, base: Path) -> None:
    assert upscale(base, tmp_path / "one", drop=2).licence == "unknown"
    (base / "README.md").write_text("---\ntags:\n- x\nlicense: cc-by-nc-4.0\n---\n# Base\n")
    assert upscale(base, tmp_path / "two", drop=2).licence == "cc-by-nc-4.0"


def test_the_lineage_has_sources_counts_and_checksums_that_hold(tmp_path: Path, base: Path) -> None:
    upscale(base, tmp_path / "out", drop=2)
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["layer_sources"] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert (lineage["strategy"], lineage["paper"], lineage["drop"]) == ("solar", "arXiv 2312.15166", 2)
    for side, path in (("base", base), ("result", tmp_path / "out")):
        tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert lineage[side]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        sums = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
        assert lineage[side]["tensors"] == sums
        for name, digest in lineage[side]["files"].items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    assert "model.safetensors" in lineage["result"]["files"]


def test_progress_ends_at_the_size_of_the_result(tmp_path: Path, base: Path) -> None:
    seen: list[tuple[int, int]] = []
    upscale(base, tmp_path / "out", drop=2, progress=lambda done, total: seen.append((done, total)))
    shape = ModelFolder.open(tmp_path / "out").shape
    assert seen == sorted(seen)
    assert seen[-1] == (4 * shape.parameters(), 4 * shape.parameters())


# What cannot be


def test_nan_weights_are_refused_and_leave_nothing(tmp_path: Path, base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"has 1 of \d+ values NaN or infinite"):
        upscale(base, tmp_path / "out", drop=2)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_killed_upscale_leaves_nothing_that_looks_complete(tmp_path: Path, base: Path) -> None:
    program = """
import sys
from pathlib import Path
from megatron_solar.upscale import upscale

def stop_half_way(done, total):
    if 2 * done > total:
        print("half-way", flush=True)
        sys.stdin.read()

upscale(Path(sys.argv[1]), Path(sys.argv[2]), drop=2, progress=stop_half_way)
"""
    words = [sys.executable, "-c", program, str(base), str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half-way\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path != base]
    assert left, "the test should have killed it in the middle"
    for path in left:
        assert path.name.startswith(".")
        with pytest.raises(ModelFolderError):
            ModelFolder.open(path)
    upscale(base, tmp_path / "out", drop=2)
    assert ModelFolder.open(tmp_path / "out").shape.num_layers == 12


# The command line


def test_the_command_deepens_by_a_quarter_and_names_the_next_command(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run_command(capsys, monkeypatch, base, "--output", tmp_path / "out")
    assert code == 0, err
    assert "result    12 layers" in out
    assert out.splitlines()[-1] == f"next: orchestrate plan RECIPE model.num_layers=12 base={tmp_path / 'out'}"
    assert ModelFolder.open(tmp_path / "out").shape.num_layers == 12


def test_a_wanted_depth_decides_the_drop(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_command(capsys, monkeypatch, base, "--output", tmp_path / "out", "--layers", 10, "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["drop"], len(summary["layer_sources"])) == (3, 10)
    assert summary["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_explain_draws_and_writes_nothing(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_command(capsys, monkeypatch, base, "--output", tmp_path / "out", "--explain")
    assert code == 0
    assert draw(solar_depth_map(8, 2)) in out
    assert list(tmp_path.iterdir()) == [base]


@pytest.mark.parametrize(
    ("words", "wanted_code", "named"),
    [
        ([], 2, "--output DIR is missing"),
        (["--output", "OUT", "--drop", "2", "--layers", "12"], 2, "give one"),
        (["--output", "OUT", "--drop", "4"], 2, "use 0 to 3"),
        (["--output", "OUT", "--layers", "13"], 2, "nearest are 10, 12, 14, 16"),
        (["--output", "OUT", "--strategy", "soler"], 2, "did you mean solar?"),
        (["--output", "BASE"], 1, "exists already"),
        (["--output", "BASE/config.json/out"], 1, "failed"),
    ],
)
def test_a_request_that_cannot_be_gets_one_error_and_leaves_nothing(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    wanted_code: int,
    named: str,
) -> None:
    given = [word.replace("OUT", str(tmp_path / "out")).replace("BASE", str(base)) for word in words]
    code, _, err = run_command(capsys, monkeypatch, base, *given)
    assert (code, named in err) == (wanted_code, True), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [base]


def test_a_base_that_cannot_be_read_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    for path, named in ((tmp_path / "gpt2", "GPT2LMHeadModel"), (tmp_path / "none", "found nothing")):
        code, _, err = run_command(capsys, monkeypatch, path, "--output", tmp_path / "out")
        assert (code, named in err) == (1, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
