"""What Ray has no option for, for as long as a block lasts: how it starts a node and its workers' processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray._private import node, parameter, ray_constants, services

from fuse.workers import fork_worker

_WORKER_PROGRAM = str(Path(node.__file__).parent / "workers" / "default_worker.py")
_START_TIMEOUT_S = 300.0


class NodeEnded(RuntimeError):
    """Ray's node has ended while it was starting."""


@contextmanager
def loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this node, and so bind to it alone, as it does by itself on macOS.

    On Linux Ray turns a loopback `_node_ip_address` into the address of the network and listens on all interfaces.
    """
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


@contextmanager
def lean() -> Iterator[None]:
    """Have Ray leave out three processes that nothing here asks: autoscaler, log monitor and dashboard, which starts
    without its pages even where it is not wanted. They take half of the time in which Ray starts on two cores."""

    ray_parameter: Any = parameter
    ray_node: Any = node

    class Lean(parameter.RayParams):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            untyped: Any = self
            untyped.no_monitor, untyped.include_log_monitor = True, False

    def no_dashboard(started: Any, **_: object) -> None:
        started._webui_url = ""

    params, start_api_server = ray_parameter.RayParams, ray_node.Node.start_api_server
    ray_parameter.RayParams, ray_node.Node.start_api_server = Lean, no_dashboard
    try:
        yield
    finally:
        ray_parameter.RayParams, ray_node.Node.start_api_server = params, start_api_server


@contextmanager
def forking(server: str) -> Iterator[None]:
    """Have Ray's node start a worker's process by having it forked from the server whose socket this is."""
    ray_parameter: Any = parameter
    params = ray_parameter.RayParams

    class Forking(parameter.RayParams):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            untyped: Any = self
            untyped.worker_path = fork_worker.__file__

    ray_parameter.RayParams = Forking
    try:
        with environment({fork_worker.ADDRESS: server, fork_worker.PROGRAM: _WORKER_PROGRAM}):
            yield
    finally:
        ray_parameter.RayParams = params


@contextmanager
def patient() -> Iterator[None]:
    """Have Ray wait for the node that it starts: it does for 30 s, and a busy machine takes longer."""
    ray_node: Any = node
    start = ray_node.Node.start_ray_processes

    def start_and_wait(started: Any) -> None:
        start(started)
        (raylet,) = started.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            if raylet.process.poll() is not None:
                raise NodeEnded(
                    f"Ray's node has ended with exit code {raylet.process.returncode} while it was starting: see that "
                    "the machine has memory left and is not too busy, and start again"
                )
            with suppress(RuntimeError):  # it is not known yet
                services.get_node(started.gcs_address, started.node_id)
                return
            time.sleep(0.1)

    ray_node.Node.start_ray_processes = start_and_wait
    try:
        yield
    finally:
        ray_node.Node.start_ray_processes = start


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which the processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
