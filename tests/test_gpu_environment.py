"""The variables that a launch on GPUs sets: what layout and precision ask for, and what a site makes of it."""

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.checks import build_layout, settings_problems
from orchestrator.commands import launch
from orchestrator.config import compose, recompose
from orchestrator.gpu_environment import (
    FROM_THE_SITE,
    environment_problems,
    gpu_variables,
    is_blackwell,
    rank_variables,
)
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import RunSettings
from orchestrator.slurm.ranks import rank_environment
from orchestrator.slurm.site_profile import rank_command
from tests.conftest import SMALL

ALWAYS = {"PYTORCH_CUDA_ALLOC_CONF", "NCCL_NVLS_ENABLE"}
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"}
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@functools.cache
def on_cluster(name: str) -> RunSettings:
    image = "cluster.container.image=/images/a.sqsh" if "-" in name else "cluster.nodes=1"
    given = [*SMALL, "precision=bf16", f"cluster={name}", "cluster.nodes=1", "layout.global_batch_size=64", image]
    return compose("demo-base", given)


def settings_of(*overrides: str, cluster: str = "h100") -> RunSettings:
    """Settings whose problems are not told."""
    return recompose(on_cluster(cluster), overrides, is_checked=False)


def variables(*overrides: str, cluster: str = "h100") -> dict[str, str]:
    settings = settings_of(*overrides, cluster=cluster)
    return {name: value for name, (value, _) in gpu_variables(settings, build_layout(settings)).items()}


