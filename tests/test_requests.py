"""A request that a site cannot carry out: one clear error with the remedy, within a moment, and no run folder left."""

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.checks import save_seconds, settings_problems
from orchestrator.config import compose, recompose
from orchestrator.errors import ConfigError, OrchestrateError, RunError, SchedulerError
from orchestrator.launch import check_start, launch
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.settings import ClusterSettings, RunSettings, SlurmSettings
from orchestrator.slurm import sandbox
from orchestrator.slurm.requests import (
    Partition,
    account_problem,
    check_folders,
    file_system,
    is_exported,
    parse_partitions,
    partition_seconds,
    refusal,
    time_problem,
)
from orchestrator.slurm.sandbox import Sandbox
from tests.conftest import SMALL
from tests.slurm_runs import needs_slurm

# On a machine of one's own; .ci/run installs both, and counts a skipped test as a failure.
NAME = f"requests-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sandbox]:
    started = sandbox.start(NAME, nodes=4)
    yield started
    sandbox.stop(NAME)


@pytest.fixture
def slurm(cluster: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, with Slurm's commands pointed at it as a person's shell would have them."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.slurm_conf))
    return cluster


def settings_on(name: str, runs: Path, corpus: Path, *overrides: str) -> RunSettings:
    return compose(
        "demo-base",
        [
            *SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}", f"paths.runs={runs}",
            "name=wanted", f"cluster={name}", "cluster.nodes=2", *overrides,
        ],
    )  # fmt: skip


def refused(plan: TrainingPlan, kind: type[OrchestrateError]) -> str:
    """Launch, and return what it is refused with."""
    runs = Path(plan.settings.paths.runs)
    before = sorted(runs.rglob("*")) if runs.exists() else None
    with pytest.raises(kind) as error:
        launch(plan, "a test")
    assert (sorted(runs.rglob("*")) if runs.exists() else None) == before
    return str(error.value)


# By Slurm.


@needs_slurm
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["cluster.nodes=16", "layout.global_batch_size=16"],
            ["16 nodes of partition gpu", "it has 4 nodes of 64 processors and 8 GPUs", "cluster.nodes to at most 4"],
        ),
        (
            ["cluster.partition=nowhere"],
            ["of partition nowhere", "invalid partition", "the partitions here are gpu", "set cluster.partition"],
        ),
        (
            ["cluster.device=cuda", "cluster.fork_ranks=false", "cluster.ranks_per_node=16",
             "layout.global_batch_size=32"],
            ["2 nodes with 16 GPUs", "and 8 GPUs", "cluster.ranks_per_node to at most 8"],
        ),
        (
            ["cluster.slurm.cpus_per_rank=100"],
            ["ask for at most 64 processors a node, not 100"],
        ),
        (["cluster.slurm.constraint=h200"], ["Invalid feature", "`scontrol show node`"]),
        (["cluster.slurm.reservation=none"], ["reservation is invalid"]),
    ],
    ids=["more nodes than there are", "no such partition", "too many GPUs", "too many processors", "no such feature",
         "no such reservation"],
)  # fmt: skip
@pytest.mark.usefixtures("slurm")
def test_what_slurm_could_never_start_is_refused_with_what_there_is(
    tmp_path: Path, corpus: Path, overrides: list[str], parts: list[str]
) -> None:
    said = refused(make_plan(settings_on("sandbox", tmp_path / "runs", corpus, *overrides)), SchedulerError)
    assert [part for part in ["Slurm could not run this on", *parts] if part not in said] == [], said
    assert not (tmp_path / "runs").exists()


