"""The streamed pass against transformers, and what a person sees of `upscale --evaluate` and of yi-middle.

1e-5 nats is what sums in another order make of fp32 losses; single tokens differ by a few times that.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from megatron_solar import evaluate as evaluation_module
from megatron_solar.depth import depth_map, explicit_map, solar_depth_map
from megatron_solar.evaluate import evaluate, layer_cosines, read_evaluation
from megatron_solar.model_folder import ModelFolder
from megatron_solar.upscale import plan_upscale, write_upscaled
from orchestrator.commands.upscale import command
from orchestrator.errors import DataError, ModelFolderError
from orchestrator.tokenize.held_out import held_out_tokens
from orchestrator.tokenize.manifest import read_manifest
from orchestrator.tokenize.shard_reader import ShardReader
from orchestrator.tokenize.stage import tokenize_corpus

SIZES: Mapping[str, object] = {
    "vocab_size": 9000,  # more than the pass takes at once
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, Mapping[str, object]] = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "full attention, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "heads of their own size": {"head_dim": 16},
    "another theta and epsilon": {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "llama 3's rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
}


def make_model(path: Path, **different: object) -> transformers.LlamaForCausalLM:
    """Write a random Llama, its norms not all ones."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **different})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return model


def random_tokens(sequences: int = 3, length: int = 40) -> NDArray[numpy.int32]:
    return numpy.random.default_rng(0).integers(0, 9000, (sequences, length + 1), dtype=numpy.int32)


def losses_of(model: transformers.LlamaForCausalLM, tokens: NDArray[numpy.int32]) -> tuple[float, Tensor]:
    """Return the loss as transformers tells it, and that of each token from its logits."""
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        found = model(ids, labels=ids)
    each = torch.nn.functional.cross_entropy(found.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return float(found.loss), each


@pytest.mark.parametrize("name", SHAPES)
def test_losses_of_base_and_result_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "base", **SHAPES[name])
    base, tokens = ModelFolder.open(tmp_path / "base"), random_tokens()
    plan = plan_upscale(base, solar_depth_map(4, 1))
    found = evaluate(base, plan.layers, plan.dtype, tokens)
    write_upscaled(base, plan, tmp_path / "out")
    deeper = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for losses, reference in ((found.base_losses, model), (found.result_losses, deeper)):
        mean, each = losses_of(reference, tokens)
        print(f"{name}: mean {abs(float(losses.mean()) - mean):.1e}, token {float((losses - each).abs().max()):.1e}")
        assert float(losses.double().mean()) == pytest.approx(mean, abs=1e-5)
        assert torch.allclose(losses, each, atol=5e-5, rtol=0)
    assert not torch.allclose(found.base_losses, found.result_losses, atol=1e-2)


def test_another_precision_and_zeroed_layers_are_computed_as_they_are_written(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    base, tokens = ModelFolder.open(tmp_path / "base"), random_tokens()
    for name, layers, dtype in (
        ("rounded", explicit_map("3,0-1", 4), torch.bfloat16),
        ("identity", depth_map("llama-pro", 4), torch.float32),
    ):
        found = evaluate(base, layers, dtype, tokens)
        write_upscaled(base, plan_upscale(base, layers, dtype=dtype), tmp_path / name)
        written = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert torch.allclose(found.result_losses, losses_of(written, tokens)[1], atol=5e-5, rtol=0), name
    assert torch.equal(found.base_losses, found.result_losses)  # identity blocks change nothing, to the bit


def test_taking_fewer_sequences_at_a_time_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "base")
    base, tokens, layers = ModelFolder.open(tmp_path / "base"), random_tokens(5), solar_depth_map(4, 1)
    whole = evaluate(base, layers, base.dtype, tokens)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(evaluation_module, "ACTIVATION_BYTES", 2 * 40 * 32 * 4)  # two sequences
    parts = evaluate(base, layers, base.dtype, tokens, lambda done, total: seen.append((done, total)))
    assert torch.equal(whole.base_losses, parts.base_losses)
    assert torch.equal(whole.result_losses, parts.result_losses)
    # 4 and 6 layers, of which the first 3 are the same; in three groups.
    assert len(seen) == 3 * (4 + 6 - 3)
    assert seen[-1] == (5 * 40 * 7, 5 * 40 * 7)


