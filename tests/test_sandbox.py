"""A real Slurm of our own: up in a moment, for its owner only, dead nodes and all, and gone without a trace."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoints import complete_checkpoints
from orchestrator.config import compose
from orchestrator.errors import SchedulerError
from orchestrator.launch import cancel, launch
from orchestrator.plan import make_plan
from orchestrator.reconcile import State
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import RunSettings
from orchestrator.slurm import sandbox, sandbox_files
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.status import read_status
from tests.conftest import REPOSITORY, SMALL
from tests.launched import step_of, wait_for, wait_to_end
from tests.slurm_runs import needs_accounting, needs_slurm

pytestmark = needs_slurm
NODES = 4
NAME = f"test-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sandbox]:
    started = sandbox.start(NAME, nodes=NODES)
    yield started
    sandbox.stop(NAME)


@pytest.fixture
def slurm(cluster: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, with Slurm's commands pointed at it as a person's shell would have them."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.slurm_conf))
    return cluster


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.1)


def processes_of(cluster: Sandbox) -> list[psutil.Process]:
    own = [psutil.Process(daemon.process) for daemon in cluster.daemons if psutil.pid_exists(daemon.process)]
    return own + [child for process in own for child in process.children(recursive=True)]


def test_every_node_is_idle_and_gives_its_fake_gpus_to_a_step(cluster: Sandbox) -> None:
    assert sandbox.node_states(cluster) == dict.fromkeys(sandbox.node_names(NODES), "idle")
    lines = cluster.ask(
        "srun", f"--nodes={NODES}", "--gres=gpu:8", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES"
    )
    host = os.uname().nodename
    names = sandbox.node_names(NODES) if cluster.own_namespaces else [host] * NODES
    assert sorted(lines.splitlines()) == [f"{name} 0,1,2,3,4,5,6,7" for name in names]


def test_it_listens_on_the_loopback_interface_and_no_other(cluster: Sandbox) -> None:
    found = [
        connection.laddr.ip
        for process in processes_of(cluster)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) >= NODES + 1
    assert set(found) == {"127.0.0.1"}


def test_nobody_else_on_the_machine_gets_in(cluster: Sandbox, tmp_path: Path) -> None:
    folder = Path(cluster.folder)
    assert folder.stat().st_mode & 0o077 == 0
    if os.geteuid():
        return  # only root can try as somebody else
    # Even with the configuration in hand, which is no secret: the key and its socket are.
    leaked = tmp_path / "slurm.conf"
    shutil.copyfile(cluster.slurm_conf, leaked)
    for path in (tmp_path, *tmp_path.parents[:-1]):
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"SLURM_CONF={leaked}"]
    assert subprocess.run([*other, "test", "-r", str(leaked)], check=False).returncode == 0
    tried = subprocess.run([*other, "sinfo"], capture_output=True, text=True, timeout=60, check=False)
    assert tried.returncode
    assert "authentication error" in tried.stderr


def test_two_sandboxes_do_not_disturb_each_other(cluster: Sandbox) -> None:
    other = sandbox.start(f"{NAME}-b", nodes=2, gpus_per_node=4)
    try:
        assert sandbox.node_states(other) == {"n001": "idle", "n002": "idle"}
        assert other.ask("srun", "--gres=gpu:4", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").strip() == "0,1,2,3"
        with pytest.raises(SchedulerError, match="runs already; stop it with"):
            sandbox.start(f"{NAME}-b", nodes=2)
    finally:
        sandbox.stop(f"{NAME}-b")
    assert sandbox.node_states(cluster) == dict.fromkeys(sandbox.node_names(NODES), "idle")


def test_a_stopped_sandbox_leaves_nothing_behind() -> None:
    name = f"{NAME}-c"
    started = sandbox.start(name, nodes=2)
    started.ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600")
    wait_until(lambda: set(sandbox.node_states(started).values()) <= {"allocated", "mixed"})
    everything = processes_of(started)
    assert len(everything) > len(started.daemons)
    sandbox.stop(name)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everything)
    assert not Path(started.folder).exists()
    assert sandbox.find(name) is None
    with pytest.raises(SchedulerError, match="start one with"):
        sandbox.stop(name)


def test_a_killed_node_takes_what_runs_on_it_along_and_slurm_notices() -> None:
    name = f"{NAME}-d"
    started = sandbox.start(name, nodes=2)
    try:
        if not started.own_namespaces:
            pytest.skip("a node that can really die needs root")
        started.ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600")
        daemon = next(daemon for daemon in started.daemons if daemon.name == "n002")
        node = psutil.Process(daemon.process)
        wait_until(lambda: any("sleep" in child.name() for child in node.children(recursive=True)))
        on_it = node.children(recursive=True)
        sandbox.kill_node(started, "n002")
        assert psutil.wait_procs(on_it, timeout=10)[1] == []
        wait_until(lambda: sandbox.node_states(started)["n002"].startswith("down"))
        with pytest.raises(SchedulerError, match="no living node n002"):
            sandbox.kill_node(started, "n002")
    finally:
        sandbox.stop(name)


def test_a_node_whose_slurmd_dies_keeps_what_runs_on_it_and_dies_with_it_later() -> None:
    name = f"{NAME}-h"
    started = sandbox.start(name, nodes=2)
    try:
        if not started.own_namespaces:
            pytest.skip("a node that outlives its slurmd needs root")
        started.ask("sbatch", "--nodelist=n002", "--output=/dev/null", "--wrap", "(sleep 601 &) ; sleep 600")
        node = psutil.Process(next(daemon for daemon in started.daemons if daemon.name == "n002").process)

        def running(*arguments: str) -> list[psutil.Process]:
            found = []
            for child in node.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # gone, or a zombie, since it was listed
                    found += [child] if child.cmdline() == list(arguments) else []
            return found

        wait_until(lambda: bool(running("sleep", "600")) and bool(running("sleep", "601")))
        sandbox.kill_slurmd(started, "n002")
        (job,), (orphan,) = running("sleep", "600"), running("sleep", "601")
        orphan.kill()
        assert psutil.wait_procs([orphan], timeout=10)[1] == [], "the node's init reaps what nobody waits for"
        with pytest.raises(SchedulerError, match="no living slurmd on n002"):
            sandbox.kill_slurmd(started, "n002")
        sandbox.kill_node(started, "n002")
        assert psutil.wait_procs([job], timeout=10)[1] == []
    finally:
        sandbox.stop(name, patience_seconds=1)  # the job of a dead node does not end for long


def test_a_controller_that_died_comes_back_with_its_jobs_under_the_same_configuration() -> None:
    name = f"{NAME}-i"
    started = sandbox.start(name, nodes=2)
    try:
        job = started.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600").strip()
        wait_until(lambda: started.ask("squeue", "--noheader", "--format=%T").strip() == "RUNNING")
        saved, changed = Path(started.folder) / "state" / "job_state", time.time()
        started.ask("scontrol", "update", f"jobid={job}", "comment=later")
        wait_until(lambda: saved.stat().st_mtime > changed)  # what it has not saved it will not know
        configuration = started.slurm_conf.read_text()
        sandbox.stop_controller(started)
        with pytest.raises(SchedulerError, match="no living slurmctld"):
            sandbox.stop_controller(started)
        later = sandbox.start_controller(started)
        assert later == sandbox.find(name)
        assert sorted(daemon.name for daemon in later.daemons) == sorted(daemon.name for daemon in started.daemons)
        assert later.ask("squeue", "--noheader", "--format=%A %T").split() == [job, "RUNNING"]
        assert started.slurm_conf.read_text() == configuration
        with pytest.raises(SchedulerError, match="runs already"):
            sandbox.start_controller(later)
        sandbox.stop_controller(later)
    finally:
        sandbox.stop(name, patience_seconds=1)  # also without a controller
    assert not Path(started.folder).exists()


@needs_accounting
def test_accounting_keeps_jobs_for_sacct_until_it_dies(tmp_path: Path) -> None:
    name = f"{NAME}-j"
    started = sandbox.start(name, nodes=2, accounting=True)
    try:
        job = started.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true").strip()
        kept = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
        wait_until(lambda: started.ask(*kept).strip() == "COMPLETED")
        listening = {
            connection.laddr.ip
            for process in processes_of(started)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        sandbox.stop_accounting(started)
        with pytest.raises(SchedulerError, match="sacct"):
            started.ask(*kept, seconds=60)
        assert set(sandbox.node_states(started).values()) == {"idle"}
    finally:
        sandbox.stop(name)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": "a/b"}, "letters, digits and dashes"),
        ({"nodes": 0}, "1 to 512 nodes"),
        ({"nodes": 1000}, "1 to 512 nodes"),
    ],
)
def test_what_cannot_be_started_is_refused(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(SchedulerError, match=problem):
        sandbox.start(**{"name": f"{NAME}-e", **arguments})  # type: ignore[arg-type]


def test_a_machine_without_slurm_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox_files, "SBIN", ())
    with pytest.raises(SchedulerError, match="apt-get install --no-install-recommends slurm-wlm munge"):
        sandbox.start(f"{NAME}-f")


def test_the_command_line_starts_shows_and_stops_one() -> None:
    def orchestrate(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.commands.main", "sandbox", *arguments, "--name", f"{NAME}-g"],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    started = orchestrate("start", "--nodes", "2", "--json")
    assert started.returncode == 0, started.stderr
    conf = json.loads(started.stdout)["slurm_conf"]
    shown = json.loads(orchestrate("status", "--json").stdout)
    assert shown == {"name": f"{NAME}-g", "slurm_conf": conf, "nodes": {"n001": "idle", "n002": "idle"}, "jobs": []}
    assert "2 idle" in orchestrate("status").stdout
    assert "is gone" in orchestrate("stop").stdout
    assert orchestrate("status").returncode == 3


# A launch on it.


def settings_on(cluster: str, runs: Path, corpus: Path, *overrides: str) -> RunSettings:
    return compose(
        "demo-base",
        [
            *SMALL, f"data.train={corpus / 'train'}", f"data.validation={corpus / 'validation'}", f"paths.runs={runs}",
            "name=on-slurm", f"cluster={cluster}", "cluster.nodes=2", *overrides,
        ],
    )  # fmt: skip


def test_a_launched_job_saves_at_the_warning_is_requeued_by_slurm_and_saves_again_when_it_is_cancelled(
    slurm: Sandbox, tmp_path: Path, corpus: Path
) -> None:
    settings = settings_on("sandbox", tmp_path / "runs", corpus, "tokens=100000000")
    run = launch(make_plan(settings), "a test")
    wait_for("step 5", lambda: step_of(run) >= 5, run)
    (job,) = [record["job_id"] for record in run.submissions()]
    slurm.ask("scancel", "--batch", "--signal=USR2", str(job))  # what --signal=B:USR2 sends before the time limit
    wait_for("the second attempt's steps", lambda: len(run.attempts()) == 2 and _has_begun(run), run)
    first = run.attempts()[0].read_outcome()
    assert first is not None
    assert (first["cause"], first["action"]) == ("time_limit", "requeue")
    records = [attempt.read_job() for attempt in run.attempts()]
    assert [(record["job_id"], record["restart_count"]) for record in records if record] == [(job, 0), (job, 1)]
    assert complete_checkpoints(run)[-1].step == first["last_step"]

    cancel(run)
    status = wait_to_end(run)
    assert status.state == State.CANCELLED
    assert complete_checkpoints(run)[-1].step == status.step  # it saved before it left
    wait_until(lambda: slurm.ask("squeue", "--noheader").strip() == "")
    assert slurm.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip() == "CANCELLED"
    later = read_status(run)
    assert (later.state, later.attempts) == (State.CANCELLED, 2)
    assert not run.supervisor_lock.exists()


def _has_begun(run: RunDirectory) -> bool:
    return '"kind":"step"' in run.attempts()[1].events.read_text() if run.attempts()[1].events.exists() else False
