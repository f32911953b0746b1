"""What this machine can do, one check a row, each with its remedy.

Heavy libraries are imported in processes of their own, two at a time, so that a broken one cannot
take the report with it: a half-installed Transformer Engine makes `import megatron.core` die, and
the package `apex` of the Python index is an unrelated web toolkit, genuine only with `apex.optimizers`
and `amp_C`. A check never raises; what it needs is handed to it.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.gpu_libraries import WEIGHT_GRADIENT_KERNEL, cuda_of_torch, installed_version, library_versions
from orchestrator.library_pairs import INSTALL, REMOVE, pair_problems, pair_warnings
from orchestrator.units import format_bytes

PROBE_SECONDS = 120
COMMAND_SECONDS = 10
SMALLEST_FREE_BYTES = 5e9
"""Below this the demo's data, checkpoints and exported model may not fit."""
WIDTH = 100
ENGINE = "Transformer Engine"

State = Literal["ok", "missing", "broken"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report."""

    name: str
    state: State
    found: str
    remedy: str = ""
    is_needed: bool = False
    """Whether the CPU path, `orchestrate demo`, cannot do without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where this machine's runs and their tracking store are to be."""

    runs: Path
    store: str


def examine(places: Places) -> list[Finding]:
    """Make all checks and return their rows, in the order of the table."""
    checks: Sequence[Callable[[], Finding]] = (
        check_python,
        check_torch,
        check_megatron,
        check_demo_packages,
        check_compiler,
        lambda: check_runs_folder(places.runs),
        check_mlflow,
        lambda: check_store(places.store),
        check_submitit,
        check_slurm,
        check_gpus,
        check_transformer_engine,
        check_apex,
    )
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        return [future.result() for future in [pool.submit(check) for check in checks]]


def can_demo(findings: Sequence[Finding]) -> bool:
    """Whether everything that the CPU path needs is there."""
    return all(finding.state == "ok" for finding in findings if finding.is_needed)


def render(findings: Sequence[Finding]) -> str:
    """Return the report as one screen of text, within 100 columns."""
    name_width = max(len(finding.name) for finding in findings)
    indent = " " * (name_width + 11)
    lines = []
    for finding in findings:
        lines += _wrap(finding.found, f"{finding.name:{name_width}}  {finding.state:9}", indent)
        if finding.remedy:
            lines += _wrap(finding.remedy, f"{indent}-> ", f"{indent}   ")
    failing = [finding.name for finding in findings if finding.is_needed and finding.state != "ok"]
    lines.append("")
    if failing:
        lines.append(f"`orchestrate demo` cannot work here yet; to mend: {', '.join(failing)}")
    else:
        lines.append("`orchestrate demo` can work here.")
    return "\n".join(lines)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def check_python() -> Finding:
    """Python's version against the project's range."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding(name="Python", state="ok", found=version, is_needed=True)
    return Finding(
        name="Python",
        state="broken",
        found=f"{version}, wanted 3.11 or 3.12",
        remedy="make a virtual environment with Python 3.11 or 3.12",
        is_needed=True,
    )


def check_torch() -> Finding:
    """PyTorch: its version and build, and a sum computed with it."""
    code = (
        "import torch; assert float(torch.ones(2).sum()) == 2; "
        "answer = [torch.__version__, torch.version.cuda, torch.distributed.is_gloo_available()]"
    )
    answer, problem = _probe(code)
    if problem:
        return _not_importable("PyTorch", "torch", problem)
    version, cuda, has_gloo = answer
    build = f"CUDA {cuda}" if cuda else "CPU"
    if not has_gloo:
        return Finding(
            name="PyTorch",
            state="broken",
            found=f"{version}, {build} build, without gloo, which ranks on the CPU need",
            remedy="install a build from the package index: pip install --force-reinstall torch",
            is_needed=True,
        )
    return Finding(name="PyTorch", state="ok", found=f"{version}, {build} build", is_needed=True)


def check_megatron() -> Finding:
    """Megatron-core: it dies with a half-installed Transformer Engine."""
    answer, problem = _probe("import megatron.core; answer = megatron.core.__version__")
    if problem:
        return _not_importable("megatron-core", "megatron-core", problem)
    return Finding(name="megatron-core", state="ok", found=str(answer), is_needed=True)


def check_demo_packages() -> Finding:
    """What `orchestrate demo` needs besides: vocabulary, tokenizer, reader of the exported model."""
    wanted = ("sentencepiece", "mistral-common", "transformers", "safetensors", "matplotlib")
    versions = {name: installed_version(name) for name in wanted}
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        return Finding(
            name="demo's packages",
            state="missing",
            found=f"not installed: {', '.join(absent)}",
            remedy="install them: pip install 'orchestrate[demo]', or `make demo` in a clone",
            is_needed=True,
        )
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(name="demo's packages", state="ok", found=found, is_needed=True)


def check_compiler() -> Finding:
    """A C++ compiler, by compiling: megatron-core builds its sample index helper at the first start."""
    compiler = shutil.which("g++")
    remedy = "install it, e.g. `apt install g++`; on a cluster `module load gcc`"
    if compiler is None:
        return Finding(name="g++", state="missing", found="not on PATH", remedy=remedy, is_needed=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return int(std::vector<int>(1)[0]); }\n")
        built, output = _answer([compiler, "-std=c++17", str(source), "-o", str(source.with_suffix(""))], 60)
    if not built:
        return Finding(
            name="g++",
            state="broken",
            found=f"{compiler} cannot build a program: {output}",
            remedy=remedy,
            is_needed=True,
        )
    _, version = _answer([compiler, "-dumpfullversion"])
    return Finding(name="g++", state="ok", found=f"{version}, {compiler}", is_needed=True)


def check_runs_folder(runs: Path) -> Finding:
    """The folder of the runs, or where it would be made: writable, with room."""
    parent = _nearest_existing(runs)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        return Finding(
            name="runs folder",
            state="broken",
            found=f"{runs} cannot be written: {error}",
            remedy="set paths.runs to a folder of yours in ./conf/defaults.yaml, or mend its rights",
            is_needed=True,
        )
    found = f"{runs}, {format_bytes(free_bytes)} free" + ("" if runs.exists() else ", made at the first run")
    if free_bytes < SMALLEST_FREE_BYTES:
        return Finding(
            name="runs folder",
            state="broken",
            found=found,
            remedy=f"free at least {format_bytes(SMALLEST_FREE_BYTES)}, or set paths.runs to a larger disk",
            is_needed=True,
        )
    return Finding(name="runs folder", state="ok", found=found, is_needed=True)


def check_mlflow() -> Finding:
    """MLflow, the library."""
    answer, problem = _probe("import mlflow, mlflow.store.tracking.sqlalchemy_store; answer = mlflow.__version__")
    if problem:
        return _not_importable("MLflow", "mlflow", problem)
    return Finding(name="MLflow", state="ok", found=str(answer), is_needed=True)


def check_store(uri: str) -> Finding:
    """MLflow's store: a SQLite file that can be written, or a server that answers."""
    from orchestrator.tracking_store import sqlite_path, store_problem, without_password

    shown = without_password(uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        # Nothing is made here by looking; only whether it could be.
        folder = _nearest_existing(path.parent)
        problem = "" if os.access(folder, os.W_OK) and folder.is_dir() else f"{folder} cannot be written"
        shown += ", made at the first run"
    else:
        problem = store_problem(uri)
    if problem:
        return Finding(
            name="tracking store",
            state="broken",
            found=f"{shown}: {problem}",
            remedy="mend the file or the server, or set tracking.uri to another store",
            is_needed=True,
        )
    return Finding(name="tracking store", state="ok", found=shown, is_needed=True)


def check_submitit() -> Finding:
    """Submitit: one private function of it is used, so that its version matters."""
    version = installed_version("submitit")
    if version is None:
        return _not_importable("Submitit", "submitit", "not installed")
    _, problem = _probe("import submitit; submitit.LocalExecutor._submit_command; answer = True")
    if problem:
        return _not_importable("Submitit", "submitit", problem)
    return Finding(name="Submitit", state="ok", found=version, is_needed=True)


def check_slurm() -> Finding:
    """Slurm's commands, and whether its controller answers."""
    commands = ("sbatch", "srun", "squeue", "sinfo")
    absent = [name for name in commands if shutil.which(name) is None]
    if len(absent) == len(commands):
        return Finding(
            name="Slurm",
            state="missing",
            found="no sbatch, srun, squeue, sinfo on PATH; runs start as processes of this machine",
            remedy="for a cluster, work on its login node or load its Slurm module",
        )
    if absent:
        return Finding(
            name="Slurm",
            state="broken",
            found=f"not on PATH: {', '.join(absent)}",
            remedy="load the cluster's Slurm module, or put Slurm's bin folder on PATH",
        )
    answers, output = _answer(["sinfo", "--noheader", "--format=%P %D"])
    if not answers:
        return Finding(
            name="Slurm",
            state="broken",
            found=f"the controller does not answer: {output}",
            remedy="try `scontrol ping`; if that fails too, ask the cluster's administrators",
        )
    partitions = ", ".join(f"{line.split()[0]} {line.split()[1]}" for line in output.splitlines() if " " in line)
    _, version = _answer(["sbatch", "--version"])
    return Finding(name="Slurm", state="ok", found=f"{version}; nodes a partition: {partitions or 'none'}")


def check_gpus() -> Finding:
    """NVIDIA GPUs, and whether this PyTorch was built for them."""
    if shutil.which("nvidia-smi") is None:
        return Finding(
            name="GPUs",
            state="missing",
            found="no nvidia-smi: ranks run on the CPU, over gloo; right for the demo, tests and planning",
            remedy="train a 7B model on a machine or cluster with GPUs (cluster=h100)",
        )
    answers, output = _answer(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    if not answers or not output:
        return Finding(
            name="GPUs",
            state="broken",
            found=f"nvidia-smi fails: {output or 'it lists no GPU'}",
            remedy="mend the driver, or ask for a GPU from the scheduler (srun --gpus=1 ...)",
        )
    kinds = output.splitlines()
    found = "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    answer, problem = _probe("import torch; answer = [torch.version.cuda, torch.cuda.is_available()]")
    if problem or not answer[1]:
        reason = "is a CPU build" if not problem and answer[0] is None else "cannot use them"
        return Finding(
            name="GPUs",
            state="broken",
            found=f"{found}; but this PyTorch {reason}",
            remedy="install a CUDA build of torch that the driver supports",
        )
    return Finding(name="GPUs", state="ok", found=found)


def check_transformer_engine() -> Finding:
    """Transformer Engine: absent, whole, or half-installed; and whether its version belongs to the others'."""
    # Its core without the torch extension, or without CUDA, fails with other errors than ImportError.
    versions = library_versions(cuda_of_torch())
    problems, warnings = pair_problems(versions), pair_warnings(versions)
    found = versions.transformer_engine or "of unknown version"
    answer, problem = _probe("import transformer_engine.pytorch as te; answer = te.__name__")
    is_whole = not problem and bool(answer)
    if is_whole and not problems:
        return Finding(name=ENGINE, state="ok", found="; ".join([found, *warnings]))
    if not is_whole and versions.transformer_engine is None and _is_absent(problem, "transformer_engine"):
        return Finding(
            name=ENGINE,
            state="missing",
            found="not installed; only FP8 and its fused kernels on GPUs need it",
            remedy=f"on GPUs: {INSTALL}",
        )
    return Finding(
        name=ENGINE,
        state="broken",
        found=found if is_whole else f"{found} cannot be imported: {problem}",
        remedy="; ".join(problems) or f"{REMOVE}; on GPUs then {INSTALL}",
    )


def check_apex() -> Finding:
    """Apex: NVIDIA's, the unrelated package of the same name, or none."""
    answer, problem = _probe(
        "from orchestrator.gpu_libraries import apex_kind\n"
        "answer = apex_kind()\n"
        "if answer == 'genuine':\n"
        "    import torch, apex.optimizers, amp_C, importlib.util\n"
        f"    answer = bool(importlib.util.find_spec('{WEIGHT_GRADIENT_KERNEL}'))"
    )
    if problem:
        return Finding(
            name="Apex",
            state="broken",
            found=f"cannot be imported: {problem}",
            remedy="pip uninstall apex; nothing here needs it",
        )
    if answer == "unrelated":
        return Finding(
            name="Apex",
            state="broken",
            found="the package `apex` here is not NVIDIA's (no apex.optimizers, no amp_C)",
            remedy="pip uninstall apex; nothing here needs it",
        )
    if answer == "absent":
        return Finding(name="Apex", state="missing", found="not installed; nothing here needs it")
    use = (
        "the output layer's weight gradients on GPUs" if answer else "nothing, since it was built without CUDA kernels"
    )
    version = installed_version("apex") or "of unknown version"
    return Finding(name="Apex", state="ok", found=f"NVIDIA's, {version}; used for {use}")


def _not_importable(name: str, package: str, problem: str) -> Finding:
    is_installed = installed_version(package) is not None
    return Finding(
        name=name,
        state="broken" if is_installed else "missing",
        found=f"{installed_version(package)} cannot be imported: {problem}" if is_installed else "not installed",
        remedy=f"install it again: pip install --force-reinstall {package}, in the version of pyproject.toml"
        if is_installed
        else "install this project's requirements: pip install orchestrate, or `make demo` in a clone",
        is_needed=True,
    )


def _is_absent(problem: str, package: str) -> bool:
    return problem.startswith("ModuleNotFoundError") and f"'{package}" in problem


def _probe(code: str) -> tuple[Any, str]:
    """Run code that sets `answer` in a Python of its own.

    Returns:
        the answer, and what went wrong in one line or nothing.
    """
    program = (
        "import json, warnings; warnings.simplefilter('ignore')\n"
        f"{code}\n"
        "print('\\n' + json.dumps(answer), flush=True); import os; os._exit(0)"
    )
    succeeded, output = _answer([sys.executable, "-P", "-c", program], PROBE_SECONDS)
    last = output.splitlines()[-1] if output else "no output"
    if not succeeded:
        return None, last
    with contextlib.suppress(ValueError):
        return json.loads(last), ""
    return None, f"an answer that is none: {last}"


def _answer(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> tuple[bool, str]:
    """Run a command; return whether it succeeded, with its output or the last line of its errors."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    except OSError as error:
        return False, str(error)
    if result.returncode == 0:
        return True, result.stdout.strip()
    said = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return False, said[-1][:300] if said else f"ended with {result.returncode}"


def _nearest_existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def places_in_force() -> Places:
    """Return where the configuration puts runs and store.

    Raises:
        OrchestrateError: the configuration cannot be read.
    """
    from orchestrator.config import paths_in_force
    from orchestrator.tracking_store import default_store

    runs = Path(paths_in_force().runs)
    return Places(runs=runs, store=default_store(runs))
