"""Rules of the repository that no type checker sees: links, directions of imports, what may be loaded when."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from orchestrator.commands.main import COMMANDS
from orchestrator.version import VERSION
from tests.conftest import REPOSITORY

LINKS = {"conf": "../conf", "slurm": "../slurm", "tokenize": "../tokenize"}
PACKAGES = ("orchestrator", "megatron_solar")

# The drawing in docs/architecture.md, the lowest first; a name stands for what lies under it as well.
# A module imports from its own layer and from those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "orchestrator",
        "orchestrator.errors",
        "orchestrator.exit_codes",
        "orchestrator.files",
        "orchestrator.gpu_libraries",
        "orchestrator.library_pairs",
        "orchestrator.packages",
        "orchestrator.units",
        "orchestrator.values",
        "orchestrator.version",
    ),
    (
        "orchestrator.model_shape",
        "orchestrator.layout",
        "orchestrator.settings",
        "orchestrator.freezing",
        "orchestrator.schedule",
    ),
    (
        "orchestrator.run_directory",
        "orchestrator.events",
        "orchestrator.checkpoints",
        "orchestrator.tokenize.hugging_face",
        "orchestrator.tokenize.manifest",
    ),
    (
        "orchestrator.changes",
        "orchestrator.checks",
        "orchestrator.doubts",
        "orchestrator.fp8_rules",
        "orchestrator.gpu_environment",
        "orchestrator.ledger",
        "orchestrator.plan",
        "orchestrator.recovery",
        "orchestrator.reconcile",
        "orchestrator.rehearsal",
        "orchestrator.remedies",
        "orchestrator.phases",
        "orchestrator.repeats",
        "orchestrator.retention",
        "orchestrator.schedule_checks",
        "orchestrator.schedule_table",
        "orchestrator.spikes",
        "orchestrator.traced_steps",
    ),
    ("megatron_solar",),
    (
        "orchestrator.attempt_record",
        "orchestrator.checkpoint_keeper",
        "orchestrator.config",
        "orchestrator.data_ledger",
        "orchestrator.demo",
        "orchestrator.doctor",
        "orchestrator.follow",
        "orchestrator.launch",
        "orchestrator.named_layers",
        "orchestrator.owner_lock",
        "orchestrator.pictures",
        "orchestrator.processes",
        "orchestrator.progress",
        "orchestrator.provenance",
        "orchestrator.rehearsal_inputs",
        "orchestrator.rehearsal_report",
        "orchestrator.rehearsal_run",
        "orchestrator.resume",
        "orchestrator.screen",
        "orchestrator.shipment",
        "orchestrator.slurm",
        "orchestrator.status",
        "orchestrator.step_documents",
        "orchestrator.tokenize",
        "orchestrator.tracking",
        "orchestrator.tracking_store",
        "orchestrator.verify",
        "orchestrator.why",
    ),
    ("orchestrator.commands",),
)

OWNERS = {
    "torch": ("megatron_solar.",),
    "safetensors": ("megatron_solar.",),
    "transformers": ("megatron_solar.verify",),
    "megatron": ("megatron_solar.compat",),
    "mlflow": ("orchestrator.tracking_store",),
    "submitit": ("orchestrator.slurm.submission",),
    "omegaconf": ("orchestrator.config",),
    "click": ("orchestrator.commands.",),
}
WORKERS_MAY_IMPORT = {"torch", "numpy", "safetensors", "megatron"}
HEAVY = {"torch", "megatron", "mlflow", "submitit", "omegaconf", "numpy", "matplotlib", "transformers"}


def module_files() -> dict[str, Path]:
    """Every module of the two packages by its name; the links are followed."""
    found = {}
    for package in PACKAGES:
        for folder, _, names in os.walk(REPOSITORY / package, followlinks=True):
            for name in names:
                if name.endswith((".py", ".pyi")):  # of a compiled module there is the second
                    path = Path(folder) / name
                    parts = path.relative_to(REPOSITORY).with_suffix("").parts
                    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """What each module imports, at its top or inside a function: modules of ours, and others by full name."""
    files = module_files()
    return {name: frozenset(_imports_of(path, files)) for name, path in files.items()}


def _imports_of(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in files else node.module


def top(name: str) -> str:
    return name.split(".")[0]


def is_external(name: str) -> bool:
    return top(name) not in PACKAGES and top(name) not in sys.stdlib_module_names


def layer_of(module: str) -> int:
    """The layer of the longest name in the table that a module is or lies under."""
    candidates = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "orchestrator" and module.startswith(f"{name}."))
    ]
    assert candidates, f"{module} is in no layer; give it one here and in docs/architecture.md"
    return max(candidates)[1]


def reachable(*starts: str) -> set[str]:
    """The modules of ours that some modules import, directly or not."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in imports()[name] if top(other) in PACKAGES]
    return found


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True)
    return listed.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", LINKS)
