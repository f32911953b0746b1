"""A process that has imported torch and megatron once, and forks a rank for each client.

Measured (docs/log.md): a rank costs seconds of imports otherwise. It stays single-threaded, so that
a fork is safe; it serves one unix socket, readable by its owner only, and ends when its parent does.
The clients are `orchestrator/slurm/rank_client.py`.
"""

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main(socket_path: str) -> None:
    """Import, then serve until the parent process is gone."""
    parent = os.getppid()
    die_with_parent(parent)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from megatron_solar.cpu import cuda_calls_on_cpu

    with cuda_calls_on_cpu():
        _warm_up()
        gc.freeze()
        serve(Path(socket_path), _run_module)


def serve(path: Path, run: Callable[[list[str]], int]) -> None:
    """Fork `run(arguments)` for each client of a socket, for ever.

    The socket appears under its name only once it listens.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{path}.new"
    previous = os.umask(0o077)
    listener.bind(temporary)
    os.umask(previous)
    listener.listen(256)
    Path(temporary).rename(path)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(reader, selectors.EVENT_READ)
    ranks: dict[int, socket.socket] = {}  # process -> its client
    clients: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                process = _start_rank(client, run)
                ranks[process], clients[client] = client, process
                selector.register(client, selectors.EVENT_READ)
            elif key.fileobj == reader:
                os.read(reader, 4096)
                for process, code in _ended_children():
                    client = ranks.pop(process)
                    clients.pop(client)
                    if client in selector.get_map():
                        selector.unregister(client)
                    _answer(client, code)
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in clients:
                _forward(key.fileobj, clients[key.fileobj], selector)


def _start_rank(client: socket.socket, run: Callable[[list[str]], int]) -> int:
    head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_LEN(2 * array.array("i").itemsize))
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    size, body = int.from_bytes(head, "little"), b""
    while len(body) < size:
        body += client.recv(size - len(body))
    parent = os.getpid()
    process = os.fork()
    if process:
        for descriptor in descriptors:
            os.close(descriptor)
        return process
    code = 1
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        request = json.loads(body)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        code = run(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forward(client: socket.socket, process: int, selector: selectors.BaseSelector) -> None:
    """Pass a client's signals to its rank; a client that is gone takes its rank along."""
    try:
        received = client.recv(64)
    except ConnectionError:
        received = b""
    for number in received or bytes([signal.SIGKILL]):
        os.kill(process, number)
    if not received:
        selector.unregister(client)


def _ended_children() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process == 0:
            return ended
        ended.append((process, os.waitstatus_to_exitcode(status)))


def _answer(client: socket.socket, code: int) -> None:
    with contextlib.suppress(OSError):  # the client died first
        client.sendall(code.to_bytes(4, "little", signed=True))
    client.close()


def _warm_up() -> None:
    """Import everything a rank needs and take one AdamW step, else torch._dynamo is imported in each rank."""
    import torch

    torch.set_num_threads(1)
    import megatron_solar.node_checks
    import megatron_solar.train
    import megatron_solar.worker  # noqa: F401

    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.AdamW([parameter]).step()


def _run_module(arguments: list[str]) -> int:
    """Run `main` of the module that the first argument names with the others."""
    module, *rest = arguments
    return int(importlib.import_module(module).main(rest))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
