"""Models of fewer bits: native steps against the same model of Python modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from fuse.engines import decoder
from fuse.engines.native_llama import is_served
from fuse.engines.quantized_model import PRECISIONS, Precision, quantized, quantized_copy
from fuse.engines.transformers import TransformersEngine
from fuse.engines.window import Window

from .test_speculation import request

BuildModel = Callable[..., PreTrainedModel]


def randomize_small(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms as they are initialised would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("window", [None, Window(first=8, last=5)])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_steps_are_those_of_modules_with_a_mask(
    build_model: BuildModel,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    window: Window | None,
    precision: Precision,
) -> None:
    """In native code, and by modules that get what is in the window: against modules that get all, and what counts.

    Rows below the window, at it and far beyond, of which one is left out, three tokens one after the other; keys and
    values included.
    """

    def masked(lengths: torch.Tensor, context: int, dtype: torch.dtype, **_: object) -> torch.Tensor:
        place, lengths = torch.arange(context), lengths[:, None]
        counts = place < lengths
        if window is not None:
            counts &= (place < window.first) | (place >= lengths - window.last)
        return torch.zeros(counts.shape, dtype=dtype).masked_fill_(~counts, -torch.inf)[:, None, None]

    engine = TransformersEngine(randomize_small(build_model(architecture)), num_tokens=90)
    for one in (request(1), *(request(8 + length, length=length) for length in (4, 12, 70))):
        engine.submit(one)
    engine.step()
    assert is_served(engine._model)
    target, last = engine._decoder, engine._rows.inputs
    slots = torch.tensor([engine._rows.index(8 + length) for length in (70, 4, 12)])
    assert last.positions[slots].tolist() == [70, 4, 12]
    copied = quantized_copy(target.model, precision)
    steps = [quantized(target, precision).logits, target.of(copied).logits]
    monkeypatch.setattr(decoder, "is_native", lambda *_: False)
    steps.append(target.of(copied).logits)
    results: list[tuple[torch.Tensor, ...]] = []
    for step in (*steps, steps[-1]):
        read = window
        if len(results) == len(steps):
            monkeypatch.setattr(decoder, "decode_mask", masked)
            read = None
        logits = []
        for ahead in range(3):
            inputs = type(last)(torch.tensor([11, 7, 50]) + ahead, last.positions[slots] + ahead, slots)
            logits.append(step(inputs, 128, 4, read))
        results.append((torch.stack(logits), *(keys[:4].clone() for keys, _ in engine._cache.buffers(4, 128))))
    for result in results[:-1]:
        for found, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
