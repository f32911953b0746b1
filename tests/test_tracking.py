"""Events to MLflow: each step once whatever happens, over real stores and a real server."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.checkpoints import checkpoint_name
from orchestrator.errors import OrchestrateError, TrackingError
from orchestrator.events import (
    CheckpointEvent,
    Event,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
    event_record,
)
from orchestrator.files import JsonLines, write_json
from orchestrator.owner_lock import hold
from orchestrator.run_directory import AttemptDirectory, RunDirectory, create_run
from orchestrator.shipment import BATCH_METRICS, LONGEST_PARAM, STEP_METRICS, ShipReport
from orchestrator.tracking import follow, ship
from orchestrator.tracking_store import load_mlflow

# mlflow 3.17 leaves SQLite connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

STARTED = 1_800_000_000.0
DEADLINE_SECONDS = 90.0


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store with its tables, copied by each test, since making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    load_mlflow().MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, migrated_store: Path) -> Path:
    """A test's own store."""
    return Path(shutil.copy(migrated_store, tmp_path / "mlflow.db"))


@pytest.fixture
def run(tmp_path: Path, store: Path) -> RunDirectory:
    """A run in the test's own store, without attempts."""
    return make_run(tmp_path / "runs", f"sqlite:///{store}")


def make_run(runs: Path, uri: str, name: str = "deepened") -> RunDirectory:
    run = create_run(runs, name)
    settings = {
        "name": name,
        "model": {"num_layers": 48, "note": "x" * 7000},
        "data": {"train": ["/data/a", "/data/b"]},
        "cluster": {"environment": {"TOKEN": "hush"}},
        "tracking": {"uri": uri, "experiment": "tests"},
        "paths": {"runs": str(runs)},
    }
    write_json(run.launched_plan, {"settings": settings, "total_steps": 40, "fingerprint": "abc"})
    return run


def append(path: Path, events: Sequence[Event]) -> None:
    lines = JsonLines(path)
    for event in events:
        lines.append(event_record(event))
    lines.close()


def step_event(step: int, attempt: int = 1, loss: float | None = None) -> StepEvent:
    return StepEvent(
        time=STARTED + 1000 * attempt + step,
        step=step,
        loss=10 / step + attempt / 1e6 if loss is None else loss,
        gradient_norm=1.0,
        learning_rate=1e-4,
        consumed_samples=step * 4,
        consumed_tokens=step * 4_000_000,
        step_seconds=0.5,
        data_seconds=0.01,
        tokens_per_second=8e6,
        tokens_per_second_per_gpu=1e6,
        tflops_per_gpu=400.0,
        mfu=0.4,
    )


def start_event(attempt: int, step: int) -> StartEvent:
    return StartEvent(
        time=STARTED + 1000 * attempt,
        step=step,
        world_size=8,
        layout="tp 2",
        device="cpu",
        loaded_from="random",
        parameters=1,
        flops_per_token=6.0,
        flops_convention="causal_half",
        peak_tflops=1.0,
        peak_source="given",
        start_seconds=1.0,
        ancestry=(),
    )


def make_attempt(
    run: RunDirectory, steps: range, checkpoints: Sequence[int] = (), outcome: tuple[str, str] | None = None
) -> AttemptDirectory:
    """Write an attempt as workers and supervisor do: a validation and a checkpoint at given steps."""
    attempt = run.new_attempt()
    number = attempt.number
    write_json(attempt.job, {"job_id": "1", "started": STARTED + 1000 * number, "process": 1})
    events: list[Event] = [start_event(number, steps.start - 1)]
    for step in steps:
        moment = STARTED + 1000 * number + step
        events.append(step_event(step, number))
        if step in checkpoints:
            name = checkpoint_name(step, number)
            loss = 5 / step + number / 1e6
            of_each = {"web": loss - 0.1, "code & more": loss + 0.1}
            events.append(
                ValidationEvent(
                    time=moment, step=step, loss=loss, losses=of_each, samples=16, consumed_tokens=0, seconds=0.1
                )
            )
            events.append(
                SaveEvent(
                    time=moment,
                    step=step,
                    name=name,
                    consumed_samples=4 * step,
                    data_fingerprint="d",
                    tokenizer_sha256="t",
                    stall_seconds=1.5,
                )
            )
            marked = CheckpointEvent(
                time=moment, step=step, name=name, bytes=10**9, seconds=1.5, write_seconds=1.0, hash_seconds=0.5
            )
            append(attempt.supervisor_events, [marked])
    append(attempt.events, events)
    if outcome is not None:
        end_attempt(attempt, *outcome)
    return attempt


