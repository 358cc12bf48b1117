"""What Ray runs in place of its own program for workers: has a process forked that becomes the worker, and ends.

Ray knows a worker's process by what the worker itself says of it. Where the server has ended, this process becomes the
worker.
"""

from __future__ import annotations

import json
import os
import socket
import sys

ADDRESS = "FUSE_FORK_SERVER"
PROGRAM = "FUSE_WORKER_PROGRAM"
"""Environment variables that hold the path of the server's socket, and of Ray's own program."""


def _forked(address: str, command: list[str]) -> bool:
    """Whether the server has forked a process for this command, with the environment and standard files of this one."""
    request = {"command": command, "environment": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            text = json.dumps(request).encode()
            sent = socket.send_fds(connection, [text], [0, 1, 2])
            connection.sendall(text[sent:])
            connection.shutdown(socket.SHUT_WR)
            if not connection.recv(1):
                raise ConnectionError("the server has ended")
            return True
        except OSError as error:
            print(f"no worker can be forked: {error}", file=sys.stderr)
            return False


if __name__ == "__main__":
    command = [os.environ[PROGRAM], *sys.argv[1:]]
    if not _forked(os.environ[ADDRESS], command):
        os.execv(sys.executable, [sys.executable, *command])
