"""A lock of one owner at a time: who holds it is named, and what the dead left behind is taken by one."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from orchestrator import owner_lock
from orchestrator.owner_lock import FOREIGN_LOCK_SECONDS, TORN_SECONDS, OwnedLock, acquire, hold, renew
from orchestrator.processes import living_process

ROOT = Path(__file__).parents[1]
ROUNDS = 20
RIVALS = 8
MYSELF = f"process {os.getpid()} on {socket.gethostname()}"

RIVAL = """
import os, sys
from pathlib import Path
from orchestrator.owner_lock import acquire
for line in sys.stdin:
    print("ready", flush=True)
    os.read(int(sys.argv[1]), 1)
    found = acquire(Path(line.strip()), "supervisor")
    print(found if isinstance(found, str) else "", flush=True)
"""

DIES_ON_THE_WAY = """
import os, sys
from pathlib import Path
from orchestrator.owner_lock import acquire
Path.replace = lambda guard, target: os._exit(7)
acquire(Path(sys.argv[1]), "supervisor")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the lock is to be."""
    return tmp_path / "owner.lock"


@pytest.fixture(scope="module")
def of_the_dead() -> str:
    """What a process of this host that has ended had in its lock."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(dead.pid).create_time()
    dead.wait()
    return json.dumps(
        {"process": dead.pid, "created": created, "host": socket.gethostname(), "time": 1.0, "token": "a"}
    )


OF_ANOTHER_HOST = json.dumps({"process": 1, "created": 1.0, "host": "node-of-old", "time": 1.0, "token": "b"})


def make_lock(path: Path, record: str, age_seconds: float = 0.0) -> None:
    """Write a lock that is older than a file that the file server makes now; younger if the age is negative."""
    path.write_text(record)
    now = path.stat().st_mtime
    os.utime(path, (now - age_seconds, now - age_seconds))


def owned(found: OwnedLock | str) -> OwnedLock:
    assert isinstance(found, OwnedLock), found
    return found


def files_beside(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir() if file != path]


def test_a_held_lock_names_its_owner_hinders_no_other_name_and_is_gone_afterwards(path: Path) -> None:
    with hold(path, "supervisor") as nobody, hold(path, "supervisor") as owner:
        assert nobody == ""
        assert owner == MYSELF
        assert files_beside(path) == []
        with hold(path.with_name("another.lock"), "supervisor") as other:
            assert other == ""
    assert list(path.parent.iterdir()) == []