def test_a_layers_cosine_is_that_of_transformers_hidden_states(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base")
    tokens = random_tokens()
    ids = torch.from_numpy(tokens[:, :-1]).long()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, output: inputs.append(output))
    with torch.no_grad():
        states = [model.model.embed_tokens(ids)]
        model(ids)
    states += inputs
    wanted = [
        float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in itertools.pairwise(states)
    ]
    assert layer_cosines(ModelFolder.open(tmp_path / "base"), tokens) == pytest.approx(wanted, abs=1e-5)


def test_weights_that_compute_no_number_are_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e30)
        model.lm_head.weight.mul_(1e30)
    model.save_pretrained(tmp_path / "base")
    base = ModelFolder.open(tmp_path / "base")
    with pytest.raises(ModelFolderError, match="computes a loss that is no number"):
        evaluate(base, solar_depth_map(4, 1), base.dtype, random_tokens())


# The held-out tokens


@pytest.fixture
def with_tokenizer(tmp_path: Path, tokenizer: Path) -> Path:
    """A base that has the real vocabulary."""
    make_model(tmp_path / "base", vocab_size=32000)
    (tmp_path / "base" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return tmp_path / "base"


def test_a_text_gives_its_first_tokens_and_a_data_set_sequences_from_all_over(
    tmp_path: Path, with_tokenizer: Path, corpus: Path
) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(json.__file__).read_text() * 3)
    tokenize_corpus([text], with_tokenizer, tmp_path / "data", progress=False)
    everything = ShardReader(tmp_path / "data", read_manifest(tmp_path / "data").shards[0]).tokens
    found = held_out_tokens(text, with_tokenizer, sequences=3, length=50, vocab_size=32000)
    assert numpy.array_equal(found.ravel(), everything[: 3 * 51])

    data = corpus / "train"
    shards = [ShardReader(data, shard).tokens for shard in read_manifest(data).shards]
    whole = numpy.concatenate(shards)
    spread = held_out_tokens(data, with_tokenizer, sequences=4, length=50, vocab_size=32000)
    starts = [number * (whole.size - 51) // 3 for number in range(4)]
    assert starts[-1] == whole.size - 51
    assert [row.tolist() for row in spread] == [whole[start : start + 51].tolist() for start in starts]


def test_a_window_over_the_end_of_a_shard_goes_on_in_the_next(tmp_path: Path, with_tokenizer: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {number} of a text"}) + "\n" for number in range(200)))
    tokenize_corpus([text], with_tokenizer, tmp_path / "data", progress=False, shard_tokens=100)
    shards = [ShardReader(tmp_path / "data", shard).tokens for shard in read_manifest(tmp_path / "data").shards]
    assert len(shards) > 5
    whole = numpy.concatenate(shards)
    found = held_out_tokens(
        tmp_path / "data", with_tokenizer, sequences=2, length=whole.size // 2 - 1, vocab_size=32000
    )
    assert numpy.array_equal(found.ravel(), whole[: found.size])


def test_a_text_that_cannot_serve_gets_one_error(tmp_path: Path, with_tokenizer: Path, corpus: Path) -> None:
    short, random = tmp_path / "short.txt", tmp_path / "random.txt"
    short.write_text("a few words")
    random.write_bytes(numpy.random.default_rng(0).bytes(10_000))
    for source, named in (
        (short, r"should have 2,052 tokens for 4 sequences of 512, found \d+; give more text"),
        (random, "should be text, and none of its 1 records is"),
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "base", "no text found"),
    ):
        with pytest.raises(DataError, match=named):
            held_out_tokens(source, with_tokenizer, sequences=4, length=512, vocab_size=32000)
    with pytest.raises(DataError, match="the model knows 100; its tokenizer is not the model's own"):
        held_out_tokens(corpus / "train", with_tokenizer, sequences=4, length=512, vocab_size=100)
    (with_tokenizer / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match="was made with another tokenizer"):
        held_out_tokens(corpus / "train", with_tokenizer, sequences=4, length=512, vocab_size=32000)


# The command


def run_command(*words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_lineage_has_the_losses_and_the_folder_the_very_tokens(
    tmp_path: Path, with_tokenizer: Path, corpus: Path
) -> None:
    output = run_command(
        with_tokenizer, "--output", tmp_path / "out", "--evaluate", corpus / "validation", "--sequences", 3
    )
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    record, tensors = lineage["evaluation"], load_file(tmp_path / "out/evaluation.safetensors")
    assert (record["text"], record["sequences"]) == (str(corpus / "validation"), 3)
    assert record["sequence_length"] == 64  # the model's context
    tokens = tensors["tokens"].numpy()
    assert numpy.array_equal(
        tokens, held_out_tokens(corpus / "validation", with_tokenizer, sequences=3, length=64, vocab_size=32000)
    )
    for side, path in (("base", with_tokenizer), ("result", tmp_path / "out")):
        mean, each = losses_of(transformers.LlamaForCausalLM.from_pretrained(path), tokens)
        assert record[f"{side}_loss"] == pytest.approx(mean, abs=1e-5)
        assert torch.allclose(tensors[f"{side}_losses"], each, atol=5e-5, rtol=0)
    digest = hashlib.sha256((tmp_path / "out/evaluation.safetensors").read_bytes()).hexdigest()
    assert lineage["result"]["files"]["evaluation.safetensors"] == digest
    assert f"result {record['result_loss']:.4f} nats a token, over 3 sequences of 64" in output
    assert f"{math.log(32000):.3f}: it has never seen text of this kind" in output  # new weights
    assert f"{record['result_loss']:.4f}" in (tmp_path / "out/README.md").read_text()


def test_a_recorded_evaluation_that_was_changed_is_refused(tmp_path: Path, with_tokenizer: Path, corpus: Path) -> None:
    run_command(with_tokenizer, "--output", tmp_path / "out", "--evaluate", corpus / "validation", "--sequences", 1)
    recorded = read_evaluation(tmp_path / "out")
    assert recorded is not None
    assert recorded.tokens.shape == (1, 65)
    path = tmp_path / "out/evaluation.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelFolderError, match="is not the file that the lineage was written of"):
        read_evaluation(tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelFolderError, match=r"should have evaluation\.safetensors"):
        read_evaluation(tmp_path / "out")
    assert read_evaluation(with_tokenizer) is None


def test_yi_middle_repeats_the_layers_that_change_their_input_least(
    tmp_path: Path, with_tokenizer: Path, corpus: Path
) -> None:
    """Layers 1 and 2 are made to add little, which the measurement has to find."""
    model = transformers.LlamaForCausalLM.from_pretrained(with_tokenizer)
    with torch.no_grad():
        for number in (1, 2):
            model.model.layers[number].self_attn.o_proj.weight.mul_(0.01)
            model.model.layers[number].mlp.down_proj.weight.mul_(0.01)
    model.save_pretrained(with_tokenizer)
    words = (with_tokenizer, "--strategy", "yi-middle", "--text", corpus / "train", "--sequences", 2)
    assert "seam: base layer 1 follows base layer 2 at result layer 3" in run_command(*words, "--explain")
    run_command(*words, "--output", tmp_path / "out")
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["layer_sources"] == [0, 1, 2, 1, 2, 3]
    assert (lineage["paper"], len(lineage["cosines"])) == ("arXiv 2403.04652", 4)
    assert min(lineage["cosines"][1:3]) > max(lineage["cosines"][0], lineage["cosines"][3])
