"""The CPU substitute: each patch taken away in turn must break training, or it is no longer needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_solar.cpu import PATCHES, cuda_calls_on_cpu
from tests.conftest import REPOSITORY

# They save memory and time when many ranks start on one machine; nothing breaks without them.
CONVENIENCE = {"compile", "one_group_per_list"}


def test_the_substitute_leaves_torch_as_it_was() -> None:
    before = [getattr(patch.owner, patch.attribute) for patch in PATCHES]
    with cuda_calls_on_cpu():
        inside = [getattr(patch.owner, patch.attribute) for patch in PATCHES]
    assert not any(new is old for new, old in zip(inside, before, strict=True))
    assert [getattr(patch.owner, patch.attribute) for patch in PATCHES] == before


def test_training_breaks_without_each_patch_and_runs_with_all_of_them(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.cpu_shim_trial", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=True,
    )
    broke_with = json.loads(result.stdout.splitlines()[-1])
    assert broke_with.pop("") == "", "training must run with all patches"
    assert {name for name, error in broke_with.items() if not error} == CONVENIENCE, "these can go"
