"""Check a machine with one Hopper GPU, offline, in less than 8 minutes: `make gpu-check WHEELS=FOLDER`.

    python -m benchmarks.gpu_check [--device cuda|cpu] [--only NAME ...] [--output FILE] [--seconds 460]

Each check runs in a process of its own: one that crashes, hangs or leaves the GPU in a bad state is told, and the
others still run. The result is a table on stdout and a JSON file; the exit code is 0 where all passed. With
`--device cpu` what can run without a GPU runs at a tiny size, in this process. docs/precision.md says what is checked.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_check_report import Outcome, Result, agreement, aims, exit_code, in_a_line, report, summary, table
from benchmarks.gpu_check_sizes import FULL, PRECISIONS, REPOSITORY, TINY, precision_of
from orchestrator.files import JsonLines, read_json_lines, write_json
from orchestrator.values import to_plain

Found = tuple[str, str, list[str], str, dict[str, object]]
"""Check, case, what is wrong, a line for people, figures."""
ENVIRONMENT, WITHOUT_ENGINE = "environment", "without-engine"
GPU, ENGINE = "GPU", "Transformer Engine"
"""Cases of the environment: whether there is a Hopper GPU, and whether Transformer Engine's kernels run on it."""
OWN_LAYERS = "bf16, own layers"
OWN_STEPS = 6
LAST_LINES = 12
LEAST_SECONDS = 15.0
"""Less than that is not enough for the imports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A part that runs in a process of its own."""

    name: str
    run: Callable[[str, Path], Iterator[Found]]
    """Gets the device and a folder for its files."""
    seconds: float
    """After which it is ended."""
    needs_gpu: bool = False
    needs_engine: bool = True
    """Whether it says nothing without Transformer Engine, on a GPU."""


def _environment(device: str, folder: Path) -> Iterator[Found]:
    from benchmarks.gpu_check_environment import environment

    yield from environment(device)


def _linear(device: str, folder: Path) -> Iterator[Found]:
    from benchmarks import gpu_check_linear
    from benchmarks.gpu_check_environment import recipe_of

    size = FULL if device == "cuda" else TINY
    shape = size.shape
    inputs_and_outputs = {
        "qkv": (shape.hidden_size, shape.query_size + 2 * shape.key_size),
        "proj": (shape.query_size, shape.hidden_size),
        "fc1": (shape.hidden_size, 2 * shape.ffn_hidden_size),
        "fc2": (shape.ffn_hidden_size, shape.hidden_size),
    }
    for name in PRECISIONS if device == "cuda" else PRECISIONS[:1]:
        precision = precision_of(name)
        for part, (inputs, outputs) in inputs_and_outputs.items():
            product = gpu_check_linear.Product(name=part, tokens=size.sequence_length, inputs=inputs, outputs=outputs)
            try:
                found = gpu_check_linear.compare(product, precision, recipe_of(precision, device), device)
            except Exception as error:
                found = [in_a_line(error)], "", {}
            yield ("linear", f"{name}, {part}", *found)


def _model(name: str) -> Callable[[str, Path], Iterator[Found]]:
    def run(device: str, folder: Path) -> Iterator[Found]:
        from benchmarks.gpu_check_model import train_a_little

        yield from train_a_little(FULL if device == "cuda" else TINY, precision_of(name), device, folder)

    return run


def _broken(device: str, folder: Path) -> Iterator[Found]:
    from benchmarks.gpu_check_model import broken_proofs

    yield from broken_proofs(FULL if device == "cuda" else TINY, device, folder)


def _checkpoint(device: str, folder: Path) -> Iterator[Found]:
    from benchmarks.gpu_check_checkpoint import checkpoint_round_trip

    if device == "cuda":  # 1 layer and fewer words: 3.4 GB
        size = dataclasses.replace(FULL, shape=dataclasses.replace(FULL.shape, num_layers=1, vocab_size=8192))
        asked = dataclasses.replace(precision_of("fp8-tensorwise"), first_bf16_layers=0, last_bf16_layers=0)
        yield from checkpoint_round_trip(size, asked, device, folder)
    else:
        yield from checkpoint_round_trip(TINY, precision_of("bf16"), device, folder)


