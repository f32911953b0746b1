"""Hear every node of a job: what its agent has measured, and that it lives.

One thread accepts the agents (`node_agent.py`), has each prove the job's token and proves it back, and
reads what they say. Nothing that arrives can stop it: lines and connections are limited, and a
connection that says nonsense is dropped. Whether a node is silent is judged by the thread's last look,
so that a supervisor that was itself held up blames nobody.
"""

import contextlib
import dataclasses
import hmac
import json
import logging
import math
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from orchestrator.errors import RunError
from orchestrator.files import write_atomic
from orchestrator.settings import ClusterSettings
from orchestrator.slurm import node_agent
from orchestrator.slurm.node_checks import Measure, NodeReport

LOOK_SECONDS = 0.2
LONGEST_LINE = 1 << 16
GREETING_SECONDS = 30.0
STRANGERS = 256
"""Connections that have proved nothing yet, at most."""
PINGS = 4
LONGEST_CHECK_SHARE = 0.8
"""Of the time in which a node must have answered, how much one check may take."""

log = logging.getLogger("supervisor")


@dataclasses.dataclass(kw_only=True)
class _Connection:
    """One agent, or a stranger."""

    socket: socket.socket
    challenge: str
    opened: float
    heard: float
    buffer: bytes = b""
    node: str = ""
    round: int = 0
    answer: str = ""
    """What the node is to write into the run's folder."""
    measures: dict[str, Measure] = dataclasses.field(default_factory=dict)
    is_done: bool = False
    pings: int = 0
    ping_sent: tuple[float, float] = (0.0, 0.0)
    """Monotonic and wall clock."""
    round_trip: float = math.inf
    skew: float = 0.0
    ended: str = ""
    """Why the connection is no more."""
    oom_kills: int | None = None
    """Of its kernel, by its newest beat."""


