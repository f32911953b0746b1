"""Versions that belong together: what is refused, what is only told, and that the documents and pyproject say the same.

No Transformer Engine is installed where these tests run. What stands for it in them has its packages' names and
versions, and raises what the real one raises: its wheels 2.11.0 were tried by hand beside a CPU build of torch
(RuntimeError: 'Found empty `transformer-engine` meta package installed', and with its core 'cudnn shared object not
found.'). A whole one was never imported here.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from orchestrator import exit_codes
from orchestrator.doctor import check_transformer_engine
from orchestrator.gpu_libraries import cuda_of_torch, library_versions
from orchestrator.library_pairs import (
    PAIRS,
    TRANSFORMER_ENGINE,
    LibraryVersions,
    pair_problems,
    pair_warnings,
    versions_table,
)
from orchestrator.plan import write_plan
from orchestrator.settings import PrecisionSettings
from tests.conftest import REPOSITORY, Trainer

CORE_13 = (("transformer-engine-cu13", "2.11.0"),)
WHOLE = LibraryVersions(
    megatron_core="0.16.1", transformer_engine="2.11.0", transformer_engine_cores=CORE_13,
    transformer_engine_torch="2.11.0", torch="2.11.0+cu130", cuda="13.0",
)  # fmt: skip


def changed(**changes: object) -> LibraryVersions:
    return LibraryVersions(**{**WHOLE.__dict__, **changes})  # type: ignore[arg-type]


NO_ENGINE = changed(transformer_engine=None, transformer_engine_cores=(), transformer_engine_torch=None)
OF_AN_IMAGE = changed(transformer_engine="2.9.0+70f53666", transformer_engine_cores=(), transformer_engine_torch=None)
"""NVIDIA's images build all of it as one package."""


@pytest.mark.parametrize(
    "versions",
    [WHOLE, NO_ENGINE, OF_AN_IMAGE, changed(cuda="13.1"), LibraryVersions()],
    ids=["pip", "without Transformer Engine", "an image", "a newer CUDA 13", "nothing"],
)
def test_what_belongs_together_is_neither_refused_nor_told(versions: LibraryVersions) -> None:
    assert pair_problems(versions) == []
    assert pair_warnings(versions) == []


@pytest.mark.parametrize(
    ("versions", "messages"),
    [
        pytest.param(
            changed(transformer_engine_torch="2.12.0"),
            ["of different versions (transformer-engine 2.11.0, transformer-engine-cu13 2.11.0, "
             "transformer-engine-torch 2.12.0)"],
            id="an extension of another version",
        ),
        pytest.param(
            changed(transformer_engine_cores=(("transformer-engine-cu13", "2.10.0"),)),
            ["of different versions"],
            id="a core of another version",
        ),
        pytest.param(
            changed(transformer_engine_torch=None),
            ["no extension for torch", "--no-build-isolation transformer-engine-torch==2.11.0"],
            id="the second step forgotten",
        ),
        pytest.param(changed(transformer_engine_cores=()), ["has no core"], id="no core"),
        pytest.param(changed(transformer_engine=None), ["no transformer-engine package"], id="no meta package"),
        pytest.param(
            changed(transformer_engine_cores=(("transformer-engine-cu12", "2.11.0"), *CORE_13), cuda=None),
            ["two cores", "a CPU build"],
            id="two cores beside a CPU build",
        ),
        pytest.param(
            changed(cuda="12.8"), ["for CUDA 13 and torch 2.11.0+cu130 for CUDA 12.8", "[core_cu12]"], id="CUDA 12"
        ),
        pytest.param(changed(torch="2.11.0+cpu", cuda=None), ["2.11.0+cpu is a CPU build"], id="a CPU build"),
        pytest.param(
            changed(
                transformer_engine="1.13.0", transformer_engine_cores=(("transformer-engine-cu13", "1.13.0"),),
                transformer_engine_torch="1.13.0",
            ),
            ["sequence parallelism wrongly"],
            id="a fault of 1.13",
        ),
        pytest.param(changed(megatron_core="0.19.0"), ["megatron-core 0.19.0", "megatron-core==0.16.1"], id="megatron"),
    ],
)  # fmt: skip
def test_what_is_known_to_fail_is_refused_with_its_remedy(versions: LibraryVersions, messages: list[str]) -> None:
    told = "\n".join(pair_problems(versions))
    assert all(message in told for message in messages), told
    assert all("pip " in problem or "install " in problem for problem in pair_problems(versions))