def _tune(name: str) -> Callable[[str, Path], Iterator[Found]]:
    def run(device: str, folder: Path) -> Iterator[Found]:
        from benchmarks.gpu_check_tune import TUNED, tune

        is_full = device == "cuda"
        yield from tune(FULL if is_full else TINY, precision_of(name), device, folder, TUNED if is_full else TUNED[:1])

    return run


def _without_engine(device: str, folder: Path) -> Iterator[Found]:
    """Megatron's own layers in bf16, and torch's FP8 product: all that is left where Transformer Engine is refused.

    Where it is not, the losses of the former are a check of its layers, its Adam and its sums of gradients in bf16.
    """
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # an ImportError, which megatron expects
    from benchmarks import gpu_check_linear
    from benchmarks.gpu_check_model import train_a_little

    size = FULL if device == "cuda" else TINY
    short = dataclasses.replace(size, steps=min(size.steps, OWN_STEPS))
    note = "; no check of the FP8 path"
    for name, _, wrong, told, figures in train_a_little(short, precision_of("bf16"), device, folder):
        yield name, OWN_LAYERS, wrong, told + (note if name == "model" else ""), figures
    shape = size.shape
    for part, inputs, outputs in (
        ("fc1", shape.hidden_size, 2 * shape.ffn_hidden_size),
        ("fc2", shape.ffn_hidden_size, shape.hidden_size),
    ):
        product = gpu_check_linear.Product(name=part, tokens=size.sequence_length, inputs=inputs, outputs=outputs)
        wrong, told, figures = gpu_check_linear.scaled_product(product, device)
        yield "torch._scaled_mm", part, wrong, told + note, figures


CHECKS = (
    Check(name=ENVIRONMENT, run=_environment, seconds=150, needs_engine=False),
    Check(name="linear", run=_linear, seconds=90),
    *(Check(name=f"model-{name}", run=_model(name), seconds=90, needs_gpu=name != "bf16") for name in PRECISIONS),
    Check(name="model-fp32", run=_model("fp32"), seconds=90, needs_engine=False),
    Check(name="broken", run=_broken, seconds=90),
    Check(name="checkpoint", run=_checkpoint, seconds=90),
    Check(name=WITHOUT_ENGINE, run=_without_engine, seconds=90, needs_engine=False),
    Check(name="tune-bf16", run=_tune("bf16"), seconds=120),
    Check(name="tune-fp8-tensorwise", run=_tune("fp8-tensorwise"), seconds=120, needs_gpu=True),
)
CPU_ONLY = ("model-fp32",)
"""Checks that have no meaning on a GPU: there bf16 is what FP8 is compared with."""


def main(arguments: Sequence[str]) -> int:
    """Run the checks, tell of them, and return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check.json"), help="JSON (build/gpu-check.json)")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all of it; what is left then is not run")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if options.child:
        _run_one(options.child[0], options.device, Path(options.child[1]))
        return 0
    chosen = [check for check in CHECKS if options.only is None or check.name in (*options.only, ENVIRONMENT)]
    if options.device == "cpu":
        results = run_here(chosen)
    else:
        results = run_apart([check for check in chosen if check.name not in CPU_ONLY], started + options.seconds)
    results += conclusions(results, options.device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, report(results, options.device, time.monotonic() - started))
    print(table(results))
    print(f"{summary(results, options.device)}, in {time.monotonic() - started:.0f} s; {options.output}")
    return exit_code(results, options.device)


def conclusions(results: Sequence[Result], device: str) -> list[Result]:
    """Compare runs with each other: losses step by step, and a GPU's speeds with what is aimed at."""
    runs = {result.case: result for result in results if result.check == "model" and "losses" in result.figures}
    reference = runs.get("fp32") or runs.get("bf16")
    compared = [agreement(reference, run) for run in runs.values() if run is not reference] if reference else []
    return compared + (aims(results) if device == "cuda" else [])