@needs_slurm
def test_more_time_than_the_partition_gives_is_refused(slurm: Sandbox, tmp_path: Path, corpus: Path) -> None:
    slurm.ask("scontrol", "update", "partitionname=gpu", "maxtime=30")
    try:
        said = refused(make_plan(settings_on("sandbox", tmp_path / "runs", corpus)), SchedulerError)
        short = settings_on("sandbox", tmp_path / "runs", corpus, "cluster.time_limit=0:30:00")
        check_start(make_plan(short))
    finally:
        slurm.ask("scontrol", "update", "partitionname=gpu", "maxtime=infinite")
    assert "cluster.time_limit=1:00:00 is more than a job of partition gpu may have; set it to at most 0:30:00" in said


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_an_account_is_taken_where_slurm_keeps_none(tmp_path: Path, corpus: Path) -> None:
    check_start(make_plan(settings_on("sandbox", tmp_path / "runs", corpus, "cluster.account=research")))


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_pyxis_is_refused_where_srun_does_not_know_it(tmp_path: Path, corpus: Path) -> None:
    overrides = [
        "cluster.container.runtime=pyxis", "cluster.container.image=/shared/megatron.sqsh",
        "cluster.worker_python=/usr/bin/python3", "cluster.fork_ranks=false",
    ]  # fmt: skip
    said = refused(make_plan(settings_on("sandbox", tmp_path / "runs", corpus, *overrides)), ConfigError)
    assert "this site's srun knows no --container-image" in said


@needs_slurm
@pytest.mark.skipif(shutil.which("apptainer") is not None, reason="apptainer is on this machine")
@pytest.mark.usefixtures("slurm")
def test_apptainer_is_refused_where_the_nodes_are_this_machine_and_an_image_where_it_is_not(
    tmp_path: Path, corpus: Path
) -> None:
    overrides = [
        "cluster.container.runtime=apptainer", f"cluster.container.image={tmp_path}/megatron.sif",
        "cluster.worker_python=/usr/bin/python3", "cluster.fork_ranks=false",
    ]  # fmt: skip
    said = refused(make_plan(settings_on("sandbox", tmp_path / "runs", corpus, *overrides)), ConfigError)
    assert "needs `apptainer`, and it is not on this machine" in said
    assert f"cluster.container.image={tmp_path}/megatron.sif is not there" in said


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_a_second_launch_of_a_run_is_refused_and_the_first_stays_as_it_is(tmp_path: Path, corpus: Path) -> None:
    plan = make_plan(settings_on("sandbox", tmp_path / "runs", corpus))
    (tmp_path / "runs" / "wanted").mkdir(parents=True)
    assert "run 'wanted' exists already" in refused(plan, RunError)


