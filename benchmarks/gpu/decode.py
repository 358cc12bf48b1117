"""Decode steps per second against what reading the weights alone allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fuse.benchmarks.gpu.requests import requests_of
from fuse.benchmarks.gpu.setup import Row, Setup, random_model
from fuse.benchmarks.measure import seconds_of
from fuse.engines.transformers import TransformersEngine

_WARMUP = 3
_COPIED_BYTES = {"cuda": 1 << 31, "cpu": 1 << 24}
"""More than caches hold."""
_TOLERANCE = 1.05
"""Of the measured bandwidth."""


def check(setup: Setup) -> Iterator[Row]:
    """A row for each batch size, and on a GPU one with graphs; what beats the floor is measured wrongly."""
    model = random_model(setup, "actor", setup.dtype)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    bandwidth = _bytes_per_s(setup)
    for rows, captures in itertools.product(setup.decode_rows, (False, True) if setup.device == "cuda" else (False,)):
        num_tokens = rows + _WARMUP + setup.decode_steps  # the first rows decode while others are prefilled
        engine = TransformersEngine(
            model, max_batch=rows, max_context=setup.prompt_tokens + num_tokens, captures_decode=captures
        )
        for request in requests_of(setup, rows, num_tokens):
            engine.submit(request)
        while len(engine.step()) < rows:
            pass
        for _ in range(_WARMUP):
            engine.step()
        step_s = seconds_of(lambda engine=engine: [engine.step() for _ in range(setup.decode_steps)])  # type: ignore[misc]
        rate, floor = setup.decode_steps / step_s, bandwidth / weight_bytes
        yield Row(
            name=f"decode, {rows} rows" + captures * ", graphs",
            measured=f"{rate:.1f} steps/s",
            bound=f"{floor:.1f} steps/s",
            ok=setup.device == "cpu" or rate <= _TOLERANCE * floor,
            detail=f"{rate / floor:.1%} of reading {weight_bytes:,} bytes at {bandwidth / 1e9:.0f} GB/s",
        )
        engine.close()


def _bytes_per_s(setup: Setup) -> float:
    """Read and written by a copy, the best of five."""
    source = torch.ones(_COPIED_BYTES[setup.device], dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    best_s = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best_s
