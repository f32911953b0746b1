"""`benchmarks/tokenize.py` runs as its docstring says, and stands in nobody's way with its name."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import REPOSITORY

BENCHMARK = REPOSITORY / "benchmarks" / "tokenize.py"


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_beside_it_gets_the_standard_librarys_tokenize(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARK.parent)!r}); import inspect, tokenize; print(tokenize.__file__)"
    )
    assert Path(python("-c", code, cwd=tmp_path).strip()).parent == Path(sysconfig.get_path("stdlib"))


def test_every_command_of_the_benchmark_gives_sentencepieces_ids(tmp_path: Path) -> None:
    texts = [f"Zeile {number}: 한국어 日本語 русский \t for (i = 0; i < n; ++i) </s>" for number in range(300)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found = json.loads(python(str(BENCHMARK), "--corpus", str(corpus), "--rounds", "1", "--json", cwd=tmp_path))
    assert {"sentencepiece", "native", "native, JSON lines"} <= set(found["engines"])
    commands = found["commands"]
    assert len(commands) == 6
    assert {(row["documents"], row["differing"]) for row in commands.values()} == {(300, 0)}
    assert found["engines"]["native"]["differing"] == 0
    assert all(row["largest_process_bytes"] > 10e6 for row in commands.values())
