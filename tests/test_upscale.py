"""Depth up-scaling against transformers, the paper's layer numbers and the published parameter count."""

import copy
import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from megatron_solar.depth import STRATEGIES, DepthMap, depth_map, draw, explicit_map, solar_depth_map
from megatron_solar.model_folder import ModelFolder, expected_tensors
from megatron_solar.upscale import plan_upscale, upscale, write_upscaled
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
    assert depth_map("solar", 32) == depth_map("solar", 32, 48) == solar_depth_map(32, 8)


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
    for strategy, wanted, named in (
        ("solar", 47, r"nearest are 44, 46, 48, 50 \(it gives 34 to 64\)"),
        ("yi-middle", 65, r"nearest are 61, 62, 63, 64 \(it gives 33 to 64\)"),
        ("llama-pro", 44, r"nearest are 34, 36, 40, 48 \(it gives 33 to 64\)"),
        ("stack", 48, r"nearest are 64, 96, 128, 160 \(it gives 64 to 256\)"),
    ):
        with pytest.raises(ConfigError, match=named):
            depth_map(strategy, 32, wanted)
    with pytest.raises(ConfigError, match="did you mean solar"):
        depth_map("soler", 32, 48)
    with pytest.raises(ConfigError, match="give one with --text FILE"):
        depth_map("yi-middle", 32)


def test_yi_repeats_the_sixteen_layers_of_the_highest_cosine_as_yi_9b_has_them() -> None:
    """arXiv 2403.04652: of 32 layers those from 12 to 28 come twice."""
    cosines = [0.9] * 12 + [0.99] * 16 + [0.95] * 4
    assert depth_map("yi-middle", 32, cosines=cosines).sources == (*range(28), *range(12, 32))


def test_llama_pro_puts_an_identity_layer_after_each_of_eight_groups_of_four() -> None:
    """arXiv 2401.02415: 32 layers become 40."""
    made = depth_map("llama-pro", 32)
    assert len(made.sources) == 40
    assert made.sources[:11] == (0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8)
    assert made.zeroed == frozenset(range(4, 40, 5))
    assert [source for layer, source in enumerate(made.sources) if layer not in made.zeroed] == list(range(32))
    assert made.seams() == []


def test_stacking_gives_the_whole_net_again() -> None:
    assert depth_map("stack", 32).sources == (*range(32), *range(32))
    assert depth_map("stack", 4, 12).sources == (0, 1, 2, 3) * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("base_layers", range(1, 14))
def test_each_depth_that_a_rule_offers_it_gives_with_every_base_layer_in_it(strategy: str, base_layers: int) -> None:
    rule = STRATEGIES[strategy]
    assert rule.usual(base_layers) in rule.depths(base_layers)
    for depth in rule.depths(base_layers):
        made = depth_map(strategy, base_layers, depth, cosines=[0.5] * base_layers)
        assert len(made.sources) == depth > base_layers
        assert set(made.sources) == set(range(base_layers))


def test_an_explicit_map_reads_ranges_with_both_ends() -> None:
    assert explicit_map("0-23, 8-31", 32).sources == solar_depth_map(32, 8).sources
    assert explicit_map("2,0-1,1", 3).sources == (2, 0, 1, 1)
    for text in ("", "0-", "-1", "0-3-5", "a", "0..3", "1,,2"):
        with pytest.raises(ConfigError, match="should list base layers, such as 0-23,8-31"):
            explicit_map(text, 8)
    for text in ("3-2", "0-8", "8"):
        with pytest.raises(ConfigError, match="the base has 0-7"):
            explicit_map(text, 8)


def test_the_drawing_shows_both_copies_and_the_seam() -> None:
    assert draw(solar_depth_map(8, 2)).splitlines() == [
        "result   base   0      7",
        "   0-5    0-5   ██████··",
        "  6-11    2-7   ··██████",
        "seam: base layer 2 follows base layer 5 at result layer 6",
    ]


def test_the_drawing_tells_layers_that_add_nothing_from_copies() -> None:
    assert draw(depth_map("llama-pro", 4, 6)).splitlines() == [
        "result   base   0  3",
        "   0-1    0-1   ██··",
        "     2      1   ·░··",
        "   3-4    2-3   ··██",
        "     5      3   ···░",
        "░ adds nothing at first: its o_proj and down_proj are zero",
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


def write_map(base: Path, layers: DepthMap, output: Path, dtype: torch.dtype | None = None) -> None:
    folder = ModelFolder.open(base)
    write_upscaled(folder, plan_upscale(folder, layers, dtype=dtype), output)


def test_identity_layers_change_no_logit_and_only_their_two_matrices_are_zero(
    tmp_path: Path, base: Path, model: LlamaForCausalLM
) -> None:
    write_map(base, depth_map("llama-pro", 8), tmp_path / "out")
    result = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert result.config.num_hidden_layers == 10
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(result(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    zero = [name for name, tensor in result.state_dict().items() if not tensor.any()]
    assert zero == [
        f"model.layers.{layer}.{name}.weight" for layer in (4, 9) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert (lineage["strategy"], lineage["paper"], lineage["drop"]) == ("llama-pro", "arXiv 2401.02415", None)
    assert lineage["zeroed_layers"] == [4, 9]
    check_sums(lineage, base, tmp_path / "out")


def test_another_precision_is_rounded_to_the_nearest_and_told_in_the_lineage(tmp_path: Path, base: Path) -> None:
    write_map(base, explicit_map("0-7,7", 8), tmp_path / "out", torch.bfloat16)
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert (lineage["base_dtype"], lineage["dtype"], lineage["strategy"]) == ("float32", "bfloat16", "map")
    check_sums(lineage, base, tmp_path / "out")
    name = "model.layers.8.mlp.up_proj.weight"
    bits = ModelFolder.open(base).tensor("model.layers.7.mlp.up_proj.weight").view(torch.int32).long()
    # By hand: half of the last place is added, less one bit where the last place is even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    assert torch.equal(ModelFolder.open(tmp_path / "out").tensor(name).view(torch.int16).long(), rounded)


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
    check_sums(lineage, base, tmp_path / "out")
    assert "model.safetensors" in lineage["result"]["files"]


def check_sums(lineage: dict[str, Any], base: Path, result: Path) -> None:
    for side, path in (("base", base), ("result", result)):
        tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert lineage[side]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        sums = {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }
        assert lineage[side]["tensors"] == sums
        for name, digest in lineage[side]["files"].items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


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


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    base: Path,
    mount_disk: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = mount_disk(1)
    (disk / "other").write_bytes(bytes(800_000))
    code, _, err = run_command(capsys, monkeypatch, base, "--output", disk / "out")
    assert (code, "the deeper model in" in err, "free space" in err) == (1, True, True), err
    assert [path.name for path in disk.iterdir()] == ["other"]


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
        (["--output", "OUT", "--map", "0-7", "--layers", "12"], 2, "give one"),
        (["--output", "OUT", "--map", "0-7", "--strategy", "stack"], 2, "leave --strategy away"),
        (["--output", "OUT", "--map", "0-9"], 2, "the base has 0-7"),
        (["--output", "OUT", "--strategy", "stack", "--drop", "2"], 2, "give stack --layers"),
        (["--output", "OUT", "--strategy", "yi-middle"], 2, "give one with --text FILE"),
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