def problems(*overrides: str) -> list[str]:
    settings = settings_of(*overrides)
    return environment_problems(settings, build_layout(settings))


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        ((), {}),
        (("layout.tensor_parallel=2",), {CONNECTIONS: "1"}),
        (("layout.context_parallel=2",), {CONNECTIONS: "1"}),
        (("layout.pipeline_parallel=2",), {}),
        (("layout.tensor_parallel=2", "cluster.gpu=h200"), {CONNECTIONS: "1"}),
        (("layout.tensor_parallel=2", "cluster.gpu="), {CONNECTIONS: "1"}),
        (("layout.tensor_parallel=2", "cluster.gpu=b200"), {}),
        (("layout.context_parallel=2", "cluster.gpu=NVIDIA GB300"), {}),
        (("layout.overlap_gradient_reduce=true",), dict.fromkeys(MARGINS, "16")),
        (("layout.pipeline_parallel=2", "layout.virtual_pipeline_parallel=2"), dict.fromkeys(MARGINS, "16")),
        (
            ("training.deterministic=true",),
            {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_layout_sets_what_it_needs_and_no_more(overrides: tuple[str, ...], more: dict[str, str]) -> None:
    found = variables(*overrides)
    assert found.keys() == ALWAYS | more.keys()
    assert {name: found[name] for name in more} == more


def test_ranks_on_the_cpu_get_none_of_them() -> None:
    given = ("layout.tensor_parallel=2", "cluster.ranks_per_node=2", "training.deterministic=true")
    assert variables(*given, cluster="local") == {}


@pytest.mark.parametrize(("gpu", "expected"), [("h100", False), ("gh200", False), ("B200", True), ("gb200", True)])
def test_a_grace_hopper_is_no_blackwell(gpu: str, expected: bool) -> None:
    assert is_blackwell(gpu) is expected


def test_every_variable_has_a_reason_and_the_site_counts_more() -> None:
    settings = settings_of(
        "layout.tensor_parallel=2", "cluster.environment={NCCL_NVLS_ENABLE: '1', NCCL_IB_HCA: mlx5_0}"
    )
    by_name = {each.name: each for each in rank_variables(settings, build_layout(settings))}
    assert by_name["NCCL_NVLS_ENABLE"].value == "1"
    assert by_name["NCCL_NVLS_ENABLE"].why == f"{FROM_THE_SITE}, in place of 0"
    assert by_name["NCCL_IB_HCA"].why == FROM_THE_SITE
    assert by_name[CONNECTIONS].why.startswith("layout.tensor_parallel=2")
    assert all(each.why for each in by_name.values())


@pytest.mark.parametrize("value", ["'8'", "''"], ids=["another value", "taken away"])
@pytest.mark.parametrize("field", ["tensor_parallel", "context_parallel"])
def test_a_site_s_connections_that_contradict_the_layout_are_told_while_planning(field: str, value: str) -> None:
    settings = settings_of(f"layout.{field}=2", f"cluster.environment={{{CONNECTIONS}: {value}}}")
    told = [problem for problem in settings_problems(settings) if CONNECTIONS in problem]
    assert len(told) == 1
    assert f"layout.{field}=2" in told[0]
    assert "leave it out" in told[0]


@pytest.mark.parametrize(
    "overrides",
    [
        (f"cluster.environment={{{CONNECTIONS}: '8'}}",),
        ("layout.tensor_parallel=2", f"cluster.environment={{{CONNECTIONS}: '1'}}"),
        ("layout.tensor_parallel=2", "cluster.gpu=b200", f"cluster.environment={{{CONNECTIONS}: '32'}}"),
        ("training.deterministic=true", "cluster.environment={NCCL_ALGO: Tree, CUBLAS_WORKSPACE_CONFIG: ':16:8'}"),
        ("cluster.environment={NVTE_ALLOW_NONDETERMINISTIC_ALGO: '1'}",),
    ],
    ids=lambda given: given[-1],
)
def test_a_site_s_values_that_contradict_nothing_are_taken(overrides: tuple[str, ...]) -> None:
    assert problems(*overrides) == []


def test_a_site_that_undoes_determinism_is_told_of_each_variable() -> None:
    given = (
        "cluster.environment={NVTE_ALLOW_NONDETERMINISTIC_ALGO: '1', NCCL_ALGO: '', CUBLAS_WORKSPACE_CONFIG: ':0:0'}"
    )
    told = problems("training.deterministic=true", given)
    assert [re.search(r"environment\.(\w+)", problem)[1] for problem in told] == [  # type: ignore[index]
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_ALGO",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    ]
    assert all("training.deterministic=true" in problem for problem in told)


def plan_with(tmp_path: Path, *overrides: str) -> TrainingPlan:
    return make_plan(settings_of("layout.tensor_parallel=2", f"paths.runs={tmp_path}", *overrides))


def test_ranks_get_what_is_set_and_lose_what_the_site_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")  # as the launching shell exports it
    monkeypatch.setenv(CONNECTIONS, "8")
    run = RunDirectory(tmp_path / "run")
    environment = rank_environment(run, plan_with(tmp_path))
    assert (environment["NCCL_NVLS_ENABLE"], environment[CONNECTIONS]) == ("0", "1")
    without = rank_environment(run, plan_with(tmp_path, "cluster.environment={NCCL_NVLS_ENABLE: ''}"))
    assert "NCCL_NVLS_ENABLE" not in without
    assert without[CONNECTIONS] == "1"
    assert os.environ["NCCL_NVLS_ENABLE"] == "2"


def test_in_a_container_a_variable_is_taken_from_the_image_as_well(tmp_path: Path) -> None:
    """Run for real but for the container: `env` and what follows it."""
    given = ("cluster.container={runtime: pyxis, image: /images/a.sqsh}", "cluster.worker_python=/usr/bin/python3")
    plan = plan_with(tmp_path, *given, "cluster.environment={NCCL_NVLS_ENABLE: ''}")
    command = rank_command(RunDirectory(tmp_path / "run"), plan, ["env"])
    inherited = {"NCCL_NVLS_ENABLE": "1", "PATH": os.environ["PATH"], "OF_THE_IMAGE": "kept"}
    said = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [line for line in said if line.startswith("NCCL_NVLS_ENABLE")]
    assert {f"{CONNECTIONS}=1", "OF_THE_IMAGE=kept"} <= set(said)


def test_the_packaged_profiles_set_none_of_these_themselves() -> None:
    for name in ("h100", "h100-pyxis", "h100-apptainer"):
        assert settings_of(cluster=name).cluster.environment == {}


def test_a_dry_run_shows_each_variable_with_its_value_and_its_reason(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU machine without Slurm, so that nothing of this is a script's own text."""
    asked = [
        *SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}",
        f"paths.runs={tmp_path / 'runs'}", "name=solar", "training.tokens=1280", "cluster.device=cuda",
        "cluster.ranks_per_node=2", "layout.tensor_parallel=2", "precision=bf16",
        "cluster.environment={NCCL_IB_HCA: mlx5_0, NCCL_NVLS_ENABLE: ''}",
    ]  # fmt: skip
    launch.command.main(["demo-base", *asked, "--dry-run"], standalone_mode=False)
    shown = capsys.readouterr().out
    rows = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split()) and words[0].isupper()}
    assert rows[CONNECTIONS][:2] == ["1", "layout.tensor_parallel=2:"]
    assert rows["PYTORCH_CUDA_ALLOC_CONF"][0] == "expandable_segments:True"
    assert rows["NCCL_IB_HCA"] == ["mlx5_0", *FROM_THE_SITE.split()]
    assert rows["NCCL_NVLS_ENABLE"][:4] == ["(unset)", "from", "cluster.environment:", "taken"]
    assert all(len(line) <= 100 for line in shown.splitlines() if line.split()[:1] and line.split()[0] in rows)
    assert not (tmp_path / "runs" / "solar").exists()
