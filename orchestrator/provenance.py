"""With what a run was started: the command, the code that its workers import, the versions of packages."""

import getpass
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import orchestrator
from orchestrator.packages import package_versions
from orchestrator.version import VERSION

CODE_PACKAGES = ("orchestrator", "megatron_solar")


def snapshot_code(target: Path) -> list[str]:
    """Copy this project's sources to a folder, so that a later edit never reaches the run.

    In a checkout the files that git tracks, as they are now; of an installed package all its sources.

    Returns:
        sources in the checkout that git does not track and that were left out.
    """
    root = Path(orchestrator.__file__).parent.parent
    left_out = []
    tracked = _tracked(root)
    for package in CODE_PACKAGES:
        for folder, _, names in os.walk(root / package, followlinks=True):
            for name in sorted(names):
                source = Path(folder) / name
                if source.suffix != ".py":
                    continue
                if tracked is not None and source.resolve() not in tracked:
                    left_out.append(str(source.relative_to(root)))
                    continue
                copy = target / source.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
    return sorted(left_out)


def provenance(command: str, **more: object) -> dict[str, object]:
    """Return who started what, when and with which versions; no environment, no secrets."""
    return {
        "token": secrets.token_hex(3),  # tells this run's jobs from those of another of the same name
        "command": command,
        "time": time.time(),
        "host": socket.gethostname(),
        "user": _user(),
        "folder": str(Path.cwd()),
        "orchestrate": VERSION,
        "git": _git_state(Path(orchestrator.__file__).parent.parent),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        **more,
    }


def upgrades_since(recorded: Mapping[str, object]) -> list[str]:
    """Return 'torch: 2.12.0 -> 2.13.0' for each package, Python and this project, that differs from a record.

    Args:
        recorded: what `provenance` returned at the first attempt.
    """
    packages = recorded.get("packages")
    before: dict[str, object] = dict(packages) if isinstance(packages, Mapping) else {}
    now: dict[str, object] = {**package_versions(), "orchestrate": VERSION, "python": sys.version.split()[0]}
    before |= {name: recorded.get(name) for name in ("orchestrate", "python")}
    return [
        f"{name}: {before.get(name) or 'none'} -> {version or 'none'}"
        for name, version in now.items()
        if before.get(name) != version
    ]


def _user() -> str:
    """Return the user's name, or the number where a container knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _tracked(root: Path) -> set[Path] | None:
    """Return the files that git tracks in a checkout, or None outside one."""
    if not _is_checkout(root):
        return None
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=False)
    return {(root / name).resolve() for name in listed.stdout.decode().split("\0") if name} or None


def _git_state(root: Path) -> dict[str, object] | None:
    """Return commit and whether files differ from it, or None outside a checkout."""
    if not _is_checkout(root):
        return None

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "is_changed": bool(git("status", "--porcelain"))}


def _is_checkout(root: Path) -> bool:
    return (root / ".git").exists() and shutil.which("git") is not None
