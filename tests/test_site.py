"""What a site's profile makes of a job: a golden file a feature, each script taken by a real Slurm, ranks in order."""

import contextlib
import dataclasses
import getpass
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import ClusterSettings, ContainerSettings, SlurmSettings
from orchestrator.slurm import sandbox
from orchestrator.slurm.ranks import rank_environment
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.site_profile import rank_command, srun_options, worker_variables
from orchestrator.slurm.submission import sbatch_script
from tests.conftest import REPOSITORY, SMALL
from tests.slurm_runs import needs_slurm

NAME = f"site-{os.getpid()}"
RUNS = Path("/shared/runs")
PLAIN = ClusterSettings(
    name="site", scheduler="slurm", device="cuda", nodes=2, ranks_per_node=2, partition="gpu", time_limit="4:00:00"
)  # fmt: skip
PYXIS = ContainerSettings(
    runtime="pyxis", image="/shared/images/megatron.sqsh", mounts=("/scratch:/scratch",),
    arguments=("--container-readonly",),
)  # fmt: skip
APPTAINER = ContainerSettings(
    runtime="apptainer", image="/shared/images/megatron.sif", mounts=("/scratch:/scratch:ro",), arguments=("--ipc",)
)  # fmt: skip


def on_site(**changes: object) -> ClusterSettings:
    return dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]


def with_slurm(**changes: object) -> ClusterSettings:
    return on_site(slurm=SlurmSettings(**changes))  # type: ignore[arg-type]