def test_of_many_threads_that_find_a_stale_lock_one_takes_it(path: Path, of_the_dead: str) -> None:
    for _ in range(ROUNDS):
        make_lock(path, of_the_dead)
        together = threading.Barrier(RIVALS)
        results: list[OwnedLock | str] = []

        def take(barrier: threading.Barrier = together, found: list[OwnedLock | str] = results) -> None:
            barrier.wait()
            found.append(acquire(path, "shipper"))

        threads = [threading.Thread(target=take) for _ in range(RIVALS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = [found for found in results if isinstance(found, OwnedLock)]
        assert len(results) == RIVALS
        assert [owner.is_mine() for owner in owners] == [True], results
        assert files_beside(path) == []


def test_of_many_processes_that_find_a_stale_lock_one_takes_it(path: Path, of_the_dead: str) -> None:
    start, go = os.pipe()
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(start)],
            cwd=ROOT,
            pass_fds=[start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(RIVALS)
    ]
    try:
        for _ in range(ROUNDS):
            make_lock(path, of_the_dead)
            for rival in rivals:
                assert rival.stdin is not None
                rival.stdin.write(f"{path}\n")
                rival.stdin.flush()
            assert [read_line(rival) for rival in rivals] == ["ready\n"] * RIVALS
            os.write(go, b"!" * RIVALS)  # a byte for each, so that all wake at once
            answers = {rival.pid: read_line(rival) for rival in rivals}
            winners = [number for number, answer in answers.items() if answer == "\n"]
            assert len(winners) == 1, answers
            assert json.loads(path.read_text())["process"] == winners[0]
            assert files_beside(path) == []
    finally:
        for rival in rivals:
            rival.communicate(timeout=60)
        os.close(start)
        os.close(go)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_who_judged_a_lock_and_comes_late_leaves_it_to_who_was_quicker(
    path: Path, of_the_dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lock(path, of_the_dead)
    quicker: list[OwnedLock] = []

    def judge_slowly(number: int, created: float) -> psutil.Process | None:
        judgement = living_process(number, created)
        monkeypatch.setattr(owner_lock, "living_process", living_process)
        quicker.append(owned(acquire(path, "supervisor")))
        return judgement

    monkeypatch.setattr(owner_lock, "living_process", judge_slowly)
    slower = acquire(path, "supervisor")
    assert slower == MYSELF
    assert quicker[0].is_mine()
    assert files_beside(path) == []


def test_who_was_stopped_while_taking_over_until_another_host_did_it_does_not_get_it_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lock(path, OF_ANOTHER_HOST, age_seconds=61)
    replace = Path.replace
    other: list[OwnedLock] = []

    def wake_late(guard: Path, target: Path) -> Path:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(Path, "replace", replace)
            elsewhere.setattr(socket, "gethostname", lambda: "node-of-the-other")
            make_lock(guard, guard.read_text(), age_seconds=61)
            other.append(owned(acquire(path, "supervisor", stale_seconds=60)))
        return replace(guard, target)

    monkeypatch.setattr(Path, "replace", wake_late)
    assert acquire(path, "supervisor", stale_seconds=60) == f"process {os.getpid()} on node-of-the-other"
    assert other[0].is_mine()
    assert files_beside(path) == []


def test_who_dies_while_taking_over_hinders_nobody(path: Path, of_the_dead: str) -> None:
    make_lock(path, of_the_dead)
    died = subprocess.run([sys.executable, "-c", DIES_ON_THE_WAY, str(path)], cwd=ROOT, check=False, timeout=60)
    assert died.returncode == 7
    assert path.read_text() == of_the_dead
    assert len(files_beside(path)) == 1, "it left its guard"
    with hold(path, "supervisor") as other:
        assert other == ""
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("age_seconds", "is_respected"), [(-3600.0, True), (0.0, True), (50.0, True), (60.1, False)])
def test_another_hosts_lock_is_respected_until_it_is_older_than_a_file_made_now(
    path: Path, age_seconds: float, is_respected: bool
) -> None:
    make_lock(path, OF_ANOTHER_HOST, age_seconds)
    with hold(path, "supervisor", stale_seconds=60) as other:
        assert other == ("process 1 on node-of-old" if is_respected else "")
    assert path.exists() == is_respected
    assert files_beside(path) == []


def test_a_shipper_of_another_host_has_ten_minutes_for_a_batch(path: Path) -> None:
    assert FOREIGN_LOCK_SECONDS == 600
    make_lock(path, OF_ANOTHER_HOST, age_seconds=590)
    assert acquire(path, "shipper") == "process 1 on node-of-old"
    make_lock(path, OF_ANOTHER_HOST, age_seconds=601)
    assert owned(acquire(path, "shipper")).is_mine()


def test_neither_a_clock_of_this_host_nor_a_file_lock_is_asked() -> None:
    """A lock's age is between two times of the file server, so that this module needs no clock."""
    imported = {name.split(".")[0] for name, value in vars(owner_lock).items() if type(value) is type(os)}
    assert "socket" in imported
    assert imported.isdisjoint({"time", "datetime", "fcntl"})


def test_an_owner_whose_lock_was_taken_sees_it_and_leaves_the_new_owners_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-that-was-stopped")
        first = owned(acquire(path, "supervisor"))
    assert first.is_mine()
    make_lock(path, path.read_text(), age_seconds=61)
    second = owned(acquire(path, "supervisor", stale_seconds=60))
    assert second.is_mine()
    assert not first.is_mine()
    make_lock(path, path.read_text(), age_seconds=30)
    before = path.stat()
    first.renew()
    first.release()
    assert path.read_bytes() == second.record
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    second.release()
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_somebody_removed_is_nobodys(path: Path) -> None:
    lock = owned(acquire(path, "supervisor"))
    path.unlink()
    assert not lock.is_mine()
    lock.renew()
    renew(path)
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_an_error_of_the_file_server_takes_no_lock_away_and_gives_none(path: Path) -> None:
    lock = owned(acquire(path, "supervisor"))
    path.unlink()
    path.symlink_to(path)  # to open it is an error, but not that it is missing
    assert lock.is_mine()
    lock.renew()
    lock.release()
    found = acquire(path, "supervisor")
    assert isinstance(found, str)
    assert found.startswith("another supervisor, whose lock cannot be read: ")
    assert path.is_symlink()
    assert files_beside(path) == []


@pytest.mark.parametrize("by_path", [False, True])
def test_a_renewed_lock_is_young_to_other_hosts(path: Path, by_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = owned(acquire(path, "supervisor"))
    make_lock(path, path.read_text(), age_seconds=61)
    renew(path) if by_path else lock.renew()
    assert lock.is_mine()
    monkeypatch.setattr(socket, "gethostname", lambda: "node-of-the-other")
    assert acquire(path, "supervisor", stale_seconds=60) == MYSELF


def test_renewing_by_path_leaves_a_lock_of_another_process_as_it_is(path: Path, of_the_dead: str) -> None:
    for record in (of_the_dead, OF_ANOTHER_HOST, ""):
        make_lock(path, record, age_seconds=61)
        before = path.stat().st_mtime_ns
        renew(path)
        assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("torn", ["", '{"process": 12, "cre', "[]", '{"process": 12}', "\0" * 100])
def test_a_lock_that_names_no_owner_is_respected_for_some_seconds(path: Path, torn: str) -> None:
    make_lock(path, torn, age_seconds=TORN_SECONDS / 2)
    assert acquire(path, "supervisor") == "another supervisor"
    make_lock(path, torn, age_seconds=TORN_SECONDS + 0.1)
    assert owned(acquire(path, "supervisor")).is_mine()
    assert files_beside(path) == []


def test_a_lock_of_the_version_without_tokens_is_understood(path: Path, of_the_dead: str) -> None:
    record = json.loads(of_the_dead)
    del record["token"]
    make_lock(path, json.dumps(record))
    lock = owned(acquire(path, "shipper"))
    living = {**json.loads(lock.record), "time": 1.0}
    del living["token"]
    make_lock(path, json.dumps(living))
    assert acquire(path, "shipper") == MYSELF
    assert not lock.is_mine()
