"""KV from one process to another: the same bytes, memory used again, and processes that die or do not answer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OwnerDiedError
from torch import Tensor

from fuse.driver.kv_choice import choose_kv_transfer
from fuse.engines import kv_memory
from fuse.workers.calls import Worker
from fuse.workers.cluster import Cluster
from fuse.workers.kv.transfer import KVRef, KVTransfer, NixlRef, ObjectStoreTransfer
from fuse.workers.weights import WeightsRef

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 300.0
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64)
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: make setup-vllm-cpu"
)
CARRIERS = ["object_store", pytest.param("nixl", marks=needs_nixl)]


def make_transfer(name: str) -> KVTransfer:
    if name == "object_store":
        return ObjectStoreTransfer()
    from fuse.workers.kv.nixl import NixlTransfer

    return NixlTransfer(torch.device("cpu"), is_local=True)


def kv(seed: int, num_values: int = 60) -> list[Tensor]:
    """A tensor of each dtype, of random bits, NaNs included; and one without values."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [num_values * dtype.itemsize for dtype in DTYPES]
    bits = [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in sizes]
    tensors = [one.view(dtype).view(2, -1, 3) for one, dtype in zip(bits, DTYPES, strict=True)]
    return [*tensors, torch.empty(2, 0, 3)]


def same(tensors: tuple[Tensor, ...], seed: int, num_values: int = 60) -> bool:
    expected = kv(seed, num_values)
    return len(tensors) == len(expected) and all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(tensors, expected, strict=True)
    )


def present(ref: KVRef | None) -> KVRef:
    assert ref is not None
    return ref