def end_attempt(attempt: AttemptDirectory, cause: str, action: str) -> None:
    ended = STARTED + 1000 * attempt.number + 500
    write_json(attempt.outcome, {"cause": cause, "message": "why", "action": action, "ended": ended, "submissions": 1})


def rows(store: Path, query: str) -> list[tuple[Any, ...]]:
    """Ask the database itself, as an independent reader."""
    with contextlib.closing(sqlite3.connect(store, timeout=10)) as connection:
        return connection.execute(query).fetchall()


def everything(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that a shipper writes to a store, but the times at which MLflow wrote it."""
    return {
        "runs": rows(store, "select run_uuid, name, status, start_time, end_time from runs"),
        "metrics": rows(store, "select run_uuid, key, step, timestamp, value, is_nan from metrics order by 2, 3, 4"),
        "params": rows(store, "select run_uuid, key, value from params order by key"),
        "tags": rows(store, "select run_uuid, key, value from tags order by key"),
        "models": rows(store, "select model_id, name, status from logged_models order by name"),
        "model metrics": rows(
            store, "select model_id, metric_name, metric_step, metric_value from logged_model_metrics"
        ),
        "outputs": rows(store, "select source_id, destination_id, step from inputs order by step"),
    }


def steps_of(store: Path, key: str) -> list[int]:
    return [step for (step,) in rows(store, f"select step from metrics where key = '{key}' order by step")]


def status_of(store: Path) -> str:
    ((status,),) = rows(store, "select status from runs")
    return str(status)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


def two_attempts(run: RunDirectory) -> None:
    """A run that was interrupted after step 25 and went on from the checkpoint of step 20."""
    make_attempt(run, range(1, 26), checkpoints=[10, 20], outcome=("rank_killed", "restart"))
    make_attempt(run, range(21, 41), checkpoints=[30, 40], outcome=("finished", "finish"))


def test_two_attempts_are_one_run_with_each_step_once(run: RunDirectory, store: Path) -> None:
    two_attempts(run)
    report = ship(run)
    assert rows(store, "select name, status from runs") == [("deepened", "FINISHED")]
    assert rows(store, "select start_time, end_time from runs") == [((STARTED + 1000) * 1000, (STARTED + 2500) * 1000)]
    for key in STEP_METRICS:
        assert steps_of(store, key) == list(range(1, 41)), key
    assert steps_of(store, "validation/loss") == [10, 20, 30, 40]
    for data_set in ("web", "code _ more"):
        assert steps_of(store, f"validation/{data_set}/loss") == [10, 20, 30, 40]
    assert steps_of(store, "checkpoint/stall_seconds") == [10, 20, 30, 40]
    first, repeated, later = (
        rows(store, f"select value, timestamp from metrics where key = 'train/loss' and step = {step}")[0]
        for step in (20, 23, 30)
    )
    assert first == (10 / 20 + 1e-6, (STARTED + 1020) * 1000)
    assert repeated == (10 / 23 + 1e-6, (STARTED + 1023) * 1000), "the first telling of a repeated step stays"
    assert later == (10 / 30 + 2e-6, (STARTED + 2030) * 1000)
    assert report.metrics == 10 * 40 + 3 * 4 + 2 * 4  # of each step, validation and save
    assert report.checkpoints == 4
    tags = dict(rows(store, "select key, value from tags"))
    assert tags["orchestrate.attempts"] == "2"
    assert tags["orchestrate.attempt.0001"] == "rank_killed: why"
    assert tags["orchestrate.run_path"] == str(run.path)


def test_shipping_again_changes_nothing_with_and_without_mlflow_json(run: RunDirectory, store: Path) -> None:
    two_attempts(run)
    ship(run)
    before = everything(store)
    assert ship(run).events == 0
    assert everything(store) == before
    run.mlflow.unlink()
    assert ship(run).events > 0, "all events are sent anew"
    assert everything(store) == before


def test_a_lost_store_is_rebuilt_from_the_run_folder(run: RunDirectory, store: Path, migrated_store: Path) -> None:
    two_attempts(run)
    first = ship(run)
    before = steps_of(store, "train/loss")
    shutil.copy(migrated_store, store)
    assert ship(run).run_id != first.run_id
    assert steps_of(store, "train/loss") == before
    assert len(rows(store, "select * from logged_models")) == 4


def test_a_moved_run_folder_stays_the_same_run(run: RunDirectory, store: Path, tmp_path: Path) -> None:
    two_attempts(run)
    first = ship(run)
    moved = RunDirectory(run.path.rename(tmp_path / "elsewhere"))
    assert ship(moved).run_id == first.run_id
    moved.mlflow.unlink()
    assert ship(moved).run_id == first.run_id
    assert dict(rows(store, "select key, value from tags"))["orchestrate.run_path"] == str(moved.path)


def test_a_run_launched_anew_in_the_same_folder_is_another_run(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 5))
    first = ship(run)
    shutil.rmtree(run.path)
    again = make_run(run.path.parent, f"sqlite:///{store}")
    attempt = make_attempt(again, range(1, 5))
    write_json(attempt.job, {"job_id": "2", "started": STARTED + 9999, "process": 2})
    assert ship(again).run_id != first.run_id


def test_events_appended_later_are_added_and_a_torn_last_line_waits(run: RunDirectory, store: Path) -> None:
    attempt = make_attempt(run, range(1, 6))
    ship(run)
    assert status_of(store) == "RUNNING"
    line = json.dumps(event_record(step_event(6))) + "\n"
    with attempt.events.open("a") as stream:
        stream.write(line[:40])
    ship(run)
    assert steps_of(store, "train/loss") == [1, 2, 3, 4, 5]
    with attempt.events.open("a") as stream:
        stream.write(line[40:])
    ship(run)
    assert steps_of(store, "train/loss") == [1, 2, 3, 4, 5, 6]


def test_a_damaged_line_is_an_error_after_what_lies_before_was_sent(run: RunDirectory, store: Path) -> None:
    attempt = make_attempt(run, range(1, 6))
    with attempt.events.open("a") as stream:
        stream.write("{broken\n")
    append(attempt.events, [step_event(6)])
    with pytest.raises(OrchestrateError, match="damaged at byte"):
        ship(run)
    assert steps_of(store, "train/loss") == [1, 2, 3, 4, 5]


def test_values_that_are_not_finite_are_shipped_once(run: RunDirectory, store: Path) -> None:
    attempt = make_attempt(run, range(1, 3))
    append(attempt.events, [step_event(3, loss=float("nan")), step_event(4, loss=float("inf"))])
    ship(run)
    before = everything(store)
    run.mlflow.unlink()
    ship(run)
    assert everything(store) == before
    assert rows(store, "select is_nan from metrics where key = 'train/loss' and step = 3") == [(1,)]


@pytest.mark.parametrize(
    ("cause", "action", "status"),
    [
        ("finished", "finish", "FINISHED"),
        ("cancelled", "stop", "KILLED"),
        ("exception", "stop", "FAILED"),
        ("time_limit", "requeue", "RUNNING"),
        ("rank_killed", "restart", "RUNNING"),
    ],
)
def test_the_status_follows_the_last_outcome(
    run: RunDirectory, store: Path, cause: str, action: str, status: str
) -> None:
    make_attempt(run, range(1, 3), outcome=(cause, action))
    ship(run)
    assert status_of(store) == status
    make_attempt(run, range(3, 5))
    ship(run)
    assert status_of(store) == "RUNNING", "a resumed run runs again"


def test_checkpoints_are_models_by_reference_with_the_loss_of_their_step(run: RunDirectory, store: Path) -> None:
    two_attempts(run)
    saved_when_interrupted = CheckpointEvent(
        time=STARTED + 1025,
        step=25,
        name=checkpoint_name(25, 1),
        bytes=7,
        seconds=1.0,
        write_seconds=0.5,
        hash_seconds=0.1,
    )
    append(run.attempt(1).supervisor_events, [saved_when_interrupted])
    ship(run)
    models = dict(rows(store, "select name, model_id from logged_models"))
    assert sorted(models) == [
        "step_0000010_attempt_0001",
        "step_0000020_attempt_0001",
        "step_0000025_attempt_0001",
        "step_0000030_attempt_0002",
        "step_0000040_attempt_0002",
    ]
    assert {status for (status,) in rows(store, "select status from logged_models")} == {2}, "READY"
    paths = dict(rows(store, "select model_id, param_value from logged_model_params where param_key = 'path'"))
    assert paths[models["step_0000030_attempt_0002"]] == str(run.checkpoint_path("step_0000030.attempt_0002"))
    losses = rows(store, "select metric_step, metric_value from logged_model_metrics order by metric_step")
    assert losses == [(10, 5 / 10 + 1e-6), (20, 5 / 20 + 1e-6), (30, 5 / 30 + 2e-6), (40, 5 / 40 + 2e-6)]
    outputs = rows(store, "select destination_id, step from inputs order by step")
    assert [step for _, step in outputs] == [10, 20, 25, 30, 40]
    assert steps_of(store, "validation/loss") == [10, 20, 30, 40], "the models' losses add nothing to the run's"
    assert not (store.parent / "mlflow-artifacts").exists(), "nothing was uploaded"


def test_parameters_are_the_settings_without_secrets_within_mlflows_limits(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 3))
    ship(run)
    params = dict(rows(store, "select key, value from params"))
    assert params["model.num_layers"] == "48"
    assert params["data.train"] == '["/data/a", "/data/b"]'
    assert params["plan.total_steps"] == "40"
    assert len(params["model.note"]) == LONGEST_PARAM
    assert params["cluster.environment"] == "TOKEN"
    assert "tracking.uri" not in params
    assert "hush" not in str(everything(store))


def test_a_run_without_attempts_makes_nothing(run: RunDirectory, store: Path) -> None:
    assert ship(run) == ShipReport()
    assert rows(store, "select count(*) from runs") == [(0,)]


def test_a_run_deleted_in_mlflow_is_not_brought_back(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 3))
    report = ship(run)
    load_mlflow().MlflowClient(f"sqlite:///{store}").delete_run(report.run_id)
    with pytest.raises(TrackingError, match="was deleted in MLflow"):
        ship(run)


def test_a_pass_with_no_time_left_ends_and_the_next_goes_on(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 301), outcome=("finished", "finish"))
    first = ship(run, seconds=0)
    assert not first.is_complete
    assert 0 < first.metrics <= BATCH_METRICS
    assert status_of(store) == "RUNNING"
    second = ship(run)
    assert first.metrics + second.metrics == 10 * 300
    assert steps_of(store, "train/loss") == list(range(1, 301))
    assert status_of(store) == "FINISHED"


def test_a_shipper_killed_between_batches_leaves_each_step_once(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 1001), checkpoints=[1000], outcome=("finished", "finish"))
    shipper = start_shipper(run)
    wait_until(lambda: run.mlflow.exists() and json.loads(run.mlflow.read_text())["offsets"], "a batch is sent")
    shipper.kill()
    shipper.communicate()
    assert len(steps_of(store, "train/loss")) < 1000, "it was killed on its way"
    assert run.mlflow_lock.exists(), "it left its lock behind"
    ship(run)
    assert steps_of(store, "train/loss") == list(range(1, 1001))
    assert len(rows(store, "select * from logged_models")) == 1
    assert not run.mlflow_lock.exists()


def test_the_second_of_two_shippers_leaves_politely(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 3))
    with hold(run.mlflow_lock, "shipper") as other:
        assert not other
        second = start_shipper(run)
        output, _ = second.communicate(timeout=DEADLINE_SECONDS)
        assert second.returncode == 0
        assert json.loads(output)["other_shipper"] == f"process {os.getpid()} on {socket.gethostname()}"
        assert rows(store, "select count(*) from runs") == [(0,)]
    assert ship(run).metrics == 20


@pytest.mark.parametrize("place", ["a file that is no folder", "a server that is not there", "no database"])
def test_a_store_that_is_away_is_one_error_at_once_and_hurts_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no database, and longer than the header of one" * 10)
    uri = {
        "a file that is no folder": f"sqlite:///{tmp_path}/file/mlflow.db",
        "a server that is not there": f"http://127.0.0.1:{free_port()}",
        "no database": f"sqlite:///{tmp_path}/file",
    }[place]
    run = make_run(tmp_path / "runs", uri)
    make_attempt(run, range(1, 3), outcome=("finished", "finish"))
    began = time.monotonic()
    with pytest.raises(TrackingError, match="nothing is lost"):
        ship(run)
    assert follow(run, lambda: True, 0.1) is None
    assert time.monotonic() - began < 15
    assert not run.mlflow.exists()
    assert not run.mlflow_lock.exists()


def test_a_password_in_the_address_is_never_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", f"http://me:hush@127.0.0.1:{free_port()}")
    make_attempt(run, range(1, 3))
    with pytest.raises(TrackingError) as caught:
        ship(run)
    assert "hush" not in str(caught.value)


def test_a_server_killed_and_restarted_while_following_loses_and_doubles_nothing(tmp_path: Path, store: Path) -> None:
    port = free_port()
    run = make_run(tmp_path / "runs", f"http://127.0.0.1:{port}")
    attempt = make_attempt(run, range(1, 101), checkpoints=[50])
    server = start_server(store, port)
    follower_log = tmp_path / "tracking.log"
    with follower_log.open("wb") as output:
        follower = subprocess.Popen(
            [*SHIPPER, str(run.path), "--follow", "1", "--interval", "0.3"], stdout=output, stderr=output
        )
    try:
        wait_until(lambda: len(steps_of(store, "train/loss")) == 100, "the first steps are shipped")
        kill(server)
        follower.send_signal(signal.SIGTERM)  # Slurm's warning to all processes of a job must not end it
        append(attempt.events, [step_event(step) for step in range(101, 201)])
        wait_until(lambda: "could not be shipped" in follower_log.read_text(), "the follower notices")
        server = start_server(store, port)
        wait_until(lambda: len(steps_of(store, "train/loss")) == 200, "the rest is shipped")
        append(attempt.events, [step_event(201, loss=float("nan"))])
        end_attempt(attempt, "finished", "finish")
        assert follower.wait(DEADLINE_SECONDS) == 0, follower_log.read_text()
    finally:
        kill(server)
        follower.kill()
        follower.wait()
    assert steps_of(store, "train/loss") == list(range(1, 202))
    assert steps_of(store, "validation/loss") == [50]
    assert len(rows(store, "select * from logged_models")) == 1
    assert status_of(store) == "FINISHED"


def test_a_follower_whose_supervisor_was_killed_ends(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 3))
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True); time.sleep(1000)"
    )
    command = [*SHIPPER, str(run.path), "--follow", "1", "--interval", "0.1"]
    parent = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        follower = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: steps_of(store, "train/loss") == [1, 2], "it follows")
    parent.kill()
    parent.wait()
    wait_until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, "it ends")


def test_a_follower_whose_supervisor_was_killed_before_it_could_look_ends_too(run: RunDirectory, store: Path) -> None:
    make_attempt(run, range(1, 3))
    with subprocess.Popen([sys.executable, "-c", ""]) as parent:
        parent.wait()
    command = [*SHIPPER, str(run.path), "--follow", "1", "--parent", str(parent.pid)]
    assert subprocess.run(command, check=False, timeout=DEADLINE_SECONDS, capture_output=True).returncode == 0
    assert steps_of(store, "train/loss") == [1, 2]


def test_a_follower_goes_on_with_the_attempt_that_is_started_in_the_same_job(run: RunDirectory, store: Path) -> None:
    end_attempt(make_attempt(run, range(1, 3)), "rank_killed", "restart")
    follower = subprocess.Popen([*SHIPPER, str(run.path), "--follow", "1", "--interval", "0.1"])
    try:
        wait_until(lambda: steps_of(store, "train/loss") == [1, 2], "it follows")
        end_attempt(make_attempt(run, range(3, 5)), "finished", "finish")
        assert follower.wait(DEADLINE_SECONDS) == 0
    finally:
        follower.kill()
        follower.wait()
    assert steps_of(store, "train/loss") == [1, 2, 3, 4]


def test_a_single_shipment_that_fails_exits_with_3_and_a_remedy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", f"http://127.0.0.1:{free_port()}")
    make_attempt(run, range(1, 3))
    shipper = start_shipper(run)
    _, errors = shipper.communicate(timeout=DEADLINE_SECONDS)
    assert shipper.returncode == 3
    assert errors.startswith("TrackingError: run deepened could not be shipped")
    assert "Traceback" not in errors


def test_mlflow_is_silent_while_a_new_store_is_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", f"sqlite:///{tmp_path}/new/mlflow.db")
    make_attempt(run, range(1, 3))
    shipper = start_shipper(run, folder=tmp_path)
    output, errors = shipper.communicate(timeout=DEADLINE_SECONDS)
    assert shipper.returncode == 0, errors
    assert errors == ""
    assert json.loads(output)["metrics"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "runs"], "nothing lies where it was called"


def test_a_shipper_killed_while_a_new_store_is_made_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db")
    make_attempt(run, range(1, 3))
    for tables in (5, 30):
        shipper = start_shipper(run, folder=tmp_path)
        wait_for_tables(shipper.pid, tables)
        shipper.kill()
        shipper.communicate()
        assert not (tmp_path / "mlflow.db").exists()
    assert ship(run).metrics == 20


def wait_for_tables(pid: int, tables: int) -> None:
    """Wait until a process has made so many tables of the database that it has open."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        for opened in psutil.Process(pid).open_files():
            if opened.path.endswith("mlflow.db"):
                with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(opened.path)) as store:
                    if store.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] > tables:
                        return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} makes no store")


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, orchestrator.tracking, orchestrator.commands.ui; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Browser:
    """A started `orchestrate ui`."""

    process: "subprocess.Popen[str]"
    port: int
    page: str


