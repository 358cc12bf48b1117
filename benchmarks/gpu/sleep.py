"""What an engine gives back when it sleeps, and that it wakes up as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import Tensor

from fuse.benchmarks.gpu.requests import generate, requests_of
from fuse.benchmarks.gpu.setup import Row, Setup, gigabytes, random_model
from fuse.engines.transformers import TransformersEngine

_LEAST_SHARE = 0.95
_TOKENS = 16


def check(setup: Setup) -> Iterator[Row]:
    """One row of bytes, and one of the tokens before and after."""
    held = _held_bytes(setup)
    engine = TransformersEngine(
        random_model(setup, "actor", setup.dtype),
        max_batch=setup.batch_size,
        max_context=setup.prompt_tokens + setup.response_tokens,
    )
    requests = requests_of(setup, setup.batch_size, min(_TOKENS, setup.response_tokens))
    before = generate(engine, requests)
    awake = _held_bytes(setup) - held
    engine.sleep()
    asleep = _held_bytes(setup) - held
    engine.load_weights(dict(random_model(setup, "actor", setup.dtype).named_parameters()))
    after = generate(engine, requests)
    share = 1 - asleep / awake
    yield Row(
        name="sleep gives back",
        measured=f"{share:.1%}",
        bound=f"{_LEAST_SHARE:.0%} or more",
        ok=share >= _LEAST_SHARE,
        detail=f"of {gigabytes(awake)}, {gigabytes(asleep)} stay",
    )
    yield Row(
        name="tokens after sleep",
        measured="the same" if before == after else "others",
        bound="the same",
        ok=before == after,
        detail=f"{len(requests)} samples, log-probabilities included",
    )


def _held_bytes(setup: Setup) -> int:
    """What this process keeps of the device's memory for tensors, once it has given back what none is in."""
    gc.collect()
    if setup.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()
    storages = {}
    for one in gc.get_objects():
        if type(one) in (Tensor, torch.nn.Parameter) and not one.is_meta:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
