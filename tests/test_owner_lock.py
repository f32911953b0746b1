"""A lock of one owner at a time: who holds it is named, and what the dead left behind is taken by one."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.owner_lock import FOREIGN_LOCK_SECONDS, hold, take_over


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the lock is to be."""
    return tmp_path / "owner.lock"


def test_a_held_lock_names_its_owner_hinders_no_other_name_and_is_gone_afterwards(path: Path) -> None:
    with hold(path, "supervisor") as nobody, hold(path, "supervisor") as owner:
        assert nobody == ""
        assert owner == f"process {os.getpid()} on {socket.gethostname()}"
        with hold(path.with_name("another.lock"), "supervisor") as other:
            assert other == ""
    assert list(path.parent.iterdir()) == []


def test_of_many_that_find_a_stale_lock_one_takes_it(path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = {"process": dead.pid, "created": 1.0, "host": socket.gethostname(), "time": 1.0}
    for _ in range(20):
        path.write_text(json.dumps(record))
        together = threading.Barrier(8)
        owners: list[str] = []

        def take(barrier: threading.Barrier = together, found: list[str] = owners) -> None:
            barrier.wait()
            found.append(take_over(path, "shipper"))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert owners.count("") == 1, owners


def test_another_hosts_lock_is_respected_until_it_is_old(path: Path) -> None:
    path.write_text(json.dumps({"process": 1, "created": 1.0, "host": "node-of-old", "time": 1.0}))
    with hold(path, "shipper") as other:
        assert other == "process 1 on node-of-old"
    old = time.time() - FOREIGN_LOCK_SECONDS - 1
    os.utime(path, (old, old))
    with hold(path, "shipper") as other:
        assert not other
