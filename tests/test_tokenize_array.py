"""Tokenization by a job array on a real Slurm of our own; what happens to tasks and coordinators is caused for real."""

import contextlib
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.config import load_cluster
from orchestrator.errors import ConfigError, SchedulerError
from orchestrator.files import read_json
from orchestrator.settings import ClusterSettings, SlurmSettings
from orchestrator.slurm import sandbox
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.tokenize_array import (
    ArrayRequest,
    TaskEnd,
    array_script,
    divide,
    job_name,
    parse_sacct,
    ranges,
)
from orchestrator.slurm.tokenize_tasks import ask_ends, carry_out_by, check_array
from orchestrator.tokenize.manifest import DatasetManifest
from orchestrator.tokenize.stage import tokenize_corpus
from orchestrator.tokenize.work_folder import WorkFolder
from tests.conftest import REPOSITORY
from tests.slurm_runs import needs_accounting, needs_slurm
from tests.tokenize_corpora import SETTINGS, TOKENIZER, contents, undisturbed, wait_within, write_lines

DEADLINE_SECONDS = 90.0
wait_until = functools.partial(wait_within, DEADLINE_SECONDS)
TASKS = 4
ORCHESTRATE = Path(sys.executable).with_name("orchestrate")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus` and what one process, undisturbed, makes of it."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def tokenize(corpus: Path, output: Path, *, tasks: int = TASKS, **settings: Any) -> DatasetManifest:
    request = ArrayRequest(cluster=load_cluster("sandbox"), tasks=tasks, workers=1)
    wanted = {"carry_out": carry_out_by(request), **SETTINGS, **settings}
    return tokenize_corpus([corpus], TOKENIZER, output, **wanted)


@contextlib.contextmanager
def coordinator(corpus: Path, output: Path, folder: Path, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """Start the same in a process of its own; exit code 0, or 1 with the error on stdout; notices are in `folder`."""
    program = (
        "from pathlib import PosixPath\nfrom orchestrator.errors import OrchestrateError\n"
        "from tests.test_tokenize_array import tokenize\n"
        f"try:\n    tokenize({corpus!r}, {output!r})\n"
        "except OrchestrateError as error:\n    print(type(error).__name__, error)\n    raise SystemExit(1)\n"
    )
    with (folder / "notices").open("w") as notices, subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=notices,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def array_of(output: Path) -> dict[str, Any]:
    path = WorkFolder(output.with_name(f"{output.name}.partial")).array
    return dict(read_json(path)) if path.exists() else {}


def wait_for_job(output: Path) -> str:
    return str(wait_until(lambda: array_of(output).get("job_id")))


def states(slurm: Sandbox, job: str) -> dict[str, str]:
    """Return the states of an array's tasks as Slurm has them."""
    listed = slurm.ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
    return dict(line.split() for line in listed.splitlines())


def jobs(slurm: Sandbox) -> set[str]:
    return set(slurm.ask("squeue", "--noheader", "--states=all", "--format=%F").split())


def keep_waiting(slurm: Sandbox) -> None:
    """Have no task start any more until `let_start`."""
    slurm.ask("scontrol", "update", f"partitionname={sandbox.PARTITION}", "state=down")


def let_start(slurm: Sandbox) -> None:
    slurm.ask("scontrol", "update", f"partitionname={sandbox.PARTITION}", "state=up")


def task_process(output: Path, task: int) -> psutil.Process | None:
    """Return the main process of a task, as soon as it is there."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if f"{output}.partial" in words and words[-2:] == ["--task", str(task)]:
                return process
    return None


# --- What is asked


def test_units_are_divided_so_that_the_fullest_task_has_as_few_as_can_be() -> None:
    def divided(left: Sequence[int], tasks: int, workers: int = 16) -> tuple[int, str, int]:
        found = divide(left, ArrayRequest(cluster=load_cluster("sandbox"), tasks=tasks, workers=workers))
        assert {unit % found.tasks for unit in left} == set(found.numbers)
        return found.tasks, ranges(found.numbers), found.workers

    assert divided(range(1024), 64) == (64, "0-63", 16)
    assert divided(range(12), 4) == (4, "0-3", 3)
    assert divided(range(5), 64) == (5, "0-4", 1), "no more tasks than units"
    assert divided([3, 7, 11], 4) == (3, "0-2", 1), "those of one task that failed, among three"
    assert divided([9], 64) == (1, "0", 1)
    assert divided([1, 2, 3, 8, 9], 2, workers=2) == (2, "0-1", 2)


SITE = ClusterSettings(
    name="site", scheduler="slurm", device="cuda", nodes=32, partition="cpu", account="solar", time_limit="4:00:00",
    slurm=SlurmSettings(
        qos="long", reservation="maintenance", constraint="avx512", exclude=("n004", "n007"), exclusive=True,
        memory="0", requeue=False, modules=("python/3.11",), setup=("ulimit -n 4096",),
        sbatch_lines=("--comment=a word",), cpus_per_rank=12, switches="2",
    ),
)  # fmt: skip


@needs_slurm  # Submitit looks for srun before it writes a script
def test_the_array_s_script_is_the_golden_one(request: pytest.FixtureRequest) -> None:
    folder = WorkFolder(Path("/shared/100% text/data.partial"))
    wanted = ArrayRequest(cluster=SITE, tasks=8, workers=4)
    script = array_script(folder, wanted, divide([*range(40), 47], wanted), job_name("100% text", "0a1b2c3d"))
    text = script.text().replace(sys.executable, "PYTHON")
    golden = REPOSITORY / "tests" / "golden" / "tokenize-array.sh"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text(), "run pytest with --update-golden after looking at the difference"


def test_what_cannot_do_the_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--cluster local has no Slurm.*set --workers"):
        check_array(ArrayRequest(cluster=load_cluster("local")), [])
    with pytest.raises(ConfigError, match=r"(?s)lies on a disk of this machine alone.*one_machine"):
        check_array(ArrayRequest(cluster=load_cluster("h100")), [tmp_path / "data"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SchedulerError, match="no `sbatch` on this machine"):
        check_array(ArrayRequest(cluster=load_cluster("sandbox")), [tmp_path])


# --- The same bytes


@needs_slurm
def test_an_array_gives_the_bytes_of_one_process_and_nothing_is_submitted_where_all_is_done(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path
) -> None:
    slurm = start_slurm(nodes=2)

    class StoppedError(Exception):
        pass

    def by_array_then_stopped(folder: WorkFolder, look: Callable[[], None]) -> None:
        carry_out_by(ArrayRequest(cluster=load_cluster("sandbox"), tasks=TASKS, workers=2))(folder, look)
        raise StoppedError

    with pytest.raises(StoppedError):
        tokenize(expected / "corpus", tmp_path / "expected", carry_out=by_array_then_stopped)
    array = array_of(tmp_path / "expected")
    assert (array["tasks"], array["array"], array["workers"]) == (4, "0-3", 2)
    wait_until(lambda: set(states(slurm, array["job_id"]).values()) == {"COMPLETED"})
    assert len(states(slurm, array["job_id"])) == TASKS
    tokenize(expected / "corpus", tmp_path / "expected")
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert jobs(slurm) == {array["job_id"]}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


# --- Tasks that end


@needs_slurm
def test_tasks_that_were_killed_are_told_and_the_same_command_submits_what_is_left(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "expected"
    keep_waiting(slurm)
    with coordinator(expected / "corpus", output, tmp_path) as process:
        job = wait_for_job(output)
        slurm.ask("scancel", f"{job}_2")
        let_start(slurm)
        wait_until(lambda: task_process(output, 1)).kill()
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1, said
    assert f"OrchestrateError job {job} has ended" in said
    assert "of 2 of its tasks are not done" in said
    assert "task 1: FAILED, signal 9, on n001" in said
    assert "task 2: Slurm has no record of it, so it was cancelled before it began" in said
    assert "the same command submits what is left" in said
    folder = WorkFolder(output.with_name("expected.partial"))
    done = {unit for unit in range(folder.read_plan().units) if folder.read_record(unit).state == "done"}
    assert done == {unit for unit in range(folder.read_plan().units) if unit % TASKS in (0, 3)}

    tokenize(expected / "corpus", output)
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert len(jobs(slurm)) == 2


@needs_slurm
def test_what_a_task_says_of_its_failure_stands_in_the_error(
    start_slurm: Callable[..., Sandbox], tmp_path: Path
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "data"
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [f"text {name} {number}" for number in range(4000)])
    keep_waiting(slurm)
    with coordinator(tmp_path, output, tmp_path) as process:
        job = wait_for_job(output)
        (tmp_path / "b.jsonl").unlink()
        let_start(slurm)
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1, said
    log = f"{output}.partial/logs/{job}_1.log"
    assert f"FAILED, exit code 1, on n001; {log} ends:\n" in said
    assert "DataError: unit 1" in said
    assert "b.jsonl" in said


@needs_slurm
def test_preempted_tasks_go_on_by_themselves(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "expected"
    with coordinator(expected / "corpus", output, tmp_path) as process:
        for task in range(TASKS):  # so that none ends before
            wait_until(functools.partial(task_process, output, task)).send_signal(signal.SIGSTOP)
        options = [f"--partition={sandbox.URGENT}", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=true"]
        slurm.ask("sbatch", *options)
        job = array_of(output)["job_id"]
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert len(jobs(slurm)) == 2, "the urgent one and ours"
    shown = slurm.ask("scontrol", "show", "job", "--oneliner", job)
    assert shown.count("Restarts=1") == TASKS


@needs_slurm
def test_a_controller_that_dies_stops_neither_the_tasks_nor_who_follows_them(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "expected"
    with coordinator(expected / "corpus", output, tmp_path) as process:
        tasks = [wait_until(functools.partial(task_process, output, task)) for task in range(TASKS)]
        for task in tasks:
            task.send_signal(signal.SIGSTOP)
        sandbox.stop_controller(slurm)
        wait_until(lambda: "Slurm does not answer" in (tmp_path / "notices").read_text())
        for task in tasks:
            task.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    assert contents(tmp_path, "expected") == contents(expected, "expected")


@needs_slurm
@needs_accounting
def test_accounting_and_controller_tell_the_same_of_how_tasks_ended(
    start_slurm: Callable[..., Sandbox], tmp_path: Path
) -> None:
    slurm = start_slurm(nodes=1, accounting=True)
    (tmp_path / "job.sh").write_text("#!/bin/sh\nexit $SLURM_ARRAY_TASK_ID\n")
    job = slurm.ask("sbatch", "--parsable", "--array=0,3", "--output=/dev/null", str(tmp_path / "job.sh")).strip()
    wait_until(lambda: states(slurm, job) == {"0": "COMPLETED", "3": "FAILED"})
    ends = {
        0: TaskEnd(state="COMPLETED", exit_code="0:0", node="n001"),
        3: TaskEnd(state="FAILED", exit_code="3:0", node="n001"),
    }
    assert ask_ends(job) == ends
    listed = ("sacct", "--noheader", "--parsable2", "-X", f"--jobs={job}", "--format=JobID,State,ExitCode,NodeList")
    wait_until(lambda: parse_sacct(slurm.ask(*listed)) == ends)


# --- Coordinators that end


@needs_slurm
def test_a_killed_coordinator_leaves_the_array_and_the_same_command_follows_it(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "expected"
    keep_waiting(slurm)
    with coordinator(expected / "corpus", output, tmp_path) as process:
        job = wait_for_job(output)
        process.kill()
        process.communicate()
    with monkeypatch.context() as silent:
        silent.setenv("PATH", "/nowhere")
        with pytest.raises(SchedulerError, match=f"whether job {job} still works .* nothing is submitted twice"):
            tokenize(expected / "corpus", output)
    let_start(slurm)
    tokenize(expected / "corpus", output, tasks=2)
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert jobs(slurm) == {job}


@needs_slurm
def test_a_coordinator_killed_between_submission_and_record_submits_nothing_twice(
    start_slurm: Callable[..., Sandbox], tmp_path: Path, expected: Path
) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "expected"
    keep_waiting(slurm)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "sbatch"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --test-only) exec {shutil.which("sbatch")} "$@";; esac\n'
        f'{shutil.which("sbatch")} "$@" > /dev/null\nkill -KILL $(ps -o ppid= -p $PPID)\nexit 1\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = f"{script.parent}:{os.environ['PATH']}"
    with coordinator(expected / "corpus", output, tmp_path, PATH=path) as process:
        process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert array_of(output)["job_id"] is None
    (job,) = jobs(slurm)
    let_start(slurm)
    tokenize(expected / "corpus", output)
    assert contents(tmp_path, "expected") == contents(expected, "expected")
    assert jobs(slurm) == {job}


@needs_slurm
def test_too_many_bad_records_cancel_the_tasks(start_slurm: Callable[..., Sandbox], tmp_path: Path) -> None:
    slurm, output = start_slurm(nodes=1), tmp_path / "data"
    (tmp_path / "a.jsonl").write_bytes(b"no JSON\n" * 20_000)
    for name in "bcd":
        write_lines(tmp_path / f"{name}.jsonl", [f"text {name} {number}" for number in range(4000)])
    keep_waiting(slurm)
    with coordinator(tmp_path, output, tmp_path) as process:
        job = wait_for_job(output)
        last = str(array_of(output)["tasks"] - 1)
        slurm.ask("scontrol", "hold", f"{job}_{last}")
        let_start(slurm)
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "DataError" in said
    assert f"job {job} was cancelled" in (tmp_path / "notices").read_text()
    wait_until(lambda: states(slurm, job)[last] == "CANCELLED")


# --- The command


@needs_slurm
def test_the_command_submits_says_how_to_go_on_at_a_ctrl_c_and_publishes_when_given_again(
    start_slurm: Callable[..., Sandbox], tmp_path: Path
) -> None:
    slurm = start_slurm(nodes=1)
    write_lines(tmp_path / "text.jsonl", [f"text {number}" for number in range(100)])
    command = [str(ORCHESTRATE), "tokenize", "text.jsonl", "--tokenizer", str(TOKENIZER), "--output", "data"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
        )

    result = run("--tasks", "3")
    assert (result.returncode, "--tasks is for --cluster" in result.stderr) == (2, True)
    result = run("--cluster", "sandbox", "--dry-run")
    assert "#SBATCH --array=0\n" in result.stdout
    assert "orchestrate-tokenize-data-TOKEN" in result.stdout
    result = run("--cluster", "sandbox", "--partition", "nope")
    assert result.returncode == 3, result.stderr
    assert "invalid partition specified: nope" in result.stderr
    assert "the partitions here are gpu, graceful, urgent; set --partition" in result.stderr
    slurm.ask("scontrol", "update", f"partitionname={sandbox.PARTITION}", "maxtime=30")
    result = run("--cluster", "sandbox")
    assert result.returncode == 2
    assert "a time limit of 1:00:00 is more than partition gpu gives" in result.stderr
    assert "give --time 0:30:00, or less" in result.stderr
    assert jobs(slurm) == set()

    keep_waiting(slurm)
    options = ["--cluster", "sandbox", "--time", "0:20:00"]
    with subprocess.Popen([*command, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        job = wait_for_job(tmp_path / "data")
        assert process.stderr is not None
        waits = next(line for line in process.stderr if "waits" in line)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert waits == f"job {job} waits: Slurm says PartitionDown\n"
    assert process.returncode == 130
    assert f"job {job} goes on by itself; the same command follows it" in said
    assert f"`scancel {job}` ends it" in said
    assert states(slurm, job) == {"0": "PENDING"}
    let_start(slurm)
    result = run(*options)
    assert result.returncode == 0, result.stderr
    assert jobs(slurm) == {job}
    assert "documents    100 of 100 read" in result.stdout
