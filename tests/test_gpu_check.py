"""`make gpu-check`: what of it runs without a GPU, run for real; and what it says where a check fails, or cannot run.

Transformer Engine does not run here: its checks are told as not run. Where a stand-in of it is met, it only raises.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import gpu_check, gpu_check_linear, gpu_check_report
from benchmarks.gpu_check import Check, Found
from benchmarks.gpu_check_report import Outcome, Result
from benchmarks.gpu_check_sizes import FULL, PRECISIONS, read_flat, solar
from orchestrator.settings import PrecisionSettings
from tests.conftest import REPOSITORY

GPU_CHECKS = {"model-fp8-tensorwise", "model-fp8-delayed", "model-fp8-blockwise", "tune-fp8-tensorwise"}


def gpu_check_process(*arguments: str | Path, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the check as a person does, with a folder of packages before all others."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(packages or ""), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )


def by_case(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results of a JSON file by check and case."""
    return {(result["check"], result["case"]): result for result in json.loads(path.read_text())["results"]}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All that runs on the CPU, once, on a machine with half of a Transformer Engine: a stand-in that only raises."""
    folder = tmp_path_factory.mktemp("gpu-check")
    half = folder / "packages" / "transformer_engine" / "__init__.py"
    half.parent.mkdir(parents=True)
    half.write_text("raise RuntimeError('a CUDA library is missing')\n")
    process = gpu_check_process("--device", "cpu", "--output", folder / "found.json", packages=folder / "packages")
    return process, folder / "found.json"


def test_all_that_needs_no_gpu_passes_on_the_cpu_and_the_rest_is_told_as_not_run(
    on_cpu: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    process, path = on_cpu
    assert process.returncode == 0, process.stdout + process.stderr
    found = by_case(path)
    not_run = {check for (check, _), result in found.items() if result["outcome"] == "not run"}
    assert not_run == GPU_CHECKS
    assert {result["outcome"] for result in found.values()} == {"passed", "not run"}
    assert all(found[name, ""]["told"] == "no GPU" for name in GPU_CHECKS)
    assert "all that can run without a GPU passed" in process.stdout.splitlines()[-1]
    for check, case in found:
        assert any(line.startswith(check) and case in line for line in process.stdout.splitlines()), (check, case)


def test_layers_in_bf16_agree_with_fp32_step_by_step(on_cpu: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    found = by_case(on_cpu[1])
    exact, rounded = found["model", "fp32"]["figures"]["losses"], found["model", "bf16"]["figures"]["losses"]
    assert exact[0] == pytest.approx(math.log(250), rel=0.02), "a new model knows the size of its vocabulary"
    differences = found["agreement", "bf16 with fp32"]["figures"]["relative_differences"]
    assert differences == [abs(b - a) / abs(a) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < max(differences) < 2**-8, "bf16 has 8 bits"


def test_speed_follows_from_the_plans_operations(on_cpu: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    figures = by_case(on_cpu[1])["model", "fp32"]["figures"]
    hidden, ffn, keys, vocabulary, layers, length = 64, 128, 32, 250, 2, 32
    matrices = layers * (hidden * (2 * hidden + 2 * keys) + 3 * hidden * ffn) + vocabulary * hidden
    flops_per_token = 6 * matrices + 6 * layers * hidden * length
    assert figures["tokens_per_second"] == pytest.approx(4 * length / figures["step_seconds"])
    assert figures["tflops"] == pytest.approx(figures["tokens_per_second"] * flops_per_token / 1e12)


def test_a_checkpoint_comes_back_bit_for_bit_and_so_do_the_losses_after_it(
    on_cpu: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    figures = by_case(on_cpu[1])["checkpoint", "bf16"]["figures"]
    assert figures["losses_after_loading"] == figures["losses"]
    assert len(set(figures["losses"])) == 2


def test_the_proof_refuses_layers_without_transformer_engine(
    on_cpu: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result = by_case(on_cpu[1])["broken on purpose", "no Transformer Engine"]
    assert "ColumnParallelLinear, which has no FP8" in result["told"]


def test_a_machine_without_a_gpu_runs_nothing_and_fails(tmp_path: Path) -> None:
    process = gpu_check_process("--output", tmp_path / "found.json")
    found = by_case(tmp_path / "found.json")
    assert process.returncode == 1
    assert found["environment", "GPU"]["outcome"] == "failed"
    assert {result["outcome"] for (check, _), result in found.items() if check != "environment"} == {"not run"}


def stand_in(name: str, *, fails: bool = False, needs_gpu: bool = False) -> Check:
    """Return a check of one case that passes, and then raises where it is to fail."""

    def run(device: str, folder: Path) -> Iterator[Found]:
        (folder / "written").touch()
        yield name, "first", [], device, {}
        if fails:
            raise ValueError("this one is broken")

    return Check(name=name, run=run, seconds=1, needs_gpu=needs_gpu)


def test_a_check_that_fails_is_told_and_those_after_it_still_run() -> None:
    results = gpu_check.run_here([stand_in("a", fails=True), stand_in("b", needs_gpu=True), stand_in("c")])
    assert [(result.check, result.case, result.outcome) for result in results] == [
        ("a", "first", "passed"),
        ("a", "", "failed"),
        ("b", "", "not run"),
        ("c", "first", "passed"),
    ]
    assert "ValueError: this one is broken" in results[1].told
    assert "in run" in results[1].figures["traceback"]


@pytest.mark.parametrize(
    ("passed", "seconds", "wants_engine", "why"),
    [
        ([], 100.0, False, "no GPU"),
        (["GPU"], 100.0, True, "Transformer Engine does not run here"),
        (["GPU"], 100.0, False, ""),
        (["GPU", "Transformer Engine"], 100.0, True, ""),
        (["GPU", "Transformer Engine"], 5.0, True, "no time is left"),
    ],
)
def test_what_the_environment_lacks_decides_what_is_run_on_a_gpu(
    passed: list[str], seconds: float, wants_engine: bool, why: str
) -> None:
    check = dataclasses.replace(stand_in("a"), needs_engine=wants_engine)
    found = [result("passed", "environment", case) for case in passed]
    found += [result("failed", "environment", "Transformer Engine")] if "Transformer Engine" not in passed else []
    said = gpu_check.reason_not_to_run(check, found, seconds)
    assert said.startswith(why) and bool(said) == bool(why)


WRITES_ONE = 'open(sys.argv[-1], "a").write(\'{"check":"x","case":"y","outcome":"passed","told":"","figures":{}}\\n\')'


@pytest.mark.parametrize(
    ("ends_with", "told"),
    [
        ("print('what it said'); sys.stdout.flush(); os.abort()", "was killed by signal 6"),
        ("sys.exit('what it said')", "ended with 1"),
        ("print('what it said', flush=True); threading.Event().wait()", "was ended after 2 s"),
    ],
)
def test_a_process_that_crashes_or_hangs_keeps_what_it_found_before(ends_with: str, told: str) -> None:
    code = f"import os, sys, threading; {WRITES_ONE}; {ends_with}"
    seconds = 2.0 if "ended after" in told else 60.0
    started = time.monotonic()
    results = gpu_check.in_a_process("x", [sys.executable, "-c", code], seconds, dict(os.environ))
    assert time.monotonic() - started < 30
    assert [result.outcome for result in results] == ["passed", "failed"]
    assert told in results[1].told and "what it said" in results[1].told


def test_what_a_process_left_running_is_ended_with_it(tmp_path: Path) -> None:
    """Such as torch's processes that compile kernels, which would hold the GPU."""
    child = "import threading; threading.Event().wait()"
    code = (
        f"import subprocess, sys; left = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(left.pid))"
    )
    assert gpu_check.in_a_process("x", [sys.executable, "-c", code], 60, dict(os.environ)) == []
    left = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 20
    while left.exists() and "State:\tZ" not in (left / "status").read_text() and time.monotonic() < deadline:
        os.sched_yield()
    assert not left.exists() or "State:\tZ" in (left / "status").read_text()