@needs_slurm
def test_a_controller_that_is_gone_is_told_of_at_once(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = sandbox.start(f"{NAME}-gone", nodes=1)
    try:
        monkeypatch.setenv("SLURM_CONF", str(started.slurm_conf))
        sandbox.stop_controller(started)
        plan = make_plan(settings_on("sandbox", tmp_path / "runs", corpus))
        begun = time.monotonic()
        said = refused(plan, SchedulerError)
        assert time.monotonic() - begun < 9  # sbatch itself would block for 18 s
    finally:
        sandbox.stop(started.name)
    assert "Slurm's controller does not answer" in said
    assert "nothing was submitted; try again when `scontrol ping` says UP" in said
    assert not (tmp_path / "runs").exists()


# What is decided from what Slurm told.


def test_the_answer_of_sinfo_is_read_with_several_kinds_of_nodes() -> None:
    found = parse_partitions(
        "gpu*|24|128|gpu:h100:8(S:0-1)|2-00:00:00\ngpu*|8|96+|gpu:a100:4,nvme:1|30:00\ncpu|5|64|(null)|infinite\n"
    )
    assert [(p.name, p.is_default, p.nodes, p.processors, p.gpus, p.longest_seconds) for p in found] == [
        ("gpu", True, 24, 128, 8, 172800),
        ("gpu", True, 8, 96, 4, 1800),
        ("cpu", False, 5, 64, 0, None),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-00:00:00", 86400), ("12:30:00", 45000), ("30:00", 1800), ("infinite", None), ("n/a", None)],
)
def test_a_partition_s_limit_is_read_as_sinfo_writes_it(text: str, seconds: int | None) -> None:
    assert partition_seconds(text) == seconds


GPU = Partition(name="gpu", is_default=True, nodes=32, processors=128, gpus=8, longest_seconds=86400)
CPU = dataclasses.replace(GPU, name="cpu", is_default=False, gpus=0, longest_seconds=None)
SITE = ClusterSettings(name="site", scheduler="slurm", device="cuda", nodes=32, time_limit="2-00:00:00")


def test_a_refusal_names_the_remedy_for_each_thing_that_is_too_large() -> None:
    assert "it has 32 nodes of 128 processors and 8 GPUs; set cluster.nodes to at most 32" in refusal(
        dataclasses.replace(SITE, nodes=33), "no", [GPU, CPU]
    )
    assert "take a partition with GPUs" in refusal(dataclasses.replace(SITE, partition="cpu"), "no", [GPU, CPU])
    assert "the partitions here are gpu, cpu;" in refusal(dataclasses.replace(SITE, partition="x"), "no", [GPU, CPU])
    assert refusal(SITE, "no", []).endswith("see `sinfo`")


def test_time_is_compared_with_the_partition_unless_a_qos_may_say_otherwise() -> None:
    assert "set it to at most 24:00:00" in time_problem(SITE, [GPU, CPU])
    assert time_problem(dataclasses.replace(SITE, partition="cpu"), [GPU, CPU]) == ""
    assert time_problem(dataclasses.replace(SITE, time_limit="24:00:00"), [GPU]) == ""
    assert time_problem(dataclasses.replace(SITE, slurm=SlurmSettings(qos="long")), [GPU]) == ""


def test_an_account_that_is_not_among_the_user_s_own_is_named_with_those() -> None:
    assert "set it to one of physics, solar" in account_problem("wrong", ["physics", "solar"])
    assert account_problem("Solar", ["physics", "solar"]) == ""
    assert account_problem("any", []) == ""  # a user without accounts: Slurm may know more than its table


# By the disk.

MOUNTS = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /shared rw,relatime shared:1 - lustre 10.0.0.1@o2ib:/fs rw
31 30 0:41 / /shared/my\040own rw - tmpfs tmpfs rw
32 22 0:42 / /home rw - nfs4 server:/home rw
33 32 0:43 / /home rw - ext4 /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/var/runs", "ext4"), ("/shared/runs", "lustre"), ("/shared/my own/x", "tmpfs"), ("/shared2", "ext4"),
     ("/home/a", "ext4")],
)  # fmt: skip
def test_a_path_lies_on_the_innermost_and_the_last_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_a_file_system_of_a_real_mount_is_found(mount_disk: Callable[..., Path]) -> None:
    folder = mount_disk(4)
    table = Path("/proc/self/mountinfo").read_text()
    assert file_system(folder, table) == "tmpfs"
    assert file_system(Path("/proc/self"), table) == "proc"


def test_what_lies_under_an_exported_folder_is_shared() -> None:
    exports = '# exports\n/srv/nfs 10.0.0.0/8(rw)\n"/srv/my\\040runs" *(rw)\n'
    assert is_exported(Path("/srv/nfs/runs"), exports)
    assert is_exported(Path("/srv/my runs"), exports)
    assert not is_exported(Path("/srv/nfs2"), exports)
    assert not is_exported(Path("/srv"), "")


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_folders_that_other_nodes_would_not_see_are_refused_all_at_once(
    mount_disk: Callable[..., Path], corpus: Path
) -> None:
    folder = mount_disk(4)
    plan = make_plan(settings_on("sandbox", folder / "runs", corpus, "one_machine=false", "fork_ranks=false"))
    said = refused(plan, ConfigError)
    assert f"paths.runs={folder}/runs lies on a disk of this machine alone (tmpfs), and 2 nodes need to see it" in said
    assert "data.train=" in said
    assert "or set cluster.one_machine=true" in said
    assert not (folder / "runs").exists()
    alone = dataclasses.replace(plan.settings.cluster, nodes=1)
    check_folders(dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, cluster=alone)))


def test_a_folder_of_runs_that_cannot_be_written_is_refused(mount_disk: Callable[..., Path], corpus: Path) -> None:
    folder = mount_disk(4)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    said = refused(make_plan(settings_on("local", folder / "runs", corpus, "cluster.nodes=1")), ConfigError)
    assert f"paths.runs={folder}/runs should be a folder to write to" in said
    assert "set paths.runs to a folder of yours" in said