class NodeWatch:
    """Listens until it is closed."""

    def __init__(
        self, nodes: Sequence[str], cluster: ClusterSettings, folder: Path, deputy: Sequence[str] = ()
    ) -> None:
        """Begin to listen.

        Args:
            nodes: the job's; nobody else is heard.
            folder: new, on the disk that every node must share.
            deputy: what an agent is to run where this process is gone without having closed the watch.
        """
        self._deputy = list(deputy)
        self._nodes = frozenset(nodes)
        self._cluster = cluster
        self._folder = folder
        folder.mkdir(parents=True)
        self._nonce = secrets.token_hex(16)
        write_atomic(folder / node_agent.NONCE, self._nonce)
        self._token = secrets.token_hex(32)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._connections: dict[str, _Connection] = {}  # the newest of each node
        self._looked = time.monotonic()
        self._seen: set[tuple[str, str]] = set()  # (node, answer) that was found in the folder
        self._host = "127.0.0.1" if cluster.one_machine else ""
        self._listener = socket.create_server((self._host, 0), backlog=1024)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._is_open = True
        self._thread = threading.Thread(target=self._listen, name="node watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def agent_command(self, python: str) -> list[str]:
        """Return what is to run on every node, once a node, with `agent_environment`."""
        hosts = [self._host] if self._host else own_addresses()
        return [python, "-I", "-S", node_agent.__file__, ",".join(hosts), str(self.port)]

    def agent_environment(self) -> dict[str, str]:
        """Return what the agents need to know and nobody else may: not for a command line."""
        return {node_agent.TOKEN_VARIABLE: self._token}

    def reports(self) -> dict[str, NodeReport]:
        """Return what each node that ever answered has told since it was last asked."""
        with self._lock:
            connections = list(self._connections.items())
            return {node: self._report(connection) for node, connection in connections}

    def silent(self) -> dict[str, str]:
        """Return the nodes that were heard once and are no more, with why.

        Raises:
            RunError: the watch itself has ended, and knows nothing.
        """
        if not self._thread.is_alive():
            raise RunError("the node watch has ended, so whether nodes live is not known; see the supervisor's log")
        limit = self._cluster.checks.silent_seconds
        with self._lock:
            closed = {node: c.ended for node, c in self._connections.items() if c.ended}
            quiet = {node: self._looked - c.heard for node, c in self._connections.items() if not c.ended}
        return closed | {n: f"nothing was heard from it for {s:.0f} s" for n, s in quiet.items() if s > limit}

    def oom_kills(self) -> dict[str, int]:
        """Return how many processes each node's kernel has killed for memory since it booted, where it says so."""
        with self._lock:
            return {node: c.oom_kills for node, c in self._connections.items() if c.oom_kills is not None}

    def wait_for_reports(
        self, nodes: Iterable[str], seconds: float, is_stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, NodeReport]:
        """Wait until all of these nodes have ended their checks, or time is up, or the missing ones are lost.

        Args:
            is_stopped: whether nobody wants the answer any more.

        Returns:
            what they have told by then; a node that never answered is missing.
        """
        wanted = set(nodes)
        deadline = time.monotonic() + seconds
        while True:
            self._look_into_folder(wanted)
            found = {node: report for node, report in self.reports().items() if node in wanted}
            waiting = wanted - {node for node, report in found.items() if report.is_complete} - self.silent().keys()
            left = deadline - time.monotonic()
            if not waiting or left <= 0 or is_stopped():
                return found
            with self._changed:
                self._changed.wait(min(left, LOOK_SECONDS))

    def recheck(self, nodes: Iterable[str]) -> None:
        """Ask these nodes to run their checks again; a node that is lost stays as it was."""
        with self._lock:
            for connection in (self._connections[node] for node in nodes if node in self._connections):
                if not connection.ended:
                    self._ask(connection, {})

    def close(self) -> None:
        """Stop listening; the agents leave."""
        self._is_open = False
        self._thread.join()
        with self._lock:
            for connection in self._connections.values():
                self._send(connection, {"deputy": []})
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self._selector.close()

    # The thread.

    def _listen(self) -> None:
        strangers: list[_Connection] = []
        while self._is_open:
            before = time.monotonic()
            ready = self._selector.select(LOOK_SECONDS)
            with self._changed:
                for key, _ in ready:
                    if key.data is None:
                        self._accept(strangers)
                    elif not key.data.ended:  # a node's newer connection may have ended it meanwhile
                        self._receive(key.data)
                strangers = [stranger for stranger in strangers if not stranger.node and not stranger.ended]
                late = [s for s in strangers if before - s.opened > GREETING_SECONDS]
                for stranger in [*late, *strangers[: max(0, len(strangers) - STRANGERS)]]:
                    self._end(stranger, "it did not say who it is")
                self._looked = before  # all that had arrived by then is read
                self._changed.notify_all()

    def _accept(self, strangers: list[_Connection]) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:  # it went away again, or no file descriptor is left
            log.warning("a node's connection could not be taken: %s", error)
            time.sleep(LOOK_SECONDS)
            return
        now = time.monotonic()
        accepted.setblocking(False)
        connection = _Connection(socket=accepted, challenge=secrets.token_hex(16), opened=now, heard=now)
        strangers.append(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._send(connection, {"challenge": connection.challenge})

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(LONGEST_LINE)
            if not data:
                self._end(connection, "its connection was closed")
                return
            connection.buffer += data
            *lines, connection.buffer = connection.buffer.split(b"\n")
            if max(map(len, [*lines, connection.buffer])) > LONGEST_LINE:
                raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            for line in lines:
                if not connection.ended:
                    self._hear(connection, json.loads(line))
            if connection.node:
                connection.heard = time.monotonic()
        except BlockingIOError:
            return
        except Exception as error:  # whatever it sent, the others are still to be heard
            self._end(connection, f"its connection failed: {type(error).__name__}: {error}")

    def _hear(self, connection: _Connection, message: dict[str, Any]) -> None:
        """Take one line in; what does not fit raises, and ends the connection."""
        if not connection.node:
            self._welcome(connection, message)
        elif "beat" in message:
            kills = message.get("oom_kills")
            connection.oom_kills = None if kills is None else int(kills)
        elif "pong" in message:
            self._take_time(connection, float(message["time"]))
        elif "check" in message and message["round"] == connection.round:
            fields = {k: str(message[k]) for k in ("detail", "skipped", "error") if k in message}
            measure = Measure(value=float(message.get("value", 0.0)), **fields)
            connection.measures[str(message["check"])] = measure
        elif "done" in message and message["round"] == connection.round:
            connection.is_done = True

    def _welcome(self, connection: _Connection, message: dict[str, Any]) -> None:
        node = str(message["node"])
        wanted = node_agent.proof(self._token, "agent", node, connection.challenge)
        if not hmac.compare_digest(str(message["proof"]).encode(), wanted.encode()) or node not in self._nodes:
            raise ValueError(f"no agent of this job, though it calls itself {node[:100]!r}")
        former = self._connections.get(node)
        connection.node = node
        self._connections[node] = connection
        if former is not None and not former.ended:
            self._end(former, "a newer agent took its place")
        proof = node_agent.proof(self._token, "supervisor", node, str(message["challenge"]))
        self._ask(connection, {"proof": proof, "deputy": self._deputy})

    def _ask(self, connection: _Connection, also: dict[str, Any]) -> None:
        """Have a node run its checks."""
        checks = self._cluster.checks
        connection.round += 1
        connection.answer = secrets.token_hex(16)
        connection.measures, connection.is_done = {}, False
        connection.pings, connection.round_trip = 0, math.inf
        request = {
            "round": connection.round,
            "device": self._cluster.device,
            "folder": str(self._folder),
            "answer": connection.answer,
            "own": dict(checks.own),
            "without": list(checks.without),
            "seconds": checks.seconds * LONGEST_CHECK_SHARE,
        }
        self._send(connection, {**also, "checks": request})
        self._ping(connection)

    def _ping(self, connection: _Connection) -> None:
        connection.pings += 1
        connection.ping_sent = time.monotonic(), time.time()
        self._send(connection, {"ping": connection.pings})

    def _take_time(self, connection: _Connection, theirs: float) -> None:
        """Compare clocks by the fastest answer; half of its round trip may be skew or not, and is not counted."""
        began, ours = connection.ping_sent
        round_trip = time.monotonic() - began
        if round_trip < connection.round_trip:
            connection.round_trip = round_trip
            connection.skew = max(0.0, abs(theirs - ours - round_trip / 2) - round_trip / 2)
        if connection.pings < PINGS:
            self._ping(connection)
        else:
            detail = f"an answer took {connection.round_trip * 1000:.1f} ms"
            connection.measures["clock_skew"] = Measure(value=connection.skew, detail=detail)

    def _send(self, connection: _Connection, message: dict[str, Any]) -> None:
        """Send a line, or end the connection: an agent that reads nothing must not hold up the others."""
        data = json.dumps(message).encode() + b"\n"
        try:
            is_sent = not connection.ended and connection.socket.send(data) == len(data)
        except OSError as error:
            self._end(connection, f"its connection failed: {error}")
            return
        if not is_sent:
            self._end(connection, "it reads nothing")

    def _end(self, connection: _Connection, why: str) -> None:
        if connection.ended:
            return
        connection.ended = why
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()

    # The shared folder.

    def _look_into_folder(self, nodes: set[str]) -> None:
        """Look for what nodes say to have written, without the lock: a disk may hang."""
        with self._lock:
            written = {
                (c.node, c.answer): self._folder / c.node
                for c in self._connections.values()
                if c.node in nodes and "run_folder" in c.measures and not c.measures["run_folder"].error
            }
        for key, path in written.items():
            if key not in self._seen:
                with contextlib.suppress(OSError):
                    if path.read_text() == key[1]:
                        self._seen.add(key)

    def _report(self, connection: _Connection) -> NodeReport:
        measures = dict(connection.measures)
        is_complete = connection.is_done and "clock_skew" in measures
        folder = measures.get("run_folder")
        if folder is not None and not folder.error:
            if folder.detail != self._nonce:
                measures["run_folder"] = Measure(error=f"{self._folder} there is another folder than here")
            elif (connection.node, connection.answer) not in self._seen:
                measures["run_folder"] = Measure(error=f"what it wrote to {self._folder} is not seen here")
                is_complete = False  # a network file system may take its time
            else:
                measures["run_folder"] = Measure(detail=str(self._folder))
        return NodeReport(node=connection.node, measures=measures, is_complete=is_complete)


def own_addresses() -> list[str]:
    """Return addresses and names by which other hosts may reach this one; the agents try them in turn.

    Raises:
        RunError: it has none.
    """
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # a documentation address; a datagram socket sends nothing here
        found.append(str(probe.getsockname()[0]))
    name = node_agent.node_name()
    with contextlib.suppress(OSError):
        found += [address for address in socket.gethostbyname_ex(name)[2] if not address.startswith("127.")]
        found.append(name)
    if not found:
        raise RunError(f"no address of {name} was found by which other nodes could reach it; see its /etc/hosts")
    return list(dict.fromkeys(found))
