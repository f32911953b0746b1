"""Agents on a real Slurm's nodes: what is wrong is found, a death is seen within seconds, and nobody else gets in."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import RunError
from orchestrator.settings import ClusterSettings, NodeCheckSettings
from orchestrator.slurm import node_agent, sandbox
from orchestrator.slurm.memory import killed_since
from orchestrator.slurm.node_checks import Finding, judge
from orchestrator.slurm.node_watch import NodeWatch
from orchestrator.slurm.sandbox import Sandbox
from tests.conftest import REPOSITORY
from tests.slurm_runs import needs_root, needs_slurm

NAME = f"watch-{os.getpid()}"
NODES = sandbox.node_names(4)
CLUSTER = ClusterSettings(name="test", scheduler="slurm", device="cpu", ranks_per_node=1, one_machine=True)
SECONDS = 30.0


def settings(**checks: object) -> ClusterSettings:
    return dataclasses.replace(CLUSTER, checks=NodeCheckSettings(**checks))  # type: ignore[arg-type]


def wait_until(what: str, condition: Callable[[], bool], seconds: float = SECONDS) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def findings(watch: NodeWatch, nodes: Sequence[str], cluster: ClusterSettings) -> list[Finding]:
    return judge(nodes, watch.wait_for_reports(nodes, SECONDS), cluster)


# Agents started here by hand; Slurm's name of a node is all that tells them apart.

LOCAL = ["a", "b", "c"]


class Agents:
    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, watch: NodeWatch, nodes: Sequence[str], **environment: str) -> None:
        for node in nodes:
            self.processes[node] = subprocess.Popen(
                watch.agent_command(sys.executable),
                env={**os.environ, **watch.agent_environment(), "SLURMD_NODENAME": node, **environment},
                stderr=subprocess.PIPE,
                text=True,
            )

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    made.end()


def test_nodes_that_are_fit_report_every_check_and_leave_when_the_supervisor_does(
    tmp_path: Path, agents: Agents
) -> None:
    with NodeWatch(LOCAL, CLUSTER, tmp_path / "nodes") as watch:
        agents.start(watch, LOCAL)
        reports = watch.wait_for_reports(LOCAL, SECONDS)
        assert all(report.is_complete for report in reports.values())
        names = {check.__name__ for check in node_agent.CHECKS if check not in node_agent.GPU_CHECKS}
        assert set(reports["a"].measures) == names | {"clock_skew"}
        assert reports["a"].measures["clock_skew"].value < 0.5
        assert judge(LOCAL, reports, CLUSTER) == []
        assert watch.silent() == {}
        secret = watch.agent_environment()[node_agent.TOKEN_VARIABLE]
        assert not any(secret in part for process in agents.processes.values() for part in process.args)
    assert [process.wait(timeout=5) for process in agents.processes.values()] == [0, 0, 0]
    with pytest.raises(RunError, match="the node watch has ended"):  # rather than that all is well
        watch.silent()


HOSTS_A_WATCH = """
import json, sys
from pathlib import Path
from orchestrator.settings import ClusterSettings
from orchestrator.slurm.node_watch import NodeWatch
cluster = ClusterSettings(name="test", scheduler="slurm", device="cpu", one_machine=True)
with NodeWatch(["a"], cluster, Path(sys.argv[1]), [sys.executable, "-c", f"open({sys.argv[2]!r}, 'w')"]) as watch:
    print(json.dumps([watch.agent_command(sys.executable), watch.agent_environment()]), flush=True)
    assert watch.wait_for_reports(["a"], 30)["a"].is_complete
    print("heard", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_an_agent_becomes_the_deputy_of_a_supervisor_that_is_gone_and_of_none_that_leaves(
    tmp_path: Path, is_killed: bool
) -> None:
    acted = tmp_path / "acted"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", HOSTS_A_WATCH, str(tmp_path / "nodes"), str(acted)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert supervisor.stdin is not None and supervisor.stdout is not None
    command, environment = json.loads(supervisor.stdout.readline())
    agent = subprocess.Popen(command, env={**os.environ, **environment, "SLURMD_NODENAME": "a"})
    try:
        assert supervisor.stdout.readline() == "heard\n"
        if is_killed:
            supervisor.kill()
        supervisor.stdin.close()
        assert agent.wait(timeout=30) == 0
        assert acted.exists() == is_killed
    finally:
        for process in (supervisor, agent):
            process.kill()
            process.wait()
        supervisor.stdout.close()


def test_agents_tell_how_many_processes_their_kernel_has_killed_for_memory(tmp_path: Path, agents: Agents) -> None:
    with NodeWatch(LOCAL, CLUSTER, tmp_path / "nodes") as watch:
        agents.start(watch, LOCAL)
        wait_until("three beats", lambda: len(watch.oom_kills()) == 3)
        assert set(watch.oom_kills().values()) == {node_agent.oom_kills()}
    assert killed_since({"a": 1, "b": 1}, {"a": 1, "b": 3, "c": 9}).keys() == {"b"}


def test_a_check_that_hangs_holds_up_no_other_and_a_sites_own_is_named_with_its_last_line(
    tmp_path: Path, agents: Agents
) -> None:
    marker = f"sleep 7{os.getpid()}"
    own = {"hangs": marker, "licence": "echo looking; echo no licence server >&2; exit 3", "fine": "echo good"}
    cluster = settings(own=own, seconds=4)
    with NodeWatch(LOCAL[:1], cluster, tmp_path / "nodes") as watch:
        nonce = tmp_path / "nodes" / node_agent.NONCE
        nonce.unlink()
        os.mkfifo(nonce)  # reading it never returns, as on a disk that hangs
        agents.start(watch, LOCAL[:1])
        found = findings(watch, LOCAL[:1], cluster)
        assert {f.check: f.message for f in found} == {
            "hangs": "did not end within 3 s", "licence": "no licence server", "run_folder": "the check hangs",
        }  # fmt: skip
        assert "cluster.checks.own.licence" in next(f.remedy for f in found if f.check == "licence")
        assert watch.silent() == {}
    assert agents.processes["a"].wait(timeout=5) == 0
    assert not any(marker in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))


