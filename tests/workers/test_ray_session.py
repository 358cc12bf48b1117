"""What a run leaves behind: nothing, however it ends; and what it refuses to start with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray._private import node, ray_constants, services
from ray.exceptions import RayError

from fuse.workers import fork_server, ray_session
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError, cause_of
from fuse.workers.ray_session import local_cluster

pytestmark = [pytest.mark.own_ray, pytest.mark.processes]

DRIVER = """
import signal, sys, time
from fuse.workers import fork_server, ray_session
from fuse.workers.cluster import Cluster

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is born deaf to it

class Sleeper:
    def sleep(self): time.sleep(1000)

with Cluster(1) as cluster:
    workers = [cluster.spawn(role, 0, Sleeper) for role in ("generation worker", "model worker")]
    print(*[worker.process_id for worker in workers], flush=True)
    if "raise" in sys.argv:
        raise RuntimeError("the run failed")
    workers[0].call(Sleeper.sleep).result()
"""
PATIENCE_S = 300.0
# what begins a line that Ray has for the user: from its start, of its processes, of its workers
RAY_MARKS = ("worker.py:", "(raylet", "pid=")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where drivers put their temporary files; pytest's own is too long for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    with ExitStack() as drivers:

        def start(*arguments: str) -> subprocess.Popen[str]:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, *arguments],
                env=os.environ | {"TMPDIR": str(directory), "HOME": str(directory)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            drivers.enter_context(driver)
            drivers.callback(driver.kill)
            return driver

        yield start


def processes_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that the driver started, once its workers are there."""
    assert driver.stdout is not None
    workers = {int(process_id) for process_id in driver.stdout.readline().split()}
    processes = psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) == 2
    assert workers < {process.pid for process in processes}
    return processes


def main_ones_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are there for as long as the run: Ray starts others for a moment."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(("gcs_server", "raylet", "ray::Process")):
                found.append(process)
    return found


def assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    # Those that lost their parent wait for init to take note of their end.
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def mentions(process: psutil.Process, directory: Path) -> bool:
    """Whether the process was started by a driver that was told to use `directory`; zombies have no environment."""
    try:
        return process.environ().get("TMPDIR") == str(directory)
    except psutil.Error:
        return False


def test_runs_beside_each_other_leave_nothing_when_killed_or_interrupted(directory: Path, start: Start) -> None:
    killed, interrupted = start(), start()
    first, second = processes_of(killed), processes_of(interrupted)
    main_ones = [psutil.Process(interrupted.pid), *main_ones_of(second)]
    assert len(main_ones) == 5
    assert len(list(directory.glob("fuse-*"))) == 2

    killed.kill()
    assert_all_gone(first)
    assert len(list(directory.iterdir())) == 1

    assert all(process.is_running() for process in main_ones), "the other run does not care"
    interrupted.send_signal(signal.SIGINT)
    _, error = interrupted.communicate(timeout=PATIENCE_S)
    assert "KeyboardInterrupt" in error
    assert_all_gone(second)
    assert list(directory.iterdir()) == []


def test_a_run_leaves_nothing_when_terminated_or_failed(directory: Path, start: Start) -> None:
    terminated, failed = start(), start("raise")
    processes = processes_of(terminated)
    terminated.terminate()
    _, error = failed.communicate(timeout=PATIENCE_S)
    assert "RuntimeError: the run failed\n" in error
    assert not [mark for mark in RAY_MARKS if mark in error], "Ray is not heard"
    terminated.communicate(timeout=PATIENCE_S)
    assert_all_gone(processes)
    assert_all_gone([process for process in psutil.process_iter() if mentions(process, directory)])
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("name", "what"), [("gcs_server", "control service"), ("raylet", "node")])
def test_the_end_of_a_process_of_rays_ends_a_run_in_a_line(name: str, what: str, directory: Path, start: Start) -> None:
    """Workers end with the node."""
    driver = start()
    processes = processes_of(driver)
    (process,) = (process for process in main_ones_of(processes) if process.name() == name)
    process.kill()
    _, error = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1
    assert error.count(f"Ray's {what} has ended, and with it the run") == 1
    assert "Failed to connect to GCS" not in error
    assert_all_gone(processes)
    assert list(directory.iterdir()) == []


def test_a_machine_that_is_too_busy_for_rays_patience_starts_it_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hears late of its node; and whenever it looks at its clock in between, a minute has passed."""
    clock, look = count(step=60.0), services.get_node
    answers = iter([False] * 3)

    def get_node(gcs_address: str, node_id: str) -> Any:
        if next(answers, True):
            return look(gcs_address, node_id)
        raise RuntimeError("no such node")

    busy = SimpleNamespace(**vars(time) | {"monotonic": lambda: next(clock)})
    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(node, "time", busy)
    with local_cluster(num_cpus=1):
        assert ray.is_initialized()


@pytest.fixture
def node_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one, while it is starting; as on a busy machine, where one of its agents is late."""
    start, ends = node.Node.start_ray_processes, iter([True])

    def start_and_end(started: Any) -> None:
        start(started)
        if next(ends, False):
            (raylet,) = started.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
            raylet.process.kill()
            raylet.process.wait()

    monkeypatch.setattr(node.Node, "start_ray_processes", start_and_end)


@pytest.mark.usefixtures("node_that_ends")
def test_a_node_that_ends_while_it_starts_is_started_again_and_nobody_else_can_look_into_its_files() -> None:
    with local_cluster(num_cpus=1, imported=["json"]) as directory:
        assert ray.is_initialized()
        assert [one for one in psutil.Process().children() if fork_server.__file__ in one.cmdline()], "it lives on"
        assert directory.stat().st_mode & 0o077 == 0
        assert (directory / ray_session.RAY_FILES / "session_latest").exists()


@pytest.mark.usefixtures("node_that_ends")
def test_a_node_that_ends_every_time_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "_START_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="has ended with exit code -9 while it was starting"):
        local_cluster(num_cpus=1).__enter__()
    assert not ray.is_initialized()


def test_more_devices_than_cores_are_refused_before_anything_starts() -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"num_devices={cores + 1}, but this machine has {cores} .*ray_address"):
        Cluster(cores + 1).__enter__()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "no Ray cluster answers there"),
        ("somewhere", "is not an address"),
        ("ray://somewhere:10001", "is a Ray client address"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray, which would wait for minutes, hears of it."""

    def init(*arguments: object, **options: object) -> None:
        pytest.fail("Ray was asked")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match=reason):
        Cluster(1, ray_address=address).__enter__()


def test_a_failure_is_one_line() -> None:
    assert cause_of(RayError("first\nsecond")) == "RayError: first"
    assert str(WorkerError(3, "model worker", "OOM")) == "model worker on device 3 failed: OOM"
