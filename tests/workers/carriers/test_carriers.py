"""Weights from process to process in buckets: the bits arrive, few at a time, by whichever carrier, whoever dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuse.intrastage.communication import CommunicationError, serve_store
from fuse.workers.carriers.parcel import Parcel, bucket_bytes, cut
from fuse.workers.carriers.shared_memory import SharedMemoryCarrier, SharedPages
from fuse.workers.weight_port import Membership, WeightPort, WeightSender

CPU = torch.device("cpu")
TIMEOUT_S = 300.0


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (40, 6), "norm": (6,), "empty": (0, 3), "scalar": (), "up": (12, 6), "head": (9, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class Sending:
    """A sender of these weights, which says how many of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, most_bytes: int = 600) -> None:
        self.num_read = 0
        self.sender = WeightSender(
            shapes_of(tensors), self._read(tensors), dtype, CPU, most_bytes=most_bytes, is_silent=False
        )

    def _read(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for item in tensors.items():
            self.num_read += 1
            yield item


def open_buckets() -> int:
    """Files of buckets that this process has open."""
    links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return sum("memfd:fuse-weights" in link for link in links)


def mapped_buckets() -> int:
    """Buckets that this process has in its memory."""
    with open("/proc/self/maps") as maps:
        return len({line.split()[4] for line in maps if "memfd:fuse-weights" in line})


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=12),
    st.integers(1, 2000),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_buckets_hold_all_tensors_in_order_within_their_bound(
    shapes: list[tuple[int, ...]], most_bytes: int, dtype: torch.dtype
) -> None:
    named = {str(index): torch.Size(shape) for index, shape in enumerate(shapes)}
    buckets = cut(named, dtype, most_bytes)
    assert {entry.name: entry.shape for bucket in buckets for entry in bucket} == named
    assert [entry.name for bucket in buckets for entry in bucket] == [*named]
    for bucket in buckets:
        assert bucket
        assert bucket_bytes(bucket) <= most_bytes or len(bucket) == 1
        ends = [0, *(entry.offset + entry.num_bytes for entry in bucket)]
        assert all(entry.offset >= end for entry, end in zip(bucket, ends, strict=False)), "tensors overlap"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_memory_carries_the_bits_one_bucket_at_a_time(dtype: torch.dtype) -> None:
    """Tensors are asked for when there is room for them; those that are kept outlive the sender."""
    sent = weights()
    sending, port = Sending(sent, dtype), WeightPort()
    received: dict[str, Tensor] = {}
    before, num_parcels = mapped_buckets(), 0
    while (parcel := sending.sender.next(None)) is not None:
        num_parcels += 1
        assert open_buckets() == 1
        received |= port.receive([parcel])
        assert sending.num_read == len(received), "no tensor waits for a later bucket"
    assert num_parcels > 2
    assert open_buckets() == 0
    assert mapped_buckets() == before + num_parcels
    assert [*received] == [*sent]
    for name, tensor in sent.items():
        assert received[name].dtype == dtype
        assert torch.equal(received[name], tensor.to(dtype))
    received.clear()
    assert mapped_buckets() == before


def test_the_last_bucket_goes_with_a_sender_that_breaks_off() -> None:
    sending = Sending(weights(), torch.float32)
    assert sending.sender.next(None) is not None
    sending.sender.close()
    assert open_buckets() == 0


@pytest.mark.processes
def test_a_process_that_dies_takes_its_bucket_with_it_and_leaves_what_was_mapped() -> None:
    """No name of it was ever in a file system."""
    said, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # it must not return into the test
        try:
            carrier = SharedMemoryCarrier()
            carrier.allocate(1 << 16).fill_(7)
            os.write(said[1], str(carrier.offer().descriptor).encode())
            os.read(told[0], 1)
        finally:
            os._exit(1)
    descriptor = int(os.read(said[0], 16))
    address = SharedPages(child, descriptor, 1 << 16)
    memory = address.open()
    os.write(told[1], b"x")
    os.waitpid(child, 0)
    for end in (*said, *told):
        os.close(end)
    assert memory.eq(7).all()
    with pytest.raises(RuntimeError, match="No such file"):
        address.open()


# Broadcasts


@pytest.fixture
def members() -> Iterator[list[WeightPort]]:
    """A sender and two receivers, at addresses of their own."""
    store = serve_store("127.0.0.1", TIMEOUT_S)
    ports = [WeightPort() for _ in range(3)]

    def join(rank: int) -> None:
        own = Membership(
            group="g",
            store=("127.0.0.1", store.port),
            host=f"127.0.0.{rank + 1}",
            rank=rank,
            size=3,
            device="cpu",
            timeout_s=TIMEOUT_S,
        )
        ports[rank].join(own)

    at_once([lambda rank=rank: join(rank) for rank in range(3)])
    yield ports
    for port in ports:
        port.leave("g")


def at_once(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)


def test_a_broadcast_carries_the_bits_that_shared_memory_does(members: list[WeightPort]) -> None:
    sender, *receivers = members
    near, far = dict[str, Tensor](), [dict[str, Tensor](), dict[str, Tensor]()]
    sending = Sending(weights(), torch.bfloat16)
    while (parcel := sending.sender.next(sender.group("g"))) is not None:
        near |= sender.receive([parcel])
        by_group = replace(parcel, address=None, group="g")

        def take(index: int, by_group: Parcel = by_group) -> None:
            far[index] |= receivers[index].receive([by_group])

        at_once([lambda index=index: take(index) for index in range(2)])
    for one in far:
        assert [*one] == [*near]
        assert all(torch.equal(one[name], tensor) for name, tensor in near.items())


def test_a_member_that_is_lost_ends_the_others_waiting(members: list[WeightPort]) -> None:
    sender, *receivers = members
    raised: list[BaseException] = []

    def wait(port: WeightPort) -> None:
        group = port.group("g")
        assert group is not None
        try:
            group.receive(8)
        except CommunicationError as error:
            raised.append(error)

    def lose() -> None:
        sender.leave("g")

    at_once([lambda: wait(receivers[0]), lambda: wait(receivers[1]), lose])
    assert len(raised) == 2
    assert all("weights: receiving by g failed" in str(error) for error in raised)