@pytest.mark.parametrize("engine", ["2.8.0", "2.13.0", "2.14.1+abc"])
def test_a_pair_that_upstream_does_not_test_is_told_and_not_refused(engine: str) -> None:
    versions = changed(transformer_engine=engine, transformer_engine_cores=(), transformer_engine_torch=None)
    assert pair_problems(versions) == []
    assert pair_warnings(versions) == [
        f"megatron-core 0.16.1 with Transformer Engine {engine} is no pair that upstream tests: 2.11 or 2.9–2.12 or "
        "2.12"
    ]


def test_documents_and_pyproject_name_the_same_versions() -> None:
    """A figure that is changed in one place is changed in all, or this fails."""
    document = (REPOSITORY / "docs" / "clusters.md").read_text()
    assert versions_table() in document
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["optional-dependencies"]["gpu"] == [f"transformer-engine[core_cu13]=={TRANSFORMER_ENGINE}"]
    pinned = next(line for line in project["dependencies"] if line.startswith("megatron-core"))
    assert pinned in document
    assert f"--no-build-isolation transformer-engine-torch=={TRANSFORMER_ENGINE}" in document
    by_pip = next(pair for pair in PAIRS if pair.where.startswith("pip"))
    assert f"torch=={by_pip.torch}" in document
    assert set(re.findall(r"transformer-engine\S*==(\d\S*?)['`\s]", document)) == {TRANSFORMER_ENGINE}
    assert pair_warnings(changed(transformer_engine=TRANSFORMER_ENGINE)) == []


# What is installed.


def add_distribution(folder: Path, name: str, version: str) -> None:
    """Write what importlib.metadata reads of an installed package."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def half_installed(folder: Path) -> Path:
    """Write a stand-in of Transformer Engine's meta package and core, as they are without the second step."""
    for name in ("transformer-engine", "transformer-engine-cu13"):
        add_distribution(folder, name, "2.11.0")
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('cudnn shared object not found.')")
    return folder


def test_versions_are_read_without_importing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(half_installed(tmp_path))
    found = library_versions("13.0")
    assert (found.megatron_core, found.torch, found.cuda) == ("0.16.1", torch.__version__, "13.0")
    assert (found.transformer_engine, found.transformer_engine_cores) == ("2.11.0", CORE_13)
    assert found.transformer_engine_torch is None
    assert cuda_of_torch() == torch.version.cuda
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemError('not imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    monkeypatch.delitem(sys.modules, "torch")
    assert cuda_of_torch() == "13.0"


def test_the_doctor_says_which_part_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_installed(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_transformer_engine()
    assert finding.state == "broken"
    assert "RuntimeError: cudnn shared object not found." in finding.found
    assert "no extension for torch" in finding.remedy


@pytest.mark.parametrize(
    ("precision", "is_there", "messages"),
    [
        pytest.param(
            PrecisionSettings(), True,
            ["transformer-engine-cu13 2.11.0", "pip install --no-build-isolation transformer-engine-torch==2.11.0"],
            id="half installed",
        ),
        pytest.param(
            PrecisionSettings(fp8="tensorwise"), False,
            ["precision.fp8=tensorwise needs Transformer Engine, which is not installed", "pip install"],
            id="FP8 without it",
        ),
    ],
)  # fmt: skip
def test_a_rank_whose_libraries_do_not_fit_ends_before_megatron_with_the_code_of_a_bad_configuration(
    precision: PrecisionSettings, is_there: bool, messages: list[str], trainer: Trainer, tmp_path: Path
) -> None:
    """A rank for a GPU that this machine does not have; it gets no further than its libraries."""
    run, plan = trainer.make_run(steps=4)
    cluster = dataclasses.replace(plan.settings.cluster, device="cuda")
    settings = dataclasses.replace(plan.settings, cluster=cluster, precision=precision)
    attempt = run.new_attempt()
    write_plan(attempt.plan, dataclasses.replace(plan, settings=settings))
    path = os.pathsep.join([str(REPOSITORY), *([str(half_installed(tmp_path))] if is_there else [])])
    result = subprocess.run(
        [sys.executable, "-P", "-m", "megatron_solar.worker", str(run.path), str(attempt.number), "--rank", "0"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == exit_codes.BAD_CONFIG, result.stderr
    failures = [json.loads(path.read_text()) for path in (attempt.path / "failures").iterdir()]
    assert [failure["error"] for failure in failures] == ["ConfigError"]
    assert all(message in failures[0]["message"] for message in messages), failures[0]["message"]
    assert "megatron/core" not in failures[0]["traceback"]
