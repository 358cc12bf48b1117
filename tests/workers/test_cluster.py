"""Workers on a local cluster of two devices: where they run, how calls behave, what a failure looks like."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from fuse.workers.calls import Worker, as_received, gather, wait_ended
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import tests

PATIENCE_S = 300.0


class Echo:
    concurrent_methods = frozenset({"sleep"})

    def __init__(self, answer: str = "here") -> None:
        if not answer:
            raise ValueError("an answer is needed\nand more lines follow")
        self.answer = answer
        self.calls: list[int] = []

    def echo(self, value: Any) -> Any:
        return self.answer, value

    def note(self, value: int) -> list[int]:
        self.calls.append(value)
        return self.calls

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def hang(self) -> None:
        time.sleep(1000)

    def fail(self) -> None:
        raise KeyError("no such thing")

    def surroundings(self) -> dict[str, Any]:
        is_born_with_torch = "torch" in sys.modules
        import torch

        cores = set()
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended
                cores.add(frozenset(os.sched_getaffinity(int(thread))))
        return {
            "born": is_born_with_torch,
            "threads": torch.get_num_threads(),
            "cores": cores,
        }


Spawn = Callable[..., Worker[Echo]]


@pytest.fixture
def spawn(cluster: Cluster) -> Iterator[Spawn]:
    spawned = []

    def spawn(role: str, device: int, *args: Any, **kwargs: Any) -> Worker[Echo]:
        spawned.append(cluster.spawn(role, device, Echo, *args, **kwargs))
        return spawned[-1]

    yield spawn
    for worker in spawned:
        cluster.kill(worker)


def test_two_workers_share_each_device_and_nothing_with_the_other(cluster: Cluster, spawn: Spawn) -> None:
    workers = [spawn(role, device) for device in (0, 1) for role in ("generation worker", "model worker")]
    found = gather([worker.call(Echo.surroundings) for worker in workers])
    assert len({worker.process_id for worker in workers}) == 4
    assert all(one["born"] for one in found)
    assert [one["threads"] for one in found] == [1] * 4
    pinned = [one["cores"] for one in found]
    assert pinned[0] == pinned[1] != pinned[2] == pinned[3]
    assert all(len(cores) == 1 for one in pinned for cores in one), "a worker's threads run on more than one core"
    assert cluster.host(0) == cluster.host(1) == "127.0.0.1"


def test_only_this_machine_can_reach_the_cluster(cluster: Cluster, spawn: Spawn) -> None:
    spawn("model worker", 0).call(Echo.echo, 1).result()
    listening: dict[str, set[str]] = defaultdict(set)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening[process.name()].add(connection.laddr.ip.removeprefix("::ffff:"))
    assert "gcs_server" in listening
    assert set.union(*listening.values()) == {"127.0.0.1"}


def test_calls_run_in_order_and_a_blocking_one_does_not_hold_them_up(spawn: Spawn) -> None:
    worker = spawn("generation worker", 0, answer="yes")
    blocked = worker.call(Echo.sleep, 1000.0)
    assert gather([worker.call(Echo.note, value) for value in range(20)])[-1] == list(range(20))
    assert worker.call(Echo.echo, as_received(ray.put(3))).result() == ("yes", 3)
    assert wait_ended([blocked], timeout_s=0.0) == []
    with pytest.raises(WorkerError, match="generation worker on device 0 failed: no answer within 0 s"):
        gather([blocked], timeout_s=0.0)
    quick = worker.call(Echo.echo, 2)
    assert wait_ended([blocked, quick]) == [quick]
    assert quick.result() == ("yes", 2)


def test_nobody_is_asked_about_calls_that_have_not_ended(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = spawn("generation worker", 0, answer="yes")
    blocked = worker.call(Echo.sleep, 1000.0)
    asked: list[object] = []
    monkeypatch.setattr(ray, "wait", lambda *arguments, **options: asked.append(arguments))
    for value in range(20):
        call = worker.call(Echo.echo, value)
        assert wait_ended([blocked, call]) == [call]
        assert call.result() == ("yes", value)
    assert len(gather([worker.call(Echo.echo, value) for value in range(20)])) == 20
    assert not blocked.has_ended
    assert not asked


def test_a_process_that_was_warmed_up_is_the_next_worker_of_its_role_and_device(cluster: Cluster, spawn: Spawn) -> None:
    cluster.warm("model worker", 1, Echo)
    warmed = cluster._warm["model worker", 1]
    elsewhere, there = spawn("model worker", 0), spawn("model worker", 1)
    assert not cluster._warm
    assert there._actor is warmed is not elsewhere._actor
    assert there.call(Echo.echo, 1).result()
    assert there.process_id != elsewhere.process_id


def test_workers_of_other_hosts_are_asked_for_files(
    cluster: Cluster, spawn: Spawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = spawn("model worker", 1)
    assert cluster.elsewhere() == {}
    here, there = cluster.devices
    monkeypatch.setattr(cluster, "devices", (here, replace(there, host="10.0.0.2")))
    assert cluster.elsewhere() == {"10.0.0.2": worker}
    (tmp_path / "file").touch()
    assert [worker.sees(str(tmp_path / name)).result() for name in ("file", "none")] == [True, False]


def test_an_exception_names_device_role_and_cause_and_keeps_its_traceback(spawn: Spawn) -> None:
    worker = spawn("model worker", 1)
    with pytest.raises(WorkerError, match=r"^model worker on device 1 failed: KeyError: 'no such thing'$") as caught:
        gather([worker.call(Echo.echo, 1), worker.call(Echo.fail)])
    assert (caught.value.device, caught.value.role) == (1, "model worker")
    assert 'raise KeyError("no such thing")' in str(caught.value.__cause__)
    assert worker.call(Echo.echo, 1).result() == ("here", 1)


def test_a_constructor_that_raises_is_the_cause_of_every_call(spawn: Spawn) -> None:
    worker = spawn("model worker", 0, answer="")
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"model worker on device 0 failed: ValueError: an answer is needed$"):
            worker.call(Echo.echo, 1).result()


def test_a_killed_process_is_noticed_while_others_hang(spawn: Spawn, capfd: pytest.CaptureFixture[str]) -> None:
    stuck, doomed = spawn("model worker", 0), spawn("model worker", 1)
    futures = [stuck.call(Echo.hang), doomed.call(Echo.hang)]
    os.kill(doomed.process_id, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"^model worker on device 1 failed: its process died"):
        gather(futures)
    with pytest.raises(WorkerError, match="device 1"):
        doomed.call(Echo.echo, 1).result()
    printed = "".join(capfd.readouterr())
    assert "(raylet" not in printed, "one error is enough"
    assert "pid=" not in printed


class Crashing:
    def __init__(self, at_once: bool) -> None:
        if at_once:
            self.crash()

    def crash(self) -> None:
        os.write(2, b"native code: invariant broken\n")
        os.abort()


def test_a_crash_of_native_code_brings_its_last_words(cluster: Cluster) -> None:
    for at_once in (True, False):
        worker = cluster.spawn("model worker", 0, Crashing, at_once)
        try:
            with pytest.raises(WorkerError, match="its process died") as caught:
                worker.call(Crashing.crash).result()
            assert any("invariant broken" in note for note in caught.value.__cause__.__notes__)
        finally:
            cluster.kill(worker)


def test_last_words_are_found_when_ray_is_late_to_tell_of_a_death(cluster: Cluster) -> None:
    (raylet,) = (one for one in psutil.Process().children() if one.name() == "raylet")
    worker = cluster.spawn("model worker", 0, Crashing, at_once=False)
    process = psutil.Process(worker.process_id)
    raylet.suspend()
    try:
        crash = worker.call(Crashing.crash)
        process.wait(PATIENCE_S)
        assert not crash.has_ended, "Ray has not been late"
    finally:
        raylet.resume()
    try:
        with pytest.raises(WorkerError, match="its process died") as caught:
            crash.result()
        assert any("invariant broken" in note for note in caught.value.__cause__.__notes__)
    finally:
        cluster.kill(worker)


def test_a_third_worker_on_a_device_is_refused(spawn: Spawn) -> None:
    spawn("generation worker", 0)
    spawn("model worker", 0)
    with pytest.raises(AssertionError, match="device 0 already has 2 workers"):
        spawn("model worker", 0)


def test_bad_arguments_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="num_devices=0"):
        Cluster(0)
    with pytest.raises(ValueError, match="'tpu' is unknown: choose 'cpu' or 'cuda'"):
        Cluster(1, accelerator="tpu")