def test_the_folders_are_reached_through_relative_links_that_git_tracks(name: str) -> None:
    link = REPOSITORY / "orchestrator" / name
    assert link.readlink() == Path(LINKS[name])
    entry = subprocess.run(
        ["git", "ls-files", "--stage", f"orchestrator/{name}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert entry.startswith("120000 "), entry


def test_the_folder_tokenize_has_no_init_that_would_hide_the_standard_library() -> None:
    assert not (REPOSITORY / "tokenize" / "__init__.py").exists()


def test_modules_are_found_through_the_links() -> None:
    """Guards the tests below: an empty walk would pass them."""
    names = module_files().keys()
    assert {"orchestrator.slurm.supervisor", "orchestrator.tokenize.stage", "megatron_solar.train"} <= names
    assert len(names) > 60
    assert "submitit" in imports()["orchestrator.slurm.submission"]  # an import inside a function


def test_every_module_has_a_layer() -> None:
    assert min(map(layer_of, module_files())) == 0


def test_imports_point_to_the_own_layer_or_a_lower_one() -> None:
    upward = [
        f"{module} (layer {layer_of(module)}) imports {other} (layer {layer_of(other)})"
        for module, others in imports().items()
        for other in others
        if top(other) in PACKAGES and layer_of(other) > layer_of(module)
    ]
    assert upward == []


def test_no_module_imports_itself_through_others() -> None:
    circles = [
        name
        for name, others in imports().items()
        if name in reachable(*(other for other in others if top(other) in PACKAGES))
    ]
    assert circles == []


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_is_imported_by_its_owner_only(library: str) -> None:
    importers = {module for module, others in imports().items() if library in map(top, others)}
    assert importers, f"nothing imports {library}; take it out of the table"
    assert {module for module in importers if not module.startswith(OWNERS[library])} == set()


def test_workers_import_only_what_a_container_with_torch_and_megatron_has() -> None:
    modules = reachable("megatron_solar.worker", "megatron_solar.train", "megatron_solar.preload")
    assert "orchestrator.plan" in modules
    needed = {f"{module} imports {other}" for module in modules for other in imports()[module] if is_external(other)}
    assert {line for line in needed if top(line.split(" imports ")[1]) not in WORKERS_MAY_IMPORT} == set()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from orchestrator.commands.main import group\n"
        "group(sys.argv[1:], standalone_mode=False)\n"
        "import json\n"
        "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert "orchestrator" in loaded
    assert loaded & HEAVY == set()


def test_a_rank_that_fails_in_the_repository_root_shows_a_traceback_with_source_lines() -> None:
    """The folder tokenize/ lies on sys.path there; traceback reads sources through the standard library's tokenize."""
    result = subprocess.run(
        [sys.executable, "-m", "megatron_solar.worker", "/nonexistent", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode not in (0, 75)
    assert "Traceback (most recent call last):" in result.stderr
    assert re.search(r"worker\.py\", line \d+, in main\n +plan = read_plan\(attempt\.plan\)\n", result.stderr), (
        result.stderr
    )
    assert "/nonexistent/attempts/0001/plan.json" in result.stderr


def test_no_file_holds_the_address_of_a_package_index_or_a_path_of_a_machine() -> None:
    # Written apart, so that this file does not hold them.
    parts = ["pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "--index" + "-url"]
    parts += ["extra-index" + "-url", "--find" + "-links", "/home/" + r"[a-z]+/"]
    parts += [re.escape(str(REPOSITORY)) + "/"]
    unwanted = re.compile("|".join(parts))
    texts = {
        name: (REPOSITORY / name).read_text(encoding="utf-8")
        for name in tracked_files()
        if (REPOSITORY / name).is_file() and not (REPOSITORY / name).is_symlink()
    }
    assert len(texts) > 60
    assert unwanted.search("https://pypi" + ".org/simple")
    assert {name: found[0] for name, text in texts.items() if (found := unwanted.search(text))} == {}


def test_the_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("orchestrate") == VERSION
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == VERSION
