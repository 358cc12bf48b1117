"""Giving weights to the processes of an engine, as a driver does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fuse.workers.calls import gather
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.weight_port import WeightSender


def give(engine: GenerationHandle, weights: Mapping[str, Tensor], most_bytes: int = 1) -> None:
    """All of them, in buckets of at most so many bytes, by default of one tensor.

    Raises: WorkerError when the engine objects.
    """
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    cpu = torch.device("cpu")
    sender = WeightSender(shapes, iter(weights.items()), torch.float32, cpu, most_bytes=most_bytes, is_silent=False)
    try:
        gather([taker.begin_weights(shapes) for taker in engine.takers])
        while (parcel := sender.next(None)) is not None:
            gather([taker.load([parcel]) for taker in engine.takers])
        gather([taker.end_weights() for taker in engine.takers])
    finally:
        sender.close()