def test_a_gpu_cluster_without_nvidia_smi_fails_but_leaves_out_what_it_is_told_to(
    tmp_path: Path, agents: Agents
) -> None:
    cluster = dataclasses.replace(settings(without=("xid", "gpu_clock")), device="cuda", ranks_per_node=8)
    with NodeWatch(LOCAL[:1], cluster, tmp_path / "nodes") as watch:
        agents.start(watch, LOCAL[:1], PATH=str(tmp_path))
        found = findings(watch, LOCAL[:1], cluster)
    assert {f.check for f in found} == {"gpu_count", "gpu_memory", "gpu_throttled", "ecc_errors", "row_remap"}
    assert {f.message for f in found} == {"there is no nvidia-smi"}


def test_an_agent_held_up_for_two_seconds_is_alive_and_one_held_up_for_longer_than_the_limit_is_not(
    tmp_path: Path, agents: Agents
) -> None:
    cluster = settings(silent_seconds=4.0)
    with NodeWatch(LOCAL, cluster, tmp_path / "nodes") as watch:
        agents.start(watch, LOCAL)
        watch.wait_for_reports(LOCAL, SECONDS)
        held = agents.processes["b"]
        held.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            assert watch.silent() == {}
            time.sleep(0.02)
        held.send_signal(signal.SIGCONT)
        watch.recheck(["b"])
        assert watch.wait_for_reports(["b"], SECONDS)["b"].is_complete  # it answers again
        held.send_signal(signal.SIGSTOP)
        took = wait_until("the silence", lambda: "b" in watch.silent())
        assert 2.5 < took < 8.0
        assert watch.silent().keys() == {"b"}
        assert "nothing was heard" in watch.silent()["b"]
        held.send_signal(signal.SIGCONT)
        wait_until("its return", lambda: watch.silent() == {})


STALLED = """
import json, subprocess, sys, time, os
from pathlib import Path
from orchestrator.settings import *
from orchestrator.slurm.node_watch import NodeWatch
cluster = ClusterSettings(name="test", scheduler="slurm", device="cpu", ranks_per_node=1, one_machine=True,
                          checks=NodeCheckSettings(silent_seconds=3.0))
watch = NodeWatch(["a", "b"], cluster, Path(sys.argv[1]))
for node in ("a", "b"):
    subprocess.Popen(watch.agent_command(sys.executable),
                     env={**os.environ, **watch.agent_environment(), "SLURMD_NODENAME": node})
watch.wait_for_reports(["a", "b"], 30)
while True:
    print(time.monotonic(), json.dumps(watch.silent()), flush=True)
"""


