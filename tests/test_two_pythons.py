"""The login environment's Python launches and supervises, another one trains: they share the run's folder alone."""

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.config import compose
from orchestrator.files import read_json
from orchestrator.plan import make_plan, write_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm import sandbox
from orchestrator.slurm.sandbox import Sandbox
from tests.conftest import REPOSITORY, SMALL
from tests.test_slurm_launch import pytestmark

__all__ = ["pytestmark"]
NAME = f"pythons-{os.getpid()}"
NEEDS = ("click", "omegaconf", "psutil", "rich", "submitit", "numpy")
"""What launching and supervising import; no torch, no megatron-core, no MLflow."""


def other_pythons() -> Iterator[Path]:
    """Yield interpreters of other versions than this one, on PATH and where pyenv keeps them."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # HOME may be another one
    folders = [*map(Path, os.environ["PATH"].split(":")), *sorted(home.glob(".pyenv/versions/*/bin"))]
    for version in ("3.12", "3.13", "3.11"):
        if version != f"{sys.version_info.major}.{sys.version_info.minor}":
            yield from (folder / f"python{version}" for folder in folders if (folder / f"python{version}").exists())


@pytest.fixture(scope="module")
def login_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has what a login node needs, of another version than this one."""
    folder = tmp_path_factory.mktemp("login")
    for python in other_pythons():
        if subprocess.run([python, "-m", "venv", folder / "venv"], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("a second Python, 3.12 or 3.13, is not here")
    made = folder / "venv" / "bin" / "python"
    subprocess.run([made, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *NEEDS], check=True)
    return made


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    started = sandbox.start(NAME, nodes=2)
    monkeypatch.setenv("SLURM_CONF", str(started.slurm_conf))
    yield started
    sandbox.stop(NAME)


def version_of(python: Path | str) -> str:
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]


def test_a_run_is_launched_and_supervised_by_one_python_and_trained_by_another(
    cluster: Sandbox, login_python: Path, tmp_path: Path, corpus: Path
) -> None:
    assert version_of(login_python).split(".")[:2] != [str(part) for part in sys.version_info[:2]]
    settings = compose(
        "demo-base",
        [
            *SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}",
            f"paths.runs={tmp_path / 'runs'}", "name=two-pythons", "cluster=sandbox", "cluster.nodes=2",
            "training.tokens=640", "cluster.fork_ranks=false", f"cluster.worker_python={sys.executable}",
            "cluster.slurm.pre_command=[sh, -c, 'readlink -f $0 > $SLURMD_NODENAME.python; exec \"$0\" \"$@\"']",
        ],
    )  # fmt: skip
    plan = tmp_path / "plan.json"
    write_plan(plan, make_plan(settings))
    code = (
        "import sys; from pathlib import Path; from orchestrator.launch import launch; "
        "from orchestrator.plan import read_plan; from orchestrator.follow import follow; "
        "follow(launch(read_plan(Path(sys.argv[1])), 'a test'), interval_seconds=0.5); "
        "heavy = {'torch', 'megatron', 'mlflow'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    launched = subprocess.run(
        [login_python, "-P", "-c", code, plan],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(tmp_path / "runs" / "two-pythons")
    assert complete_checkpoints(run)[-1].step == 5
    script = next(run.jobs.glob("*.sh")).read_text()
    assert f"exec {login_python} -P -m orchestrator.slurm.supervisor" in script
    workers = {path.read_text().strip() for path in run.path.glob("*.python")}
    assert workers == {str(Path(sys.executable).resolve())}
    login, workers_own = read_json(run.provenance), read_json(run.attempt(1).worker_versions)
    assert (login["python"], login["packages"]["torch"]) == (version_of(login_python), None)
    assert (workers_own["python"], workers_own["packages"]["megatron-core"]) == (version_of(sys.executable), "0.16.1")
    assert "mlflow" in (run.attempt(1).logs / "tracking.log").read_text(), "tracking fails aloud, and training goes on"