def result(outcome: Outcome, check: str = "model", case: str = "bf16", **figures: Any) -> Result:
    """Return a result with figures."""
    return Result(check=check, case=case, outcome=outcome, told="told", figures=figures)


@pytest.mark.parametrize(
    ("outcomes", "on_gpu", "on_cpu"),
    [
        (["passed"], 0, 0),
        (["passed", "below aim"], 0, 0),
        (["passed", "not run"], 1, 0),
        (["passed", "failed"], 1, 1),
        (["not run"], 1, 1),
        ([], 1, 1),
    ],
)
def test_the_exit_code_says_whether_all_passed(outcomes: list[Outcome], on_gpu: int, on_cpu: int) -> None:
    results = [result(outcome) for outcome in outcomes]
    codes = [gpu_check_report.exit_code(results, device) for device in ("cuda", "cpu")]
    assert codes == [on_gpu, on_cpu]
    for device, code in zip(("cuda", "cpu"), codes, strict=True):
        assert gpu_check_report.report(results, device, 1.0)["all_passed"] is (code == 0)


@pytest.mark.parametrize(("last", "outcome"), [(4.04, "passed"), (4.05, "failed"), (math.nan, "failed")])
def test_losses_that_differ_by_more_than_a_hundredth_do_not_agree(last: float, outcome: str) -> None:
    left = result("passed", losses=[5.0, 4.0, 3.0])
    assert gpu_check_report.agreement(left, result("passed", losses=[5.0, last]), limit=0.0101).outcome == outcome