@pytest.fixture
def ui(tmp_path: Path, migrated_store: Path) -> Iterator[Browser]:
    """The run browser of a home with one run that was never shipped."""
    folder = tmp_path / "orchestrate"
    folder.mkdir()
    shutil.copy(migrated_store, folder / "mlflow.db")
    two_attempts(make_run(folder / "runs", f"sqlite:///{folder}/mlflow.db"))
    port = free_port()
    with (tmp_path / "notices").open("w") as notices:
        process = subprocess.Popen(
            [*COMMAND, "ui", "--port", str(port)],
            env={**os.environ, "HOME": str(tmp_path)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=notices,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        page = process.stdout.readline().strip()
        assert page, (tmp_path / "notices").read_text()
        yield Browser(process=process, port=port, page=page)
    for left in (process.pid, *(child.pid for child in family(process.pid))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    process.wait()


def test_the_run_browser_serves_shipped_runs_on_this_machine_only_and_leaves_no_child(
    ui: Browser, tmp_path: Path
) -> None:
    notices = (tmp_path / "notices").read_text()
    assert ui.page == f"http://127.0.0.1:{ui.port}/#/experiments/1/runs?workflowType=machine_learning"
    assert f"ssh -L {ui.port}:127.0.0.1:{ui.port}" in notices
    assert "deepened:" in notices
    request = urllib.request.Request(
        f"http://127.0.0.1:{ui.port}/api/2.0/mlflow/runs/search",
        data=json.dumps({"experiment_ids": ["1"]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        (run,) = json.load(answer)["runs"]
    assert (run["info"]["run_name"], run["info"]["status"]) == ("deepened", "FINISHED")
    with urllib.request.urlopen(f"http://127.0.0.1:{ui.port}/", timeout=30) as answer:
        assert b"<html" in answer.read()
    children = family(ui.process.pid)
    listening = {
        connection.laddr.ip
        for process in [psutil.Process(ui.process.pid), *children]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert len(children) <= 3, "one worker, no job runner"

    taken = subprocess.run(
        [*COMMAND, "ui", "--port", str(ui.port)],
        env={**os.environ, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert taken.returncode == 2
    assert f"port {ui.port} of 127.0.0.1 is taken" in taken.stderr

    os.killpg(ui.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    assert ui.process.wait(DEADLINE_SECONDS) == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ui.port)) != 0
    assert "Traceback" not in (tmp_path / "notices").read_text()


SHIPPER = [sys.executable, "-P", "-m", "orchestrator.tracking"]
COMMAND = [sys.executable, "-P", "-m", "orchestrator.commands.main"]


def start_shipper(run: RunDirectory, folder: Path | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*SHIPPER, str(run.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def start_server(store: Path, port: int) -> "subprocess.Popen[bytes]":
    """Start MLflow's own server and wait until it answers."""
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1", "--backend-store-uri", f"sqlite:///{store}", "--no-serve-artifacts"],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=store.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: answers(port), "the server answers")
    return server


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def kill(server: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def family(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