def test_a_supervisor_that_was_itself_held_up_blames_nobody(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, str(tmp_path / "nodes")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(6.0)  # the stall itself
        resumed = time.monotonic()
        process.send_signal(signal.SIGCONT)
        for line in process.stdout:
            when, _, silent = line.partition(" ")
            assert json.loads(silent) == {}
            if float(when) > resumed + 1.0:
                break
    finally:
        process.kill()
        process.communicate()


# Strangers.


def talk(watch: NodeWatch, *lines: bytes) -> bytes:
    """What a stranger hears until it is dropped; its greeting is left out."""
    with socket.create_connection(("127.0.0.1", watch.port), timeout=10) as connection:
        reader = connection.makefile("rb")
        reader.readline()
        try:
            for line in lines:
                connection.sendall(line)
            return reader.read()
        except ConnectionError:
            return b""


def test_nothing_that_strangers_send_is_answered_or_keeps_the_nodes_from_being_heard(
    tmp_path: Path, agents: Agents
) -> None:
    with NodeWatch(LOCAL, CLUSTER, tmp_path / "nodes") as watch:
        guess = json.dumps({"node": "a", "challenge": "x", "proof": "0" * 64}).encode() + b"\n"
        for said in (
            b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe\x00\n", b"[]\n", b"1\n", b"{}\n", b'{"beat": true}\n', guess,
            b"[" * 60_000 + b"\n", b"x" * 300_000, b'{"node": {"a": 1}, "proof": 7}\n',
        ):  # fmt: skip
            assert talk(watch, said) == b""
        mute = [socket.create_connection(("127.0.0.1", watch.port)) for _ in range(300)]
        assert watch.reports() == {}
        agents.start(watch, LOCAL)
        assert findings(watch, LOCAL, CLUSTER) == []
        for connection in mute:
            connection.close()
        assert talk(watch, guess) == b""
        assert watch.silent() == {}


@contextlib.contextmanager
def greet(watch: NodeWatch, node: str, token: str) -> Iterator[tuple[socket.socket, Callable[[], dict[str, object]]]]:
    """Pose as an agent."""
    connection = socket.create_connection(("127.0.0.1", watch.port), timeout=10)
    reader = connection.makefile("rb")
    challenge = str(json.loads(reader.readline())["challenge"])
    answer = {"node": node, "challenge": "c", "proof": node_agent.proof(token, "agent", node, challenge)}
    connection.sendall(json.dumps(answer).encode() + b"\n")

    def read() -> dict[str, object]:
        line = reader.readline()
        return json.loads(line) if line else {}

    with connection, reader:
        yield connection, read


def test_a_node_with_another_clock_is_named_and_a_node_of_another_job_is_not_heard(tmp_path: Path) -> None:
    cluster = settings(without=tuple(check.__name__ for check in node_agent.CHECKS))
    with NodeWatch(["a"], cluster, tmp_path / "nodes") as watch, contextlib.ExitStack() as posing:
        token = watch.agent_environment()[node_agent.TOKEN_VARIABLE]
        with greet(watch, "z", token) as (_, read):
            assert read() == {}
        connection, read = posing.enter_context(greet(watch, "a", token))
        first = read()
        assert first["proof"] == node_agent.proof(token, "supervisor", "a", "c")
        connection.sendall(b'{"round": 1, "done": true}\n')
        while not watch.wait_for_reports(["a"], 0)["a"].is_complete:
            ping = read()["ping"]
            connection.sendall(json.dumps({"pong": ping, "time": time.time() + 90}).encode() + b"\n")
            if ping == 4:
                watch.wait_for_reports(["a"], SECONDS)
        (found,) = findings(watch, ["a"], cluster)
        assert found.check == "clock_skew"
        assert found.message.startswith("90 s beside the first node, should be at most 5")
        connection.shutdown(socket.SHUT_RDWR)
        wait_until("the end of its connection", lambda: watch.silent() == {"a": "its connection was closed"}, 2.0)


def test_an_agent_does_not_obey_who_does_not_know_the_token(agents: Agents, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as pretender:
        command = [sys.executable, "-I", "-S", node_agent.__file__, "127.0.0.1", str(pretender.getsockname()[1])]
        environment = {**os.environ, node_agent.TOKEN_VARIABLE: "secret", "SLURMD_NODENAME": "a"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        agents.processes["a"] = process
        connection, _ = pretender.accept()
        with connection:
            connection.sendall(b'{"challenge": "c"}\n')
            mark = tmp_path / "obeyed"
            request = {
                "round": 1, "device": "cpu", "folder": str(tmp_path), "answer": "", "seconds": 5, "without": [],
                "own": {"obeys": f"touch {mark}"},
            }  # fmt: skip
            connection.sendall(json.dumps({"proof": "0" * 64, "checks": request}).encode() + b"\n")
            assert process.wait(timeout=20) == 1
    assert process.stderr is not None
    assert "not this job's supervisor" in process.stderr.read()
    assert not mark.exists()


# On a real Slurm.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sandbox]:
    started = sandbox.start(NAME, nodes=len(NODES))
    yield started
    sandbox.stop(NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "nodes"


@pytest.fixture
def srun() -> Iterator[Callable[[Sandbox, NodeWatch], "subprocess.Popen[bytes]"]]:
    """Start the agents of a watch on all nodes by one srun."""
    started: list[subprocess.Popen[bytes]] = []

    def start(cluster: Sandbox, watch: NodeWatch) -> "subprocess.Popen[bytes]":
        options = ["--overlap", "--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--ntasks-per-node=1"]
        process = subprocess.Popen(
            ["srun", f"--nodes={len(NODES)}", *options, *watch.agent_command(sys.executable)],
            env={**cluster.environment(), **watch.agent_environment()},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


def on_node(cluster: Sandbox, node: str, *command: str) -> None:
    """Run a command with a node's view of the disks."""
    daemon = next(daemon for daemon in cluster.daemons if daemon.name == node)
    subprocess.run(["nsenter", f"--target={daemon.process}", "--mount", *command], check=True)


class Disks:
    """Small disks of its own over folders of one node."""

    def __init__(self, cluster: Sandbox) -> None:
        self._cluster = cluster
        self._mounted: list[tuple[str, Path]] = []

    def mount(self, node: str, path: Path, options: str) -> None:
        on_node(self._cluster, node, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path))
        self._mounted.append((node, path))

    def unmount(self, node: str, path: Path) -> None:
        self._mounted.remove((node, path))
        on_node(self._cluster, node, "umount", str(path))

    def unmount_all(self) -> None:
        for node, path in list(self._mounted):
            self.unmount(node, path)


@pytest.fixture
def disks(cluster: Sandbox) -> Iterator[Disks]:
    made = Disks(cluster)
    yield made
    made.unmount_all()


@needs_slurm
@needs_root
def test_full_disks_and_a_folder_that_is_not_shared_are_found_and_recovered_nodes_pass_again(
    cluster: Sandbox,
    folder: Path,
    srun: Callable[[Sandbox, NodeWatch], "subprocess.Popen[bytes]"],
    disks: Disks,
) -> None:
    with NodeWatch(NODES, CLUSTER, folder) as watch:
        disks.mount("n001", Path("/dev/shm"), "size=1m")
        disks.mount("n002", folder, "size=2000m")  # another disk at the same place
        disks.mount("n003", folder, "size=2000m")  # and one that even has the same file in it, of another day
        on_node(cluster, "n003", "sh", "-c", f"echo of another day > {folder}/{node_agent.NONCE}")
        step = srun(cluster, watch)
        found = findings(watch, NODES, CLUSTER)
        by_node = {f.node: (f.check, f.message) for f in found}
        assert by_node["n001"][0] == "shared_memory"
        assert "GB free, should be at least 0.05" in by_node["n001"][1]
        assert by_node["n002"] == (
            "run_folder",
            f"{folder} is not the supervisor's: what it wrote there is not seen here",
        )
        assert by_node["n003"] == ("run_folder", f"{folder} there is another folder than here")
        assert len(found) == 3
        assert all("mount the same shared file system" in f.remedy for f in found if f.check == "run_folder")

        disks.unmount("n002", folder)
        disks.mount("n002", folder, "size=2000m,ro")  # what is left of it cannot be written
        disks.unmount("n001", Path("/dev/shm"))
        watch.recheck(["n001", "n002"])
        again = {f.node: f.check for f in findings(watch, NODES, CLUSTER)}
        assert again == {"n002": "run_folder", "n003": "run_folder"}
    assert step.wait(timeout=10) == 0


@needs_slurm
@needs_root
def test_a_node_that_dies_is_silent_within_seconds_and_the_others_are_heard_on(
    folder: Path, srun: Callable[[Sandbox, NodeWatch], "subprocess.Popen[bytes]"]
) -> None:
    own = sandbox.start(f"{NAME}-b", nodes=len(NODES))
    try:
        with NodeWatch(NODES, CLUSTER, folder) as watch:
            srun(own, watch)
            assert findings(watch, NODES, CLUSTER) == []
            sandbox.kill_node(own, "n003")
            took = wait_until("the death", lambda: bool(watch.silent()), 5.0)
            assert watch.silent() == {"n003": "its connection was closed"}
            assert took < 3.0
            others = ["n001", "n002", "n004"]
            watch.recheck(NODES)
            assert findings(watch, others, CLUSTER) == []
            assert watch.silent().keys() == {"n003"}
    finally:
        sandbox.stop(f"{NAME}-b")
