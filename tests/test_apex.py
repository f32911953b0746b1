"""Apex changes no result on the CPU, whichever is there, and on GPUs only one kernel of the genuine one is chosen.

What stands for a package here has its shape and no more: the real Apex of NVIDIA was never imported, nor was its
kernel ever run. The unrelated package of the Python index imports a web framework first; a stand-in that can be
imported is the worse of the two, since megatron-core then takes its norm for Apex's.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_solar.apex_choice import HIDDEN, choose_apex, weight_gradient_fusion
from orchestrator.gpu_libraries import WEIGHT_GRADIENT_KERNEL as KERNEL
from orchestrator.gpu_libraries import apex_kind
from orchestrator.plan import write_plan
from orchestrator.run_directory import AttemptDirectory
from tests.conftest import REPOSITORY, Trainer, losses

STEPS = 4
USED = "raise RuntimeError('used, and it must not be')\n"
IN_USE = (
    f"def call(*_, **__): {USED}\ndef __getattr__(name):\n    if name.startswith('__'): raise AttributeError(name)\n"
)
IN_USE += "    return call\n"
"""Of a module that can be imported, and of which whatever is taken fails where it is called."""


def write_packages(folder: Path, modules: dict[str, str]) -> Path:
    for name, code in modules.items():
        file = folder.joinpath(*name.split(".")) / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        for above in itertools.takewhile(lambda path: path != folder, file.parent.parents):
            (above / "__init__.py").touch()
        file.write_text(code)
    return folder


GENUINE = {
    "apex": "",
    "apex.optimizers": IN_USE,
    "apex.multi_tensor_apply": IN_USE,
    "apex.normalization.fused_layer_norm": IN_USE,
    "apex.contrib.layer_norm.layer_norm": IN_USE,
    "amp_C": IN_USE,
    KERNEL: IN_USE,
}
STAND_INS = {
    "none": {},
    "unrelated": {"apex": "", "apex.forms": "", "apex.lib.libapex": ""},
    "genuine": GENUINE,
    "genuine without its kernel": {name: code for name, code in GENUINE.items() if name != KERNEL},
    "broken": {**GENUINE, "apex": "raise RuntimeError('libcudart.so.12: no such file')"},
}
KINDS = {
    "none": "absent",
    "unrelated": "unrelated",
    "genuine": "genuine",
    "genuine without its kernel": "genuine",
    "broken": "genuine",
}


def test_training_has_the_same_bits_whatever_is_called_apex(trainer: Trainer, tmp_path: Path) -> None:
    names = [name for name in STAND_INS if name != "genuine without its kernel"]  # on the CPU no other than genuine
    little = ("model.num_layers=2", "data.validation=[]", "cluster.peak_tflops=1")
    attempts: list[AttemptDirectory] = []
    arguments: list[str] = []
    for number, name in enumerate(names):
        packages = write_packages(tmp_path / f"packages-{number}", STAND_INS[name])
        packages.mkdir(exist_ok=True)
        run, plan = trainer.make_run(*little, steps=STEPS)
        attempts.append(run.new_attempt())
        write_plan(attempts[-1].plan, plan)
        arguments += [str(packages), str(run.path), str(attempts[-1].number)]
    command = [sys.executable, "-m", "tests.apex_trial", *arguments]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # two ranks share the cores; waiting threads would take them
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [KINDS[name] for name in names]
    curves = dict(zip(names, map(losses, attempts), strict=True))
    assert len(curves["none"]) >= STEPS
    for name, attempt in zip(names, attempts, strict=True):
        assert curves[name] == curves["none"], (name, [path.read_text() for path in attempt.path.glob("failures/*")])


@pytest.fixture
def modules() -> Iterator[None]:
    """Give back the modules that a choice hides."""
    names = [name for name in sys.modules if name.partition(".")[0] in (*HIDDEN, KERNEL)]
    before = {name: sys.modules.pop(name) for name in names}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in (*HIDDEN, KERNEL)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["CPU build", "CUDA build"])
def test_the_kernel_of_a_genuine_apex_is_all_that_is_left_in_sight(
    name: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: None
) -> None:
    monkeypatch.syspath_prepend(write_packages(tmp_path, STAND_INS[name]))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert apex_kind() == KINDS[name]
    # A package that is broken itself may have kernels that are not: these are modules of their own.
    is_chosen = cuda is not None and name in ("genuine", "broken")
    assert choose_apex() is is_chosen
    for module in ("apex", "apex.optimizers", "amp_C", *(() if is_chosen else (KERNEL,))):
        with pytest.raises(ImportError):
            __import__(module)
    assert (KERNEL in sys.modules and sys.modules[KERNEL] is not None) is is_chosen


@pytest.mark.parametrize("name", [KERNEL, "amp_C"])
def test_a_kernel_that_cannot_be_loaded_is_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: None
) -> None:
    monkeypatch.syspath_prepend(write_packages(tmp_path, {**GENUINE, name: "raise OSError('undefined symbol')"}))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert choose_apex() is False
    with pytest.raises(ImportError):
        __import__(KERNEL)


@pytest.mark.parametrize(
    ("device", "engine", "kernel", "expected"),
    [
        ("cpu", True, True, "none"),
        ("cpu", False, False, "none"),
        ("cuda", False, False, "none"),
        ("cuda", True, False, "layers"),  # megatron refuses its one option for all layers without the kernel
        ("cuda", True, True, "all"),
        ("cuda", False, True, "all"),
    ],
)
def test_who_adds_weight_gradients_up_follows_from_what_is_there(
    device: str, engine: bool, kernel: bool, expected: str
) -> None:
    assert weight_gradient_fusion(device, has_transformer_engine=engine, has_kernel=kernel) == expected