def test_fp8_that_gives_the_very_losses_of_bf16_was_none() -> None:
    left, right = result("passed", losses=[5.0, 4.0]), result("passed", case="fp8-delayed", losses=[5.0, 4.0])
    found = gpu_check_report.agreement(left, right)
    assert found.outcome == "failed" and "not computed in FP8" in found.told
    assert gpu_check_report.agreement(left, dataclasses.replace(right, case="bf16, own layers")).outcome == "passed"


def test_an_aim_that_is_missed_is_told_and_fails_nothing() -> None:
    slow = result("passed", "tune", "bf16, layers", layer_tflops=500.0, peak_tflops=989.0)
    fast = result("passed", "tune", "fp8-tensorwise, layers", layer_tflops=700.0)
    found = gpu_check_report.aims([slow, fast])
    assert [(aim.case, aim.outcome) for aim in found] == [
        ("share of the peak", "below aim"),
        ("FP8 by bf16", "passed"),
    ]
    assert "51%" in found[0].told and "1.40 times" in found[1].told
    assert gpu_check_report.exit_code([slow, fast, *found], "cuda") == 0
    assert gpu_check_report.aims([result("passed")]) == []


def test_the_table_fits_a_terminal_whatever_is_told() -> None:
    long = dataclasses.replace(result("failed"), told="a word " * 200)
    lines = gpu_check_report.table([long, result("passed", case="torch._scaled_mm, fc1")]).splitlines()
    assert max(map(len, lines)) <= gpu_check_report.WIDTH
    assert sum("a word" in line for line in lines) == 4


def ofp8_values(exponent_bits: int, mantissa_bits: int, largest: float) -> torch.Tensor:
    """Return every value of an FP8 format up to its largest, by the definition (Micikevicius et al. 2022)."""
    bias = 2 ** (exponent_bits - 1) - 1
    steps = 2**mantissa_bits
    found = {
        (mantissa + (steps if exponent else 0)) / steps * 2.0 ** (max(exponent, 1) - bias)
        for exponent, mantissa in itertools.product(range(2**exponent_bits), range(steps))
    }
    positive = sorted(value for value in found if value <= largest)
    return torch.tensor([-value for value in reversed(positive)] + positive, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(gpu_check_linear.E4M3, ofp8_values(4, 3, 448.0)), (gpu_check_linear.E5M2, ofp8_values(5, 2, 57344.0))],
)
def test_rounding_takes_the_nearest_number_of_the_format(dtype: torch.dtype, values: torch.Tensor) -> None:
    given = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    for rows, columns in ((0, 0), (1, 64), (32, 32)):
        found = gpu_check_linear.rounded(given, dtype, rows, columns)
        blocks = [given] if not rows else [b for r in given.split(rows) for b in r.split(columns, 1)]
        rounded_blocks = [found] if not rows else [b for r in found.split(rows) for b in r.split(columns, 1)]
        for block, rounded in zip(blocks, rounded_blocks, strict=True):
            scale = float(values[-1]) / float(block.abs().max())
            scale = 2.0 ** math.floor(math.log2(scale)) if rows else scale
            nearest = values[(block.double().unsqueeze(-1) * scale - values).abs().argmin(-1)] / scale
            # A scale in fp32 moves a few values across the middle between two numbers.
            assert (nearest - rounded.double()).abs().gt(1e-6 * block.abs().max()).float().mean() < 1e-3