def run_here(checks: Sequence[Check]) -> list[Result]:
    """Run on the CPU, one check after the other in this process, what needs no GPU."""
    from megatron_solar.cpu import cuda_calls_on_cpu

    results = []
    with cuda_calls_on_cpu(), tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for check in checks:
            if check.needs_gpu:
                results.append(_not_run(check, "no GPU"))
            else:
                results += outcomes(check, "cpu", Path(folder) / check.name)
    return results


def run_apart(checks: Sequence[Check], deadline: float) -> list[Result]:
    """Run each check in a process of its own; what the first one finds decides what there is to run."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as kernels:
        environment = {**child_variables(), "TORCHINDUCTOR_CACHE_DIR": kernels}  # compiled once for all
        for check in checks:
            left = deadline - time.monotonic()
            why = reason_not_to_run(check, results, left)
            if why:
                results.append(_not_run(check, why))
                continue
            print(f"{check.name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cuda", "--child", check.name]
            results += in_a_process(check.name, command, min(check.seconds, left), environment)
    return results


def reason_not_to_run(check: Check, results: Sequence[Result], seconds_left: float) -> str:
    """Return why a check on a GPU would say nothing after what was found before, or nothing."""
    passed = {result.case for result in results if result.check == ENVIRONMENT and result.outcome == "passed"}
    if check.name != ENVIRONMENT and GPU not in passed:
        return "no GPU, see environment"
    if check.needs_engine and ENGINE not in passed:
        return "Transformer Engine does not run here, see environment"
    return "no time is left, see --seconds" if seconds_left < LEAST_SECONDS else ""


def in_a_process(name: str, command: Sequence[str], seconds: float, environment: dict[str, str]) -> list[Result]:
    """Run a command that appends its results to the file named as its last argument, and end it when it is late."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path, log = Path(folder) / "results.jsonl", Path(folder) / "log"
        path.touch()
        began = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(path)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**environment, "TMPDIR": folder},
                cwd=REPOSITORY,
                start_new_session=True,
            )
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what compiles kernels for it as well
                process.wait()
        results = read_results(path)
        took = time.monotonic() - began
        if code != 0:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            what = f"was ended after {seconds:.0f} s" if code is None else _how_it_ended(code)
            told = f"the process {what}, {len(results)} results before; it said: {' '.join(said.split())[-300:]}"
            results.append(Result(check=name, case="process", outcome="failed", told=told, figures={"log": said}))
        print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
    return results


def _how_it_ended(code: int) -> str:
    return f"ended with {code}" if code > 0 else f"was killed by signal {-code}"


def child_variables() -> dict[str, str]:
    """Return what a launch on one GPU sets, and what a machine without a network needs."""
    from benchmarks.gpu_check_environment import launch_variables

    found = {**launch_variables(), **os.environ}
    found.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if "CUDA_HOME" not in found:
        found.setdefault("NVTE_DISABLE_NVRTC", "1")
    return found


def _run_one(name: str, device: str, path: Path) -> None:
    """Run one check in this process, and append each result as it is found."""
    check = next(check for check in CHECKS if check.name == name)
    with contextlib.closing(JsonLines(path)) as lines, tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for result in outcomes(check, device, Path(folder) / name):
            lines.append(to_plain(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of NCCL and gloo may keep the interpreter for long


def outcomes(check: Check, device: str, folder: Path) -> Iterator[Result]:
    """Run a check; what it raises is its last result, and fails it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    try:
        for name, case, wrong, told, figures in check.run(device, folder):
            outcome: Outcome = "failed" if wrong else "passed"
            line = "; ".join([*wrong, *([told] if told else [])])
            yield Result(
                check=name,
                case=case,
                outcome=outcome,
                told=line,
                figures={**figures, "check_seconds": round(time.perf_counter() - began, 2)},
            )
    except Exception as error:
        said = traceback.format_exc()
        yield Result(
            check=check.name, case="", outcome="failed", told=in_a_line(error), figures={"traceback": said[-3000:]}
        )


def read_results(path: Path) -> list[Result]:
    """Read what a process has told before it ended, whole lines only."""
    return [Result(**record) for _, record in read_json_lines(path)]


def _not_run(check: Check, why: str) -> Result:
    return Result(check=check.name, case="", outcome="not run", told=why)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
