"""The demo itself, with fewer steps from a person's own ./conf: every step, real, in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import transformers

from tests.conftest import REPOSITORY

# A person's own recipes beside where the command runs; the demo takes them in place of the packaged ones.
FEWER_STEPS = {"demo-base": ("131072", "8192"), "demo": ("65536", "12288")}


def test_the_demo_walks_the_whole_path_and_says_what_it_did(tmp_path: Path) -> None:
    recipes = tmp_path / "conf" / "recipe"
    recipes.mkdir(parents=True)
    for name, (tokens, fewer) in FEWER_STEPS.items():
        text = (REPOSITORY / "conf" / "recipe" / f"{name}.yaml").read_text()
        assert f"tokens: {tokens}" in text
        (recipes / f"{name}.yaml").write_text(text.replace(f"tokens: {tokens}", f"tokens: {fewer}"))
    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.commands.main", "demo", "--output", str(tmp_path / "out"), "--json",
         "--text", str(Path(os.__file__).parent / "email")],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(result.stdout)
    assert summary["attempts"] == 2
    assert 6 <= summary["interrupted_after_step"] < 12
    assert summary["tokens"] == 12288
    assert summary["largest_logit_difference"] < 2e-5
    assert summary["held_out_loss_base"] < 10.3  # ln 32000 is 10.37
    assert summary["held_out_loss_trained"] < summary["held_out_loss_upscaled"]
    assert Path(summary["loss_picture"]).read_bytes().startswith(b"\x89PNG")
    assert Path(summary["checkpoint"], "complete.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(summary["exported_model"])
    assert model.config.num_hidden_layers == 12
    lineage = json.loads(Path(summary["exported_model"], "lineage.json").read_text())
    assert lineage["base_lineage"]["layer_sources"] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