def test_an_fp8_error_is_wrong_where_it_is_too_large_and_where_it_is_none() -> None:
    product = gpu_check_linear.Product(name="x", tokens=128, inputs=256, outputs=128)
    given = gpu_check_linear.operands(product, "cpu")
    exact = gpu_check_linear.reference(given)
    bf16 = gpu_check_linear.errors(gpu_check_linear.three_products(given.x, given.w, given.g), exact)
    assert gpu_check_linear.problems(bf16, None) == []
    for name in PRECISIONS[1:]:
        precision = PrecisionSettings(**read_flat(REPOSITORY / "conf" / "precision" / f"{name}.yaml"))
        expected = gpu_check_linear.expected_errors(given, precision, exact)
        # Two operands with 3 bits of mantissa, each off by 2^-4 at most; for gradients one has 2 bits.
        assert 0.02 < expected[0] < math.hypot(2**-4, 2**-4)
        assert all(expected[0] < error < math.hypot(2**-4, 2**-3) for error in expected[1:])
        assert gpu_check_linear.problems(expected, expected) == []
        said = gpu_check_linear.problems(bf16, expected)
        assert len(said) == 3 and all("not computed in FP8" in line for line in said)
        assert len(gpu_check_linear.problems([2 * error for error in expected], expected)) == 3
    assert len(gpu_check_linear.problems(expected, None)) == 3, "bf16 with the errors of FP8"


def test_torchs_own_fp8_product_errs_as_rounding_alone_does() -> None:
    product = gpu_check_linear.Product(name="x", tokens=32, inputs=64, outputs=48)
    wrong, _, figures = gpu_check_linear.scaled_product(product, "cpu")
    assert wrong == []
    assert figures["error"] == pytest.approx(figures["expected_error"], rel=0.05)


def test_configurations_are_read_as_a_yaml_parser_reads_them(tmp_path: Path) -> None:
    paths = [*(REPOSITORY / "conf" / "precision").glob("*.yaml"), REPOSITORY / "conf" / "model" / "solar-10.7b.yaml"]
    assert len(paths) >= 5
    for path in paths:
        assert read_flat(path) == yaml.safe_load(path.read_text())
    (tmp_path / "nested.yaml").write_text("a:\n  b: 1\n")
    with pytest.raises(ValueError, match="should have lines of `name: value`"):
        read_flat(tmp_path / "nested.yaml")


def test_it_is_solars_width_and_sequence() -> None:
    shape = FULL.shape
    assert (shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size, FULL.sequence_length) == (
        4096,
        14336,
        32000,
        4096,
    )
    assert (shape.num_attention_heads, shape.num_query_groups, shape.num_layers, FULL.steps) == (32, 8, 4, 20)
    assert solar(48).parameters() == 10_731_524_096


def test_the_parent_of_all_checks_imports_no_torch() -> None:
    """Where torch or Transformer Engine cannot be imported, it still has to say so."""
    code = (
        "import sys; from benchmarks import gpu_check; gpu_check.child_variables(); "
        "print([name for name in ('torch', 'numpy', 'yaml', 'megatron') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_make_installs_the_wheels_aside_and_runs_with_them(tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / "transformer_engine-2.11.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:  # a stand-in: only its version is asked for on the CPU
        archive.writestr("transformer_engine/__init__.py", "raise RuntimeError('not on the CPU')\n")
        folder = "transformer_engine-2.11.0.dist-info"
        archive.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.11.0\n")
        archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{folder}/RECORD", "")
    output = tmp_path / "found.json"
    make = ["make", "gpu-check", f"GPU_PYTHON={sys.executable}"]
    arguments = f"GPU_CHECK_ARGS=--device cpu --only linear --output {output}"
    process = subprocess.run(
        [*make, f"WHEELS={wheel.parent}", arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = by_case(output)
    assert found["environment", "libraries"]["figures"]["transformer-engine"] == "2.11.0"
    assert {case for check, case in found if check == "linear"} == {f"bf16, {part}" for part in LINEAR_PARTS}
    assert list((REPOSITORY / "build").glob("gpu-check-*")) == [], "what was installed is removed"
    nothing = subprocess.run([*make, f"WHEELS={tmp_path}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert nothing.returncode != 0
    assert f"there are none in '{tmp_path}'" in nothing.stderr


LINEAR_PARTS = ("qkv", "proj", "fc1", "fc2")
