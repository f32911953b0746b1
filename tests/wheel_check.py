"""Build the distributions from the checkout's own files, and use an installed wheel as a person would.

`make wheel-check` runs this file: sdist, wheel from the sdist, a clean environment with all
requirements, and real work from another folder. `tests/test_wheel.py` does the same at a lower cost.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SOLAR_PARAMETERS = 10_731_524_096


class WheelError(AssertionError):
    """The wheel lacks something, or a command of it failed."""


def copy_checkout(target: Path) -> Path:
    """Copy what git would track, links as links, so that no earlier build leaks into a new one."""
    listed = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = REPOSITORY / name
        if name and (source.is_symlink() or source.exists()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def run(command: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        WheelError: it failed; the end of what it said is in the message.
    """
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WheelError(
            f"`{' '.join(map(str, command))}` ended with {result.returncode}:\n{result.stdout[-2000:]}\n"
            f"{result.stderr[-4000:]}"
        )
    return result.stdout


def wheel_problems(wheel: Path) -> list[str]:
    """Return what is missing from a wheel or should not be in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("dist-info/entry_points.txt"))
        has_command = "orchestrate = " in archive.read(entry_points).decode()
    wanted = {"orchestrator/commands/main.py", "megatron_solar/train.py"}
    for folder, pattern in (("conf", "*/*.yaml"), ("slurm", "*.py"), ("tokenize", "*.py"), ("orchestrator", "*.py")):
        inside = "orchestrator" if folder == "orchestrator" else f"orchestrator/{folder}"
        wanted |= {f"{inside}/{path.relative_to(REPOSITORY / folder)}" for path in (REPOSITORY / folder).glob(pattern)}
    found = [f"{name} is missing" for name in sorted(wanted - names)]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found += [f"{top}/ should not be in it" for top in sorted(tops - {"orchestrator", "megatron_solar"})]
    if not any(name.startswith("orchestrator/tokenize/native_encoder.") and name.endswith(".so") for name in names):
        found.append("the compiled encoder is missing")
    if "orchestrator/tokenize/__init__.py" in names:
        found.append("orchestrator/tokenize/__init__.py should not be in it")
    if not any(name.endswith("dist-info/licenses/LICENSE") for name in names):
        found.append("LICENSE is missing")
    return found if has_command else [*found, "the command `orchestrate` is missing"]


def work_with(python: Path, folder: Path) -> list[str]:
    """Use an installed wheel from an empty folder with a home of its own: help, plan, tokenize, launch, status.

    Returns:
        a line for each command that worked.

    Raises:
        WheelError: one did not.
    """
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "HOME": str(home), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    told: list[str] = []

    def orchestrate(*arguments: str) -> str:
        started = time.monotonic()
        output = run([python.parent / "orchestrate", *arguments], work, environment)
        told.append(f"{time.monotonic() - started:5.1f} s  orchestrate {' '.join(arguments)}")
        return output

    where = run([python, "-c", "import orchestrator; print(orchestrator.__file__)"], work, environment).strip()
    if not Path(where).is_relative_to(python.parent.parent):
        raise WheelError(f"orchestrator was imported from {where}, not from {python.parent.parent}")
    if "launch" not in orchestrate("--help"):
        raise WheelError("the help names no commands")
    plan = json.loads(orchestrate("plan", "--json"))
    if plan["parameters"] != SOLAR_PARAMETERS:
        raise WheelError(f"the plan of solar-10.7b should count {SOLAR_PARAMETERS}, found {plan['parameters']}")

    text = Path(os.__file__).parent / "email"
    orchestrate("tokenize", str(text), "--tokenizer", str(vocabulary()), "--output", "data/train")
    overrides = ["name=from-a-wheel", "data.validation=[]", "training.tokens=2048"]
    orchestrate("launch", "demo-base", *overrides, "--wait")
    status = json.loads(orchestrate("status", "last", "--json"))
    found = (status["name"], status["state"], status["step"], status["total_steps"], status["attempts"])
    if found != ("from-a-wheel", "FINISHED", 2, 2, 1):
        raise WheelError(f"the run should have finished 2 of 2 steps in 1 attempt, found {found}")
    runs = home / "orchestrate" / "runs"
    if not (runs / "from-a-wheel" / "code" / "orchestrator" / "slurm" / "rank_client.py").exists():
        raise WheelError(f"the run in {runs} has no snapshot of the installed code")
    return told


def vocabulary() -> Path:
    """Return the 32k SentencePiece model of this environment's mistral-common."""
    import mistral_common

    return next(Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1"))


def main(first: Sequence[str]) -> None:
    """Check the distributions in a clean environment.

    Args:
        first: requirements to install before the wheel's own.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
        folder = Path(name)
        print("1/4 sdist, and the wheel from it", flush=True)
        source = copy_checkout(folder / "source")
        run([sys.executable, "-m", "build", "--outdir", folder / "dist", source], folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        problems = wheel_problems(wheel)
        if problems:
            raise WheelError(f"{wheel.name}: " + "; ".join(problems))
        print(f"2/4 a clean environment with {', '.join(first)}", flush=True)
        run([sys.executable, "-m", "venv", folder / "venv"], folder)
        python = folder / "venv" / "bin" / "python"
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
        ]
        run([*install, *first], folder)
        print(f"3/4 {wheel.name} with its requirements", flush=True)
        run([*install, str(wheel)], folder)
        run([python, "-m", "pip", "check"], folder)
        print("4/4 work from an empty folder, with a home of its own", flush=True)
        for line in work_with(python, folder):
            print(line, flush=True)
        print(f"{wheel.name} works")


if __name__ == "__main__":
    main(sys.argv[1:])
