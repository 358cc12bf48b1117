"""Weights through the object store: the bits arrive, without a copy, and go when nobody needs them."""

from __future__ import annotations

import gc
import re
import sys
import time
import warnings

import pytest
import ray
import torch
from ray._private.internal_api import memory_summary
from torch import Tensor

from fuse.workers.calls import gather
from fuse.workers.cluster import Cluster
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("cluster")


class Holder:
    """A worker that takes weights in and gives some out."""

    def sums(self, weights: list[WeightsRef]) -> dict[str, float]:
        return {name: tensor.double().sum().item() for name, tensor in get_state_dict(weights).items()}

    def export(self, name: str, size: int) -> WeightsRef:
        return put_state_dict({name: torch.full((size,), 2.0)})


def stored_bytes() -> int:
    """What the object store holds, of other tests too; Ray reports whole MiB."""
    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    found = re.search(r"Plasma memory usage (\d+) MiB", summary)
    assert found is not None
    return int(found[1]) << 20


def wait_for_stored_bytes(at_most: int) -> None:
    deadline_s = time.monotonic() + 300
    while stored_bytes() > at_most:
        assert time.monotonic() < deadline_s, f"{stored_bytes()} bytes are still stored"
        time.sleep(0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn])
def test_the_bits_arrive(dtype: torch.dtype) -> None:
    state_dict = {
        "matrix": torch.randn(3, 5).to(dtype),
        "transposed": torch.randn(4, 6).to(dtype).T,
        "scalar": torch.tensor(2.5).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        received = get_state_dict([put_state_dict(state_dict)])
    assert received.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        assert received[name].dtype == dtype
        assert received[name].shape == tensor.shape
        assert torch.equal(received[name].float(), tensor.float())


def test_parameters_that_need_gradients_are_taken_by_value() -> None:
    layer = torch.nn.Linear(4, 4)
    ref = put_state_dict(dict(layer.named_parameters()))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
    received = get_state_dict([ref])
    assert torch.equal(received["weight"], before)
    assert not received["weight"].requires_grad


def test_tied_weights_are_stored_once() -> None:
    shared = torch.randn(8, 4)
    ref = put_state_dict({"embedding": shared, "head": shared, "other": shared.clone()})
    assert ref.num_bytes == 2 * shared.nbytes
    received = get_state_dict([ref])
    assert received["embedding"].data_ptr() == received["head"].data_ptr() != received["other"].data_ptr()


def test_partial_state_dicts_are_merged_and_overlap_is_a_bug() -> None:
    first, second = put_state_dict({"a": torch.zeros(1)}), put_state_dict({"b": torch.ones(1)})
    assert {name: tensor.item() for name, tensor in get_state_dict([first, second]).items()} == {"a": 0.0, "b": 1.0}
    with pytest.raises(AssertionError, match="'a'"):
        get_state_dict([first, first])


def test_readers_share_the_memory_and_the_last_one_frees_it() -> None:
    gc.collect()
    before = stored_bytes()
    weights: Tensor = torch.ones(8 << 20)  # 32 MiB
    ref = put_state_dict({"weights": weights})
    first, second = get_state_dict([ref]), get_state_dict([ref])
    assert first["weights"].data_ptr() == second["weights"].data_ptr()
    assert 16 << 20 <= stored_bytes() - before < 63 << 20  # what earlier tests have left may go meanwhile
    for _ in range(4):  # superseded again and again
        ref = put_state_dict({"weights": weights})
        assert first["weights"].sum().item() == weights.numel(), "held tensors outlive their reference"
    del first, second
    gc.collect()
    wait_for_stored_bytes(before + (33 << 20))
    del ref
    wait_for_stored_bytes(before + (1 << 20))


def test_workers_exchange_weights_and_keep_none(cluster: Cluster) -> None:
    gc.collect()
    before = stored_bytes()
    workers = [cluster.spawn("model worker", device, Holder) for device in (0, 1)]
    for size in (4 << 20, 2 << 20):
        refs = gather([worker.call(Holder.export, f"stage {worker.device}", size) for worker in workers])
        sums = gather([worker.call(Holder.sums, refs) for worker in workers])
        assert sums == [{"stage 0": 2.0 * size, "stage 1": 2.0 * size}] * 2
        assert get_state_dict(refs)["stage 1"].sum().item() == 2.0 * size
    del refs
    gc.collect()
    wait_for_stored_bytes(before + (1 << 20))
    for worker in workers:
        cluster.kill(worker)