class SteppedClock:
    """In place of `time`: sleeping is what time passes by."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Peer:
    """A process with a carrier, and what it fetched."""

    def __init__(self) -> None:
        self.before = self._listening()
        self.transfer: Any = ObjectStoreTransfer()

    def renew(self, name: str) -> None:
        self.close()
        self.transfer = make_transfer(name)
        self.fetched: dict[int, tuple[Tensor, ...]] = {}

    def offer(self, seed: int, num_values: int = 60, in_place: bool = False) -> KVRef:
        tensors = kv(seed, num_values)
        if in_place:
            layout = kv_memory.layout_of(tensors)
            places = kv_memory.views(self.transfer.allocate(kv_memory.num_bytes(layout)), layout)
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
            tensors = list(places)
        return present(self.transfer.offer(tensors))

    def offer_on(self, seed: int) -> KVRef:
        return present(self.transfer.offer(self.fetched.pop(seed)))

    def fetch(self, ref: KVRef, seed: int) -> int | None:
        """Where it is now."""
        fetched = self.transfer.fetch(ref)
        if fetched is None:
            return None
        self.fetched[seed] = fetched
        return fetched[0].data_ptr()

    def holds(self, seed: int, num_values: int = 60) -> bool:
        return same(self.fetched[seed], seed, num_values)

    def release(self, seed: int) -> None:
        self.transfer.release(self.fetched.pop(seed))

    def recall(self) -> None:
        self.transfer.recall()

    def wait_for(self, num_offered: int) -> bool:
        give_up_s = time.monotonic() + PATIENCE_S
        while self.transfer.num_offered != num_offered and time.monotonic() < give_up_s:
            time.sleep(0.001)
        return bool(self.transfer.num_offered == num_offered)

    def wait_in_vain(self, ref: KVRef) -> float:
        """The seconds for which a fetch waits that nobody answers, by a clock that nothing but its waiting moves on."""
        from fuse.workers.kv import nixl

        clock = SteppedClock()
        nixl.time = clock
        try:
            assert self.transfer.fetch(ref) is None
        finally:
            nixl.time = time
        return clock.now_s

    def fill_device(self) -> None:
        def register(num_bytes: int) -> None:
            raise torch.OutOfMemoryError("the device is full")

        self.transfer._register = register

    def busy_s(self, seconds: float) -> float:
        """Processor time of all threads while this one sleeps."""
        start = psutil.Process().cpu_times()
        time.sleep(seconds)
        end = psutil.Process().cpu_times()
        return end.user + end.system - start.user - start.system

    def opened(self) -> list[str]:
        """Where it listens since it has the carrier, and what UCX's thread is called."""
        return [ip for ip, _ in self._listening() - self.before] + [name for name in self._threads() if name == "async"]

    def close(self) -> None:
        self.transfer.close()
        self.transfer.close()

    def _listening(self) -> set[tuple[str, int]]:
        connections = psutil.Process().net_connections("inet")
        return {tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}

    def _threads(self) -> list[str]:
        names = []
        for path in Path("/proc/self/task").glob("*/comm"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                names.append(path.read_text().strip())
        return names


def ask(worker: Worker[Peer], method: Callable[Concatenate[Peer, P], T], *arguments: P.args, **options: P.kwargs) -> T:
    return worker.call(method, *arguments, **options).result()


def open_files(worker: Worker[Peer]) -> list[str]:
    files = []
    for fd in Path(f"/proc/{worker.process_id}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed again
            files.append(os.readlink(fd))
    return files


class Pair:
    """Two processes that outlive a test, unless it kills one."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers = [self._spawn(device) for device in (0, 1)]

    def start(self, name: str) -> tuple[Worker[Peer], Worker[Peer]]:
        """Both with a new carrier."""
        for worker in self._workers:
            ask(worker, Peer.renew, name)
        return self._workers[0], self._workers[1]

    def kill_first(self) -> None:
        process = psutil.Process(self._workers[0].process_id)
        process.kill()
        process.wait(PATIENCE_S)

    def replace_first(self, name: str) -> Worker[Peer]:
        self._cluster.kill(self._workers[0])
        self._workers[0] = self._spawn(0)
        ask(self._workers[0], Peer.renew, name)
        return self._workers[0]

    def close(self) -> None:
        for worker in self._workers:
            self._cluster.kill(worker)

    def _spawn(self, device: int) -> Worker[Peer]:
        return self._cluster.spawn("peer", device, Peer)


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> Iterator[Pair]:
    started = Pair(cluster)
    yield started
    started.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_bytes_arrive_in_every_dtype(pair: Pair, carrier: str) -> None:
    source, target = pair.start(carrier)
    for seed, num_values in enumerate((6, 600, 300_000, 0)):
        ref = ask(source, Peer.offer, seed, num_values)
        assert ref.num_bytes == num_values * sum(dtype.itemsize for dtype in DTYPES)
        assert ask(target, Peer.fetch, ref, seed) is not None
        assert ask(target, Peer.holds, seed, num_values)


@needs_nixl
def test_what_is_read_and_what_is_given_back_is_used_again(pair: Pair) -> None:
    source, target = pair.start("nixl")
    first, second = (ask(source, Peer.offer, seed, 60, True) for seed in (1, 2))
    assert first.address != second.address
    first_at = ask(target, Peer.fetch, first, 1)
    assert ask(source, Peer.wait_for, 1)
    third = ask(source, Peer.offer, 3)
    assert third.address == first.address, "it was read"
    assert ask(target, Peer.fetch, second, 2) != first_at
    assert all(ask(target, Peer.holds, seed) for seed in (1, 2))
    ask(target, Peer.release, 1)
    assert ask(target, Peer.fetch, third, 3) == first_at, "it was given back"
    assert all(ask(target, Peer.holds, seed) for seed in (2, 3))

    again = ask(target, Peer.offer_on, 3)
    assert again.address == first_at, "what is offered on stays where it is"
    ask(target, Peer.recall)
    assert ask(target, Peer.wait_for, 0)

    on = ask(target, Peer.offer, 4)
    assert ask(source, Peer.fetch, on, 4) is not None
    assert ask(source, Peer.holds, 4)


@needs_nixl
def test_memory_grows_while_offers_wait(pair: Pair) -> None:
    """The first ones are read last, by a process that knows the offering one already."""
    source, target = pair.start("nixl")
    sizes = {seed: 60 << (4 * seed) for seed in range(4)}
    refs = {seed: ask(source, Peer.offer, seed, num_values, seed % 2 == 0) for seed, num_values in sizes.items()}
    assert len({ref.address for ref in refs.values()}) == len(refs)
    for seed in reversed(refs):
        ask(target, Peer.fetch, refs[seed], seed)
    assert all(ask(target, Peer.holds, seed, num_values) for seed, num_values in sizes.items())
    assert ask(source, Peer.wait_for, 0)


@needs_nixl
def test_what_nobody_fetches_is_taken_back(pair: Pair) -> None:
    source, _ = pair.start("nixl")
    lost = ask(source, Peer.offer, 1)
    ask(source, Peer.recall)
    assert ask(source, Peer.wait_for, 0)
    assert ask(source, Peer.offer, 2).address == lost.address


@needs_nixl
def test_kv_that_finds_no_room_is_lost_and_no_more(pair: Pair) -> None:
    source, target = pair.start("nixl")
    small, large = (ask(source, Peer.offer, seed, num_values) for seed, num_values in ((1, 60), (2, 300_000)))
    assert ask(target, Peer.fetch, small, 1) is not None
    ask(target, Peer.release, 1)
    ask(target, Peer.fill_device)
    assert ask(target, Peer.fetch, large, 2) is None
    assert ask(target, Peer.fetch, ask(source, Peer.offer, 3), 3) is not None, "there is a piece of this size"
    assert ask(target, Peer.holds, 3)


@needs_nixl
def test_a_reference_is_plain_data(pair: Pair) -> None:
    source, _ = pair.start("nixl")
    ref = ask(source, Peer.offer, 1, 300_000)
    assert isinstance(ref, NixlRef)
    assert ref.layout[1] == ("torch.bfloat16", (2, 50_000, 3))
    assert len(cloudpickle.dumps(ref)) < 4096


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("num_before", [0, 1])
def test_kv_of_a_killed_process_is_lost_and_no_more(pair: Pair, carrier: str, num_before: int) -> None:
    """Whether or not it was read from before; and the other one goes on with the next.

    The object store on the same host may still have it.
    """
    source, target = pair.start(carrier)
    for seed in range(num_before):
        assert ask(target, Peer.fetch, ask(source, Peer.offer, seed), seed) is not None
    ref = ask(source, Peer.offer, 7, 300_000)
    pair.kill_first()
    where = ask(target, Peer.fetch, ref, 7)
    assert where is None or (carrier == "object_store" and ask(target, Peer.holds, 7, 300_000))
    source = pair.replace_first(carrier)
    assert ask(target, Peer.fetch, ask(source, Peer.offer, 8), 8) is not None
    assert ask(target, Peer.holds, 8)


@pytest.mark.usefixtures("cluster")
def test_what_the_object_store_has_lost_is_lost_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is on another host than the process that died."""

    def get(references: object) -> None:
        raise OwnerDiedError("00", b"", "")

    transfer = ObjectStoreTransfer()
    ref = present(transfer.offer(kv(0)))
    monkeypatch.setattr(ray, "get", get)
    assert transfer.fetch(ref) is None


@pytest.mark.parametrize("error", [ObjectStoreFullError("full"), OutOfDiskError("full")])
def test_a_full_object_store_or_disk_moves_samples_without_kv(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "put", full)
    monkeypatch.setattr(ray, "get", full)
    nowhere: Any = None
    transfer = ObjectStoreTransfer()
    assert transfer.offer(kv(1)) is None
    assert transfer.fetch(WeightsRef(nowhere, 0)) is None


@needs_nixl
def test_a_process_that_does_not_answer_is_given_up_and_may_come_back(pair: Pair) -> None:
    source, target = pair.start("nixl")
    assert ask(target, Peer.fetch, ask(source, Peer.offer, 0), 0) is not None
    refs = [ask(source, Peer.offer, seed, 300_000) for seed in range(4)]
    os.kill(source.process_id, signal.SIGSTOP)
    try:
        first_s, *later_s = [ask(target, Peer.wait_in_vain, ref) for ref in refs[:3]]
        assert first_s > 5.0 > max(later_s), "it is not waited for as long again"
    finally:
        os.kill(source.process_id, signal.SIGCONT)
    deadline_s = time.monotonic() + PATIENCE_S
    while ask(target, Peer.fetch, refs[3], 3) is None:
        assert time.monotonic() < deadline_s
    assert ask(target, Peer.holds, 3, 300_000)


@needs_nixl
def test_a_carrier_listens_on_loopback_idles_and_leaves_nothing(pair: Pair) -> None:
    source, target = pair.start("nixl")
    assert ask(target, Peer.fetch, ask(source, Peer.offer, 0), 0) is not None
    for peer in (source, target):
        assert set(ask(peer, Peer.opened)) == {"127.0.0.1", "async"}
        assert ask(peer, Peer.busy_s, 1.0) < 0.5, "a thread that spins takes all of it"
    shared = [name for peer in (source, target) for name in open_files(peer) if "shm/ucx" in name]
    assert all(name.endswith("(deleted)") for name in shared), "a killed process would leave it"
    for peer in (target, source):
        ask(peer, Peer.close)
        assert ask(peer, Peer.opened) == []


@pytest.mark.parametrize(
    ("versions", "state"),
    [
        ({}, "nixl 1.5.1, which is not installed"),
        ({"nixl": "0.9.0"}, "nixl 1.5.1, which is installed as 0.9.0"),
        ({"nixl": "1.5.1"}, "nixl-cu12 1.5.1, which is not installed"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], state: str
) -> None:
    def version(package: str) -> str:
        if package in versions:
            return versions[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=f"needs {state}: pip install --no-deps nixl==1.5.1 nixl-cu12==1") as error:
        choose_kv_transfer("nixl", "cpu", is_local=True)
    assert "\n" not in str(error.value)
    assert isinstance(choose_kv_transfer("object_store", "cpu", is_local=True)(), ObjectStoreTransfer)