FEATURES = {
    "plain": PLAIN,
    "environment": on_site(environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_SOCKET_IFNAME": "ib0"}),
    "pyxis": on_site(container=PYXIS, worker_python="/usr/bin/python3", environment={"NCCL_IB_HCA": "mlx5_0"}),
    "apptainer": on_site(container=APPTAINER, worker_python="/usr/bin/python3"),
    "qos-reservation-constraint": with_slurm(qos="long", reservation="solar", constraint="h100&ib"),
    "account": on_site(account="research"),
    "exclusive-memory": with_slurm(exclusive=True, memory="0"),
    "gres-with-type": with_slurm(gpus="gres", gpu_type="h100"),
    "gpus-with-type": with_slurm(gpu_type="h100"),
    "gpus-none": with_slurm(gpus="none"),
    "cpus-and-binding": with_slurm(cpus_per_rank=12, cpu_bind="verbose,cores", memory_bind="local"),
    "switches-exclude": with_slurm(switches="2@01:00:00", exclude=("n003", "n004")),
    "spare-nodes": on_site(spare_nodes=1),
    "modules-and-setup": with_slurm(modules=("gcc/13", "cuda/12.8"), setup=("ulimit -l unlimited", "umask 027")),
    "pre-command": with_slurm(pre_command=("numactl", "--localalloc")),
    "extra-lines": with_slurm(sbatch_lines=("--comment=pretraining run", "--nice=10"), srun_lines=("--network=none",)),
    "no-requeue": with_slurm(requeue=False),
}
PROFILES = ("sandbox", "h100", "h100-pyxis", "h100-apptainer")


def plan_of(cluster: ClusterSettings) -> TrainingPlan:
    settings = compose(
        "demo-base",
        [
            *SMALL, "data.train=/shared/data/train", "data.validation=/shared/data/held-out", "base=/shared/base",
            "name=solar", f"paths.runs={RUNS}", "layout.global_batch_size=16",
        ],
    )  # fmt: skip
    return make_plan(dataclasses.replace(settings, cluster=cluster))


def profile(name: str) -> ClusterSettings:
    image = [f"cluster.container.image=/shared/images/megatron.{name}"] if "-" in name else []
    given = [*SMALL, f"cluster={name}", "cluster.nodes=2", "layout.global_batch_size=16", *image]
    return compose("demo-base", given).cluster


def all_lines(cluster: ClusterSettings) -> str:
    """The script, the srun line and the variables of ranks, as a person reads them."""
    plan = plan_of(cluster)
    run = RunDirectory(RUNS / "solar")
    words = [cluster.worker_python or sys.executable, "-P", "-m", "megatron_solar.worker", str(run.path), "1"]
    options = srun_options(
        plan,
        nodes=("n002", "n001"),
        ranks_per_node=cluster.ranks_per_node,
        output=f"{run.attempt(1).logs}/rank_%4t.log",
    )
    command = ["srun", *options, *rank_command(run, plan, words)]
    variables = [f"{name}={value}" for name, value in worker_variables(run, plan).items()]
    lines = [
        sbatch_script(run, plan).rstrip(),
        "\n# the ranks, on n002 and n001 in this order",
        " \\\n    ".join(map(shlex.quote, command)),
        "\n# in their environment",
        *variables,
    ]
    return "\n".join(lines).replace(sys.executable, "PYTHON") + "\n"


# Submitit looks for srun before it writes a script; .ci/run installs both, and counts a skipped test as a failure.


@needs_slurm
@pytest.mark.parametrize("name", [*FEATURES, *PROFILES])
def test_script_srun_line_and_variables_are_the_golden_ones(name: str, request: pytest.FixtureRequest) -> None:
    text = all_lines(FEATURES[name] if name in FEATURES else profile(name))
    kind = "feature" if name in FEATURES else "cluster"
    golden = REPOSITORY / "tests" / "golden" / f"{kind}-{name}.sh"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text(), "run pytest with --update-golden after looking at the difference"


def test_every_golden_script_belongs_to_a_feature_or_a_profile() -> None:
    expected = {f"feature-{name}.sh" for name in FEATURES} | {f"cluster-{name}.sh" for name in PROFILES}
    expected |= {"tokenize-array.sh"}  # of test_tokenize_array.py
    found = {path.name for path in (REPOSITORY / "tests" / "golden").glob("*.sh")}
    assert found == expected


@pytest.mark.parametrize("name", FEATURES)
def test_the_ranks_environment_holds_the_variables_of_the_profile(name: str) -> None:
    plan, run = plan_of(FEATURES[name]), RunDirectory(RUNS / "solar")
    environment = rank_environment(run, plan)
    assert {key: environment.get(key) for key in FEATURES[name].environment} == FEATURES[name].environment
    assert environment["PYTHONPATH"] == worker_variables(run, plan)["PYTHONPATH"]


def test_no_variable_that_looks_like_a_secret_stands_in_a_container_s_command() -> None:
    """Whoever may list processes reads it; what the launching shell exported comes by inheritance."""
    os.environ["SOME_TOKEN"] = "hidden"
    try:
        plan = plan_of(FEATURES["pyxis"])
        assert "hidden" not in " ".join(rank_command(RunDirectory(RUNS / "solar"), plan, ["true"]))
    finally:
        del os.environ["SOME_TOKEN"]


# On a real Slurm.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sandbox]:
    started = sandbox.start(NAME, nodes=4)
    for node in sandbox.node_names(4):
        started.ask("scontrol", "update", f"nodename={node}", "availablefeatures=h100,ib", "activefeatures=h100,ib")
    yield started
    sandbox.stop(NAME)


@needs_slurm
@pytest.mark.parametrize("name", FEATURES)
def test_a_real_slurm_takes_the_script_of_every_feature(name: str, cluster: Sandbox, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(sbatch_script(RunDirectory(RUNS / "solar"), plan_of(FEATURES[name])))
    with reserved(cluster, FEATURES[name].slurm.reservation):
        cluster.ask("sbatch", "--test-only", str(script))


@contextlib.contextmanager
def reserved(cluster: Sandbox, name: str | None) -> Iterator[None]:
    """Reserve two nodes under this name."""
    if name is None:
        yield
        return
    cluster.ask(
        "scontrol", "create", "reservation", f"reservationname={name}", f"users={getpass.getuser()}", "nodes=n001,n002",
        "starttime=now", "duration=1-00:00:00",
    )  # fmt: skip
    yield
    cluster.ask("scontrol", "delete", f"reservationname={name}")


def started_ranks(
    cluster: Sandbox, site: ClusterSettings, nodes: tuple[str, ...], folder: Path, told: str
) -> list[list[str]]:
    """Run a job with a profile's script and srun line; return the words that each rank told."""
    run, plan = RunDirectory(folder / folder.name), plan_of(site)  # a name of its own, since jobs of one wait in turn
    run.jobs.mkdir(parents=True)
    options = srun_options(plan, nodes=nodes, ranks_per_node=site.ranks_per_node, output=f"{folder}/rank_%t.log")
    command = shlex.join(["srun", *options, *rank_command(run, plan, ["sh", "-c", f'echo "{told}"'])])
    lines = sbatch_script(run, plan).splitlines()
    script, ended = folder / "script.sh", folder / "ended"
    last = [command, f"echo $? > {ended}.partial", f"mv {ended}.partial {ended}", ""]
    script.write_text("\n".join([*(line for line in lines if not line.startswith("exec ")), *last]))
    cluster.ask("sbatch", f"--nodelist={','.join(nodes)}", str(script))
    deadline = time.monotonic() + 60
    # Until Slurm has let go of it as well: a job that is completing holds its GPUs, and the next one gets others.
    while not ended.exists() or cluster.ask("squeue", "--noheader").strip():
        assert time.monotonic() < deadline, cluster.ask("squeue")
        time.sleep(0.05)
    assert ended.read_text() == "0\n", [path.read_text() for path in run.jobs.glob("*.out")]
    logs = sorted(folder.glob("rank_*.log"), key=lambda path: int(path.stem.removeprefix("rank_")))
    return [path.read_text().split() for path in logs]


@needs_slurm
def test_ranks_run_on_the_nodes_in_the_given_order(cluster: Sandbox, tmp_path: Path) -> None:
    nodes = ("n003", "n001", "n004")
    site = on_site(nodes=3, spare_nodes=1)
    ranks = started_ranks(cluster, site, nodes, tmp_path, "$SLURMD_NODENAME $SLURM_PROCID $SLURM_LOCALID")
    assert ranks == [[nodes[rank // 2], str(rank), str(rank % 2)] for rank in range(6)]


@needs_slurm
@pytest.mark.parametrize(
    "slurm",
    [
        SlurmSettings(),
        SlurmSettings(gpu_type="h100"),
        SlurmSettings(gpus="gres"),
        SlurmSettings(gpus="gres", gpu_type="h100", cpus_per_rank=4),
        SlurmSettings(exclusive=True, memory="0"),
    ],
    ids=["gpus-per-node", "gpus-per-node with type", "gres", "gres with type and processors", "exclusive"],
)
def test_every_rank_sees_all_gpus_that_its_job_asked_for(
    slurm: SlurmSettings, cluster: Sandbox, tmp_path: Path
) -> None:
    told = "gpus=$CUDA_VISIBLE_DEVICES cpus=$SLURM_CPUS_PER_TASK"
    ranks = started_ranks(cluster, on_site(slurm=slurm), ("n001", "n002"), tmp_path, told)
    assert ranks == [["gpus=0,1", f"cpus={slurm.cpus_per_rank or ''}"]] * 4


@needs_slurm
def test_a_site_s_own_line_may_give_each_rank_one_gpu(cluster: Sandbox, tmp_path: Path) -> None:
    """The worker takes `local_rank % device_count`, which is the only one then."""
    site = with_slurm(srun_lines=("--gpus-per-task=1",))
    ranks = started_ranks(cluster, site, ("n001", "n002"), tmp_path, "$CUDA_VISIBLE_DEVICES")
    assert ranks == [["0"], ["1"], ["0"], ["1"]]


@needs_slurm
def test_setup_lines_and_the_words_before_a_rank_are_run(cluster: Sandbox, tmp_path: Path) -> None:
    site = with_slurm(setup=("export OF_SETUP=seen",), pre_command=("env", "OF_RANK=seen"))
    ranks = started_ranks(cluster, site, ("n001", "n002"), tmp_path, "$OF_SETUP $OF_RANK $PYTHONPATH")
    assert ranks == [["seen", "seen", str(tmp_path / tmp_path.name / "code")]] * 4
