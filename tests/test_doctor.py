"""The doctor's checks, each with the thing broken for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import doctor
from orchestrator.doctor import Finding, can_demo, render

COMMAND = [sys.executable, "-P", "-m", "orchestrator.commands.main", "doctor"]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Python packages that come before the installed ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; empty."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add_package(folder: Path, name: str, code: str = "") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def add_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def examine_in(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_that_can_run_the_demo_is_told_so_with_exit_code_0(tmp_path: Path) -> None:
    result = examine_in(tmp_path, "--json")
    assert result.returncode == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["can_demo"]
    by_name = {check["name"]: check for check in report["checks"]}
    assert all(check["state"] == "ok" for check in report["checks"] if check["is_needed"])
    assert by_name["megatron-core"]["found"] == "0.16.1"
    assert by_name["Python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert str(tmp_path) in by_name["runs folder"]["found"]
    assert all(check["remedy"] for check in report["checks"] if check["state"] == "broken")
    assert not (tmp_path / "orchestrate").exists(), "looking makes nothing"


def test_without_a_compiler_on_path_the_screen_says_so_with_exit_code_1(tmp_path: Path, programs: Path) -> None:
    result = examine_in(tmp_path)
    assert result.returncode == 1
    assert "to mend: g++" in result.stdout
    assert "no sbatch, srun, squeue, sinfo on PATH" in result.stdout
    assert "no nvidia-smi" in result.stdout
    wide = [line for line in result.stdout.splitlines() if len(line) > 100]
    assert all(str(tmp_path) in line for line in wide), "only a path, which has no place to break, may be wider"
    assert "Traceback" not in result.stderr


def test_a_compiler_that_cannot_build_is_broken(programs: Path) -> None:
    add_program(programs, "g++", "echo 'cannot execute cc1plus' >&2; exit 1")
    finding = doctor.check_compiler()
    assert finding.state == "broken"
    assert "cannot execute cc1plus" in finding.found


def test_the_unrelated_apex_is_told_from_nvidias_and_hinders_nothing(stand_ins: Path) -> None:
    assert doctor.check_apex().state == "missing"
    add_package(stand_ins, "apex", "raise SystemError('a web toolkit, whose import is not even tried')")
    finding = doctor.check_apex()
    assert finding.state == "broken"
    assert "not NVIDIA's" in finding.found
    assert not finding.is_needed


def test_an_apex_with_its_optimizers_and_kernels_is_genuine(stand_ins: Path) -> None:
    add_package(stand_ins, "apex")
    add_package(stand_ins / "apex", "optimizers")
    add_package(stand_ins, "amp_C")
    assert doctor.check_apex().state == "ok"
    (stand_ins / "amp_C" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    finding = doctor.check_apex()
    assert finding.state == "broken"
    assert "undefined symbol" in finding.found


def test_a_half_installed_transformer_engine_breaks_megatron_and_both_are_named(stand_ins: Path) -> None:
    assert doctor.check_transformer_engine().state == "missing"
    add_package(stand_ins, "transformer_engine", "raise RuntimeError('no CUDA libraries')")
    finding = doctor.check_transformer_engine()
    assert finding.state == "broken"
    assert "RuntimeError: no CUDA libraries" in finding.found
    megatron = doctor.check_megatron()
    assert megatron.state == "broken"
    assert "no CUDA libraries" in megatron.found
    assert not can_demo([megatron])


def test_a_library_that_kills_its_process_is_a_finding(stand_ins: Path) -> None:
    add_package(stand_ins, "torch", "import os; os.abort()")
    finding = doctor.check_torch()
    assert finding.state == "broken"
    assert "-6" in finding.found


@pytest.mark.parametrize(("package", "check"), [("mlflow", doctor.check_mlflow), ("submitit", doctor.check_submitit)])
def test_a_library_that_cannot_be_imported_is_broken(stand_ins: Path, package: str, check: object) -> None:
    add_package(stand_ins, package, "import a_part_that_is_gone")
    assert callable(check)
    finding = check()
    assert finding.state == "broken"
    assert "a_part_that_is_gone" in finding.found


def test_slurm_with_a_command_missing_or_a_silent_controller_is_broken(programs: Path) -> None:
    assert doctor.check_slurm().state == "missing"
    add_program(programs, "sbatch", "echo slurm 23.11.4")
    finding = doctor.check_slurm()
    assert (finding.state, finding.found) == ("broken", "not on PATH: srun, squeue, sinfo")
    add_program(programs, "srun", "")
    add_program(programs, "squeue", "")
    add_program(programs, "sinfo", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    finding = doctor.check_slurm()
    assert finding.state == "broken"
    assert "Unable to contact slurm controller" in finding.found
    add_program(programs, "sinfo", "echo 'h100* 32'")
    finding = doctor.check_slurm()
    assert (finding.state, finding.found) == ("ok", "slurm 23.11.4; nodes a partition: h100* 32")


def test_a_driver_that_fails_and_a_torch_without_cuda_are_broken(programs: Path, stand_ins: Path) -> None:
    assert doctor.check_gpus().state == "missing"
    add_program(programs, "nvidia-smi", "echo 'Driver/library version mismatch'; exit 18")
    finding = doctor.check_gpus()
    assert finding.state == "broken"
    assert "version mismatch" in finding.found
    line = "NVIDIA H100 80GB HBM3, 81559 MiB, 570.86"
    add_program(programs, "nvidia-smi", f"echo '{line}'; echo '{line}'")
    add_package(stand_ins, "torch", "class version: cuda = None\nclass cuda: is_available = lambda: False")
    finding = doctor.check_gpus()
    assert finding.state == "broken"
    assert finding.found == f"2 x {line}; but this PyTorch is a CPU build"


def test_a_runs_folder_that_cannot_be_made_is_broken(tmp_path: Path) -> None:
    assert doctor.check_runs_folder(tmp_path / "a" / "b").state == "ok"
    (tmp_path / "file").write_text("")
    finding = doctor.check_runs_folder(tmp_path / "file")
    assert finding.state == "broken"
    assert "paths.runs" in finding.remedy


def test_a_store_that_is_no_database_and_a_server_that_is_away_are_broken(tmp_path: Path) -> None:
    assert doctor.check_store(f"sqlite:///{tmp_path}/new/mlflow.db").state == "ok"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("no database, and longer than the header of one" * 10)
    for uri in (
        f"sqlite:///{tmp_path}/file",
        f"sqlite:///{tmp_path}/file/mlflow.db",
        "http://me:hush@127.0.0.1:9",
    ):
        finding = doctor.check_store(uri)
        assert finding.state == "broken", uri
        assert "hush" not in finding.found


def test_the_screen_has_a_row_a_check_with_its_remedy_below() -> None:
    findings = [
        Finding(name="Python", state="ok", found="3.11.7", is_needed=True),
        Finding(name="g++", state="missing", found="not on PATH", remedy="install it", is_needed=True),
        Finding(name="Apex", state="missing", found="not installed; nothing here needs it"),
    ]
    assert render(findings).splitlines() == [
        "Python  ok       3.11.7",
        "g++     missing  not on PATH",
        "                 -> install it",
        "Apex    missing  not installed; nothing here needs it",
        "",
        "`orchestrate demo` cannot work here yet; to mend: g++",
    ]
    assert can_demo([findings[0], findings[2]])
    assert render([findings[0], findings[2]]).endswith("`orchestrate demo` can work here.")