def test_a_file_in_the_place_of_the_folder_of_runs_is_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    said = refused(make_plan(settings_on("local", tmp_path / "runs", corpus, "cluster.nodes=1")), ConfigError)
    assert "should be a folder to write to" in said


# By the settings alone.


def solar(*overrides: str) -> list[str]:
    """The problems of 4 nodes of the packaged profile with these overrides."""
    settings = compose("solar-10.7b", ["cluster=h100", "cluster.nodes=4"])
    return settings_problems(recompose(settings, overrides, is_checked=False))


def test_a_save_takes_at_least_the_bytes_of_a_checkpoint_over_what_all_nodes_write() -> None:
    settings = compose("solar-10.7b", ["cluster=h100", "cluster.nodes=4"])
    # 10,731,524,096 parameters of 12 bytes, 4 nodes of 0.5 GB/s.
    assert save_seconds(settings) == pytest.approx(10_731_524_096 * 12 / 2e9)
    assert make_plan(settings).checkpoint_bytes == 10_731_524_096 * 12


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("cluster.warning_seconds=60", "cluster.warning_seconds=60 is too short: a save of 129 GB takes at least 64 s "
         "on 4 nodes at cluster.node_write_gb_per_second=0.5; set it to at least 64 and a step"),
        ("cluster.node_write_gb_per_second=0.01", "cluster.warning_seconds=600 is too short"),
        ("cluster.node_write_gb_per_second=0", "node_write_gb_per_second=0.0 should be above 0"),
        ("cluster.spare_nodes=-1", "cluster.spare_nodes should be 0 or more, found -1"),
        ("cluster.slurm.cpus_per_rank=0", "cpus_per_rank should be at least 1"),
        ("cluster.slurm.sbatch_lines=nodes=4", "'nodes=4', which is no option; write it as --name=value"),
        ("cluster.container.runtime=pyxis", "cluster.container.runtime=pyxis needs an image"),
        ("cluster.container.runtime=apptainer", "needs cluster.worker_python, the interpreter in the image"),
        ("cluster.container.image=/a.sif", "needs a runtime"),
        ("cluster.container.image=megatron.sif cluster.container.runtime=apptainer", "should be a whole path"),
        ("cluster.container.runtime=pyxis cluster.container.mounts=/data", "should read /from:/to"),
        ("cluster.environment={PYTHONPATH: /x}", "would hide the run's own copy of the code"),
        ("cluster.environment={A-B: x}", "which is no name of a variable"),
        ("cluster.slurm.setup=export WANDB_API_KEY=abc", "cluster.slurm.setup: WANDB_API_KEY looks like a secret"),
        ("cluster.container.arguments=--env=HF_TOKEN=abc", "cluster.container.arguments: HF_TOKEN looks like a secret"),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_be_is_a_problem_with_its_remedy(override: str, problem: str) -> None:
    first, *rest = override.split(" cluster.")
    found = solar(first, *(f"cluster.{part}" for part in rest))
    assert any(problem in line for line in found), found


def test_a_time_limit_that_no_save_fits_into_is_a_problem() -> None:
    found = solar("cluster.time_limit=0:01:00", "cluster.warning_seconds=30")
    assert any(
        "cluster.time_limit=0:01:00 is too short: a save of 129 GB takes at least 64 s" in line for line in found
    )


def test_a_profile_with_everything_has_no_problem() -> None:
    assert solar(
        "cluster.slurm.setup=export SCRATCH_TOKEN=$(cat /run/token)",
        "cluster.slurm.sbatch_lines=--comment=pretraining",
        "cluster.container.runtime=pyxis", "cluster.container.image=nvcr.io#nvidia/pytorch:25.10-py3",
        "cluster.worker_python=/usr/bin/python3", "cluster.container.mounts=/scratch:/scratch:ro",
        "cluster.spare_nodes=1",
    ) == []  # fmt: skip
