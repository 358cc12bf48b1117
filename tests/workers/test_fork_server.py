"""Processes forked in place of those that Ray would start, here with a program of ours in place of Ray's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuse.workers import fork_worker
from fuse.workers.fork_server import fork_server

pytestmark = pytest.mark.processes

IMPORTED = "this"
PROGRAM = f"""
import json, os, signal, sys
import numpy as np
print("said")
print("failed", file=sys.stderr)
json.dump({{
    "argv": sys.argv, "path": sys.path[0], "main": __name__, "born with": "{IMPORTED}" in sys.modules,
    "environment": dict(os.environ), "directory": os.getcwd(), "random": np.random.random(),
    "process": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
    "reaps": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
}}, open(sys.argv[1], "w"))
"""
Ask = Callable[[str], dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Ask for a process at a server's address, as Ray would; what it says of itself."""
    program, answer = tmp_path / "program.py", tmp_path / "answer"
    program.write_text(PROGRAM)
    os.mkfifo(answer)

    def ask(address: str) -> dict[str, Any]:
        environment = {**os.environ, fork_worker.ADDRESS: address, fork_worker.PROGRAM: str(program), "OF": "mine"}
        command = [sys.executable, fork_worker.__file__, str(answer), "--of-ray"]
        with (tmp_path / "log").open("w") as log:
            started = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        found: dict[str, Any] = json.loads(answer.read_text())
        assert started.wait() == 0
        assert found["argv"] == [str(program), str(answer), "--of-ray"]
        assert found["path"] == str(tmp_path)
        assert found["main"] == "__main__"
        assert found["environment"] == environment
        assert found["directory"] == str(tmp_path)
        assert found["reaps"]
        assert "failed" in (tmp_path / "log").read_text()
        return {**found, "asked by": started.pid}

    return ask


def test_processes_are_born_with_what_was_imported_and_nothing_else_of_the_server(ask: Ask, tmp_path: Path) -> None:
    with fork_server(tmp_path, [IMPORTED, "numpy.random"]) as server:
        one, other = ask(server.address), ask(server.address)
    assert one["born with"]
    assert one["parent"] == other["parent"] == server.process_id
    assert one["process"] == one["group"] != other["process"] == other["group"]
    assert one["random"] != other["random"]


def test_the_server_ends_with_its_block_and_then_workers_start_by_themselves(ask: Ask, tmp_path: Path) -> None:
    with fork_server(tmp_path, ["no_such_module"]) as server:
        found = ask(server.address)
        assert "no_such_module" in (tmp_path / "forking.log").read_text()
    assert found["process"] == found["asked by"]
    assert not found["born with"]
    assert "no worker can be forked" in (tmp_path / "log").read_text()
