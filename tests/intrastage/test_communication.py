"""Joining a world that does not come together. Worlds that do: tests/distributed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuse.intrastage import communication
from fuse.intrastage.communication import CommunicationError, connect, serve_store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_world_is_left() -> Iterator[None]:
    """Where time runs out late, joining has made what the next test would find."""
    yield
    communication.disconnect()


def test_a_rank_that_never_comes_ends_in_an_error() -> None:
    store = serve_store("127.0.0.1", 1.0)
    with pytest.raises(
        CommunicationError, match=rf"rank 0: joining the world of 2 .* at 127.0.0.1:{store.port} failed"
    ):
        connect(0, 2, "127.0.0.1", store.port, CPU, 1.0)


def test_a_store_that_is_not_there_ends_in_an_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can take the port meanwhile
        with pytest.raises(CommunicationError, match="rank 1: joining the world of 2"):
            connect(1, 2, "127.0.0.1", unused.getsockname()[1], CPU, 1.0)


def test_two_stores_never_share_a_port() -> None:
    first, second = serve_store("127.0.0.1", 1.0), serve_store("127.0.0.1", 1.0)
    assert first.port != second.port


def test_gpus_meet_by_nccl_on_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without them can tell."""
    asked: dict[str, Any] = {}
    in_use: list[torch.device] = []
    sum_of_one = SimpleNamespace(wait=lambda: None)
    world = SimpleNamespace(
        init_process_group=lambda backend, *_, **options: asked.update(options, backend=backend),
        get_rank=lambda: 0,
        all_reduce=lambda *_, **__: sum_of_one,
        group=SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=None)),
    )
    monkeypatch.setattr(communication, "dist", world)
    monkeypatch.setattr(communication, "TCPStore", lambda *_, **__: "store")
    monkeypatch.setattr(torch.cuda, "set_device", in_use.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    connect(0, 1, "192.0.2.1", 1, torch.device("cuda"), 1.0)
    assert asked["backend"] == "nccl"
    assert asked["device_id"] == torch.device("cuda", 3)
    assert in_use == [torch.device("cuda", 3)]
    assert os.environ == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",  # the user's
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    }


@pytest.mark.processes
def test_groups_that_cannot_be_are_refused() -> None:
    """In a world of its own, as a process can be in one world at a time."""
    program = """
import torch
from fuse.intrastage.communication import connect, disconnect, open_model, open_tensor_group, serve_store
store = serve_store("127.0.0.1", 300.0)
connect(0, 1, "127.0.0.1", store.port, torch.device("cpu"), 300.0)
for open_groups in (
    lambda: open_model([(0, 0), (0,)], 300.0),
    lambda: open_model([(0,), (0,)], 300.0),
    lambda: open_tensor_group(2, 300.0),
):
    try:
        open_groups()
    except ValueError as error:
        print(error)
disconnect()
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    stages, replicas, tensor = finished.stdout.splitlines()
    assert "differ in their number of stages" in stages
    assert "two of the replicas [(0,), (0,)] have the same ranks: put each on ranks of its own" in replicas
    assert "tensor_parallel_size=2 does not divide the 1 devices: choose a divisor" in tensor
