"""The wheel in an environment of its own; `make wheel-check` does the same with all requirements installed anew."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.wheel_check import copy_checkout, run, wheel_problems, work_with


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "source")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source], folder)
    (made,) = (folder / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_every_part_and_nothing_else(wheel: Path) -> None:
    assert wheel_problems(wheel) == []


def test_a_wheel_without_the_recipes_is_found_out(wheel: Path, tmp_path: Path) -> None:
    poorer = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(poorer, "w") as archive:
        for name in whole.namelist():
            if name != "orchestrator/conf/recipe/demo.yaml":
                archive.writestr(name, whole.read(name))
    assert wheel_problems(poorer) == ["orchestrator/conf/recipe/demo.yaml is missing"]


def test_without_a_compiler_the_wheel_is_built_and_lacks_the_encoder_alone(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    run(command, tmp_path, {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"})
    (made,) = (tmp_path / "dist").glob("*.whl")
    assert wheel_problems(made) == ["the compiled encoder is missing"]


def test_the_installed_wheel_plans_tokenizes_and_trains_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    # Requirements come from the development environment. A .pth file in there is not read by this
    # one, so that the editable install stays out of sight.
    packages = next((environment / "lib").iterdir()) / "site-packages"
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel)], tmp_path)

    assert len(work_with(python, tmp_path)) == 5
