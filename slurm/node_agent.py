"""Measure one node for the supervisor, and tell it every second that the node lives.

    PYTHON -I -S node_agent.py HOST[,HOST...] PORT

Run as a file with the standard library only, one process a node. Both sides prove that they know the
secret of the environment, without sending it. Then come JSON lines: the supervisor asks for checks and
for the time, the agent answers and beats, until the connection ends; then it leaves. What is measured is
judged by `node_checks.py` there. A check that hangs holds up no other. Where the supervisor does not say that it
leaves, the agent becomes its deputy (`deputy.py`).

The checks of GPUs have never run on one: `nvidia-smi` and `dmesg` are read as NVIDIA documents them
(nvidia-smi manual, "Xid Errors", NVML's clock event reasons).
"""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN_VARIABLE = "ORCHESTRATE_NODE_TOKEN"
BEAT_SECONDS = 1.0
CONNECT_SECONDS = 60.0
UNANSWERED_MILLISECONDS = 20_000
"""After which a supervisor's host that acknowledges nothing counts as lost."""
NONCE = "nonce"
THROTTLED = 0x8 | 0x20 | 0x40 | 0x80
"""Slowed by hardware, heat (two kinds) or the power brake; not by idling or the power cap."""
HARDWARE_XIDS = frozenset((48, 62, 64, 74, 79, 92, 95, 119, 120, 140))
"""ECC, row remapping, NVLink, off the bus, GSP; the others may be a program's fault."""
XID_SECONDS = 24 * 3600
"""How old an Xid may be; a GPU that was reset since then still has it in the kernel's log."""

Measured = tuple[float, str]
"""A number for the check's limit, and where it comes from in words."""

_commands: set["subprocess.Popen[str]"] = set()


class NotMeasuredError(Exception):
    """Where a check does not apply, with the reason; the node is not blamed."""


def proof(token: str, role: str, node: str, challenge: str) -> str:
    """Return what only somebody with the token can answer to a challenge."""
    return hmac.new(token.encode(), "\n".join((role, node, challenge)).encode(), hashlib.sha256).hexdigest()


# What is measured. Each function takes the supervisor's request.


def gpu_count(_request: dict[str, Any]) -> Measured:
    """Count the GPUs that answer."""
    names = nvidia_smi("--query-gpu=name")
    return len(names), ", ".join(sorted({row[0] for row in names}))


def gpu_memory(_request: dict[str, Any]) -> Measured:
    """Return the memory in use on the fullest GPU, in MiB."""
    return _largest(nvidia_smi("--query-gpu=index,memory.used"))


def gpu_clock(_request: dict[str, Any]) -> Measured:
    """Return the highest clock that the slowest GPU allows, in MHz."""
    value, detail = _largest([[row[0], f"-{row[1]}"] for row in nvidia_smi("--query-gpu=index,clocks.max.sm")])
    return -value, detail


def gpu_throttled(_request: dict[str, Any]) -> Measured:
    """Count the GPUs that hardware or heat slows down."""
    try:
        rows = nvidia_smi("--query-gpu=index,clocks_event_reasons.active")
    except NotMeasuredError:  # its name before driver 535
        rows = nvidia_smi("--query-gpu=index,clocks_throttle_reasons.active")
    slowed = [f"GPU {row[0]}: {row[1]}" for row in rows if row[1].startswith("0x") and int(row[1], 16) & THROTTLED]
    return len(slowed), ", ".join(slowed)


def ecc_errors(_request: dict[str, Any]) -> Measured:
    """Return the largest number of memory errors of a GPU that could not be corrected, since its driver started."""
    return _largest(nvidia_smi("--query-gpu=index,ecc.errors.uncorrected.volatile.total"))


