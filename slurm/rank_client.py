"""Stand for one rank that the preloaded process forks: pass it everything, end as it ends.

Run as a file by `python -I -S` with the standard library only, so that it costs 20 ms. It sends
its arguments, environment, folder, standard output and error over a unix socket, forwards signals,
and leaves with the rank's exit code (128 + n for signal n). Where it dies, the preloaded process
kills its rank; where the preloaded process dies, it leaves with 125.
"""

import array
import json
import os
import signal
import socket
import sys

LOST = 125


def main(socket_path: str, arguments: list[str]) -> int:
    """Run one rank through the preloaded process behind a socket and return its exit code."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(socket_path)
    folder = os.getcwd()  # noqa: PTH109 (pathlib would double the start-up)
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": folder}).encode()
    descriptors = array.array("i", [1, 2])
    connection.sendmsg(
        [len(request).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes())]
    )
    connection.sendall(request)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda received, _frame: connection.sendall(bytes([received])))
    answer = connection.recv(4)
    if len(answer) < 4:
        return LOST
    code = int.from_bytes(answer, "little", signed=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1], sys.argv[2:]))