def row_remap(_request: dict[str, Any]) -> Measured:
    """Count the GPUs with a row of memory that waits to be remapped, or could not be."""
    rows = nvidia_smi("--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    bad = [" ".join(row) for row in rows if any(value.lower() in ("yes", "1") for value in row[1:])]
    return len(bad), ", ".join(bad)


def xid(_request: dict[str, Any]) -> Measured:
    """Count the hardware errors of GPUs in the kernel's log of the last day."""
    try:
        text = _output(["dmesg"])
    except (OSError, RuntimeError) as error:
        raise NotMeasuredError(f"the kernel's log cannot be read: {error}") from None
    found = hardware_xids(text, float(Path("/proc/uptime").read_text().split()[0]))
    return len(found), found[-1] if found else ""


def infiniband(_request: dict[str, Any], root: Path = Path("/sys/class/infiniband")) -> Measured:
    """Return the sum of the rates of active ports, in Gb/s, and the ports that are not active."""
    ports = sorted(root.glob("*/ports/*")) if root.is_dir() else []
    if not ports:
        raise NotMeasuredError("there is no InfiniBand")
    total, down = 0.0, []
    for port in ports:
        state, rate = (port / "state").read_text().strip(), (port / "rate").read_text().strip()
        if state.endswith("ACTIVE"):
            total += float(rate.split()[0])
        else:
            down.append(f"{port.parts[-3]} port {port.name} is {state.split()[-1]}")
    return total, ", ".join(down)


def temporary_disk(_request: dict[str, Any]) -> Measured:
    """Return what is free in /tmp, in GB."""
    return _free(Path("/tmp"))


def shared_memory(_request: dict[str, Any]) -> Measured:
    """Return what is free in /dev/shm, in GB."""
    return _free(Path("/dev/shm"))


def run_disk(request: dict[str, Any]) -> Measured:
    """Return what is free where the run lies, in GB."""
    return _free(Path(request["folder"]))


def run_folder(request: dict[str, Any]) -> Measured:
    """Read what the supervisor wrote, and write what it will look for: whether both see the same folder."""
    folder = Path(request["folder"])
    try:
        seen = (folder / NONCE).read_text()
    except FileNotFoundError:
        raise RuntimeError(f"{folder} is not the supervisor's: what it wrote there is not seen here") from None
    with (folder / node_name()).open("w") as stream:
        stream.write(request["answer"])
        stream.flush()
        os.fsync(stream.fileno())
    return 1, seen


GPU_CHECKS = (gpu_count, gpu_memory, gpu_clock, gpu_throttled, ecc_errors, row_remap, xid)
CHECKS = (*GPU_CHECKS, infiniband, temporary_disk, shared_memory, run_disk, run_folder)


def oom_kills(path: Path = Path("/proc/vmstat")) -> int | None:
    """Return how many processes the kernel has killed for memory since it booted, also within cgroups; None unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])


def nvidia_smi(query: str) -> list[list[str]]:
    """Return a query's rows, one a GPU.

    Raises:
        NotMeasuredError: this driver does not know the query.
        RuntimeError: it failed otherwise.
    """
    try:
        return csv_rows(_output(["nvidia-smi", query, "--format=csv,noheader,nounits"]))
    except FileNotFoundError:
        raise RuntimeError("there is no nvidia-smi") from None
    except RuntimeError as error:
        if "not a valid field" in str(error) or "not recognized" in str(error):
            raise NotMeasuredError(str(error)) from None
        raise


def csv_rows(text: str) -> list[list[str]]:
    """Return the fields of `--format=csv,noheader`: separated by a comma and a space, without quotes."""
    return [[field.strip() for field in line.split(",")] for line in text.splitlines() if line.strip()]


def hardware_xids(text: str, uptime_seconds: float) -> list[str]:
    """Return the lines of a kernel's log with an Xid of the hardware that is not older than a day."""
    found = []
    for line in text.splitlines():
        match = re.search(r"NVRM: Xid \(PCI:[0-9a-fA-F:.]+\): (\d+)", line)
        stamp = re.match(r"\[ *(\d+\.\d+)\]", line)
        is_recent = stamp is None or uptime_seconds - float(stamp[1]) < XID_SECONDS
        if match is not None and int(match[1]) in HARDWARE_XIDS and is_recent:
            found.append(line.strip())
    return found


def node_name() -> str:
    """Return Slurm's name of this node, or the host's where there is no Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _largest(rows: list[list[str]]) -> Measured:
    """Return the largest number of rows of (GPU, number); a GPU without it says [N/A]."""
    numbers = [(float(value), gpu) for gpu, value in rows if re.fullmatch(r"-?\d+(\.\d+)?", value)]
    if not numbers:
        raise NotMeasuredError(f"the GPUs do not say: {', '.join(value for _, value in rows)}")
    value, gpu = max(numbers)
    return value, f"GPU {gpu}"


def _free(folder: Path) -> Measured:
    return shutil.disk_usage(folder).free / 1e9, str(folder)


def _output(command: list[str], seconds: float = 60.0) -> str:
    """Return what a command prints.

    Raises:
        RuntimeError: it failed, with the last line of its output; or it took too long.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _commands.add(process)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        raise RuntimeError(f"did not end within {seconds:.0f} s") from None
    finally:
        _commands.discard(process)
    if process.returncode:
        last = (output.strip().splitlines() or [f"failed with {process.returncode} and said nothing"])[-1]
        raise RuntimeError(last[:500])
    return output


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Agent:
    """One connection to the supervisor."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._lock = threading.RLock()
        self._round = 0
        self._running: dict[str, float] = {}  # check -> when it is given up
        self.deputy: list[str] = []
        """What to run where the supervisor is gone and has not said that it leaves."""

    def greet(self, token: str) -> None:
        """Prove the token, have the other side prove it, and begin with its first request.

        Raises:
            PermissionError: the other side does not know the token.
        """
        self._connection.settimeout(CONNECT_SECONDS)
        node, challenge = node_name(), os.urandom(16).hex()
        theirs = self._line()["challenge"]
        self._send({"node": node, "challenge": challenge, "proof": proof(token, "agent", node, theirs)})
        answer = self._line()
        if not hmac.compare_digest(str(answer.get("proof")), proof(token, "supervisor", node, challenge)):
            raise PermissionError("who listens there is not this job's supervisor")
        self._connection.settimeout(None)
        self._hear(answer)

    def serve(self) -> None:
        """Beat and answer until the connection ends."""
        beat = time.monotonic()
        while True:
            if time.monotonic() >= beat:
                self._send({"beat": True, "oom_kills": oom_kills()})
                beat = time.monotonic() + BEAT_SECONDS
            self._give_up()
            while b"\n" in self._buffer:
                self._hear(self._line())
            ready, _, _ = select.select([self._connection], [], [], max(0.0, beat - time.monotonic()))
            if ready:
                self._receive()

    def _hear(self, request: dict[str, Any]) -> None:
        if "deputy" in request:
            self.deputy = list(map(str, request["deputy"]))
        if "ping" in request:
            self._send({"pong": request["ping"], "time": time.time()})
        if "checks" in request:
            self._start(request["checks"])

    def _start(self, request: dict[str, Any]) -> None:
        checks: dict[str, Callable[[dict[str, Any]], Measured]] = {check.__name__: check for check in CHECKS}
        if request["device"] == "cpu":
            checks = {name: check for name, check in checks.items() if check not in GPU_CHECKS}
        for name, command in request["own"].items():
            checks[name] = self._own(command, 0.9 * request["seconds"])
        checks = {name: check for name, check in checks.items() if name not in request["without"]}
        with self._lock:
            self._round = request["round"]
            self._running = dict.fromkeys(checks, time.monotonic() + request["seconds"])
            if not checks:
                self._send({"round": self._round, "done": True})
        for name, check in checks.items():
            arguments = (request["round"], name, check, request)
            threading.Thread(target=self._check, args=arguments, daemon=True).start()

    @staticmethod
    def _own(command: str, seconds: float) -> Callable[[dict[str, Any]], Measured]:
        return lambda _request: (0, _output(["sh", "-c", command], seconds).strip()[-200:])

    def _check(
        self, number: int, name: str, check: Callable[[dict[str, Any]], Measured], request: dict[str, Any]
    ) -> None:
        result: dict[str, Any]
        try:
            value, detail = check(request)
            result = {"value": value, "detail": detail}
        except NotMeasuredError as reason:
            result = {"skipped": str(reason)}
        except Exception as error:
            text = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            result = {"error": text}
        with contextlib.suppress(OSError):  # the connection's end is the main thread's business
            self._tell(number, name, result)

    def _give_up(self) -> None:
        late = [name for name, deadline in list(self._running.items()) if time.monotonic() > deadline]
        for name in late:
            self._tell(self._round, name, {"error": "the check hangs"})

    def _tell(self, number: int, name: str, result: dict[str, Any]) -> None:
        """Send a check's result, once."""
        with self._lock:
            if number != self._round or self._running.pop(name, None) is None:
                return
            self._send({"round": number, "check": name, **result})
            if not self._running:
                self._send({"round": number, "done": True})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._connection.sendall(data)

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _receive(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the supervisor is gone")
        self._buffer += data


def connect(hosts: list[str], port: int) -> socket.socket:
    """Connect to the first of a supervisor's addresses that answers.

    Raises:
        OSError: none did.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=5.0)
            except OSError as error:
                last = error
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MILLISECONDS)
            return connection
        if time.monotonic() > deadline:
            raise last
        time.sleep(1.0)


def main(hosts: str, port: str) -> int:
    """Serve until the supervisor is gone; 1 where it was never found."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends them to a job's steps; the supervisor decides
    token = os.environ.pop(TOKEN_VARIABLE)  # a site's commands need not know it
    try:
        agent = Agent(connect(hosts.split(","), int(port)))
        agent.greet(token)
    except (OSError, ValueError, KeyError) as error:
        print(f"{node_name()} found no supervisor at {hosts} port {port}: {error}", file=sys.stderr, flush=True)
        return 1
    with contextlib.suppress(OSError):
        agent.serve()
    for process in list(_commands):
        _kill(process)
    if agent.deputy:
        os.execv(agent.deputy[0], agent.deputy)
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1], sys.argv[2]))
