"""Decode steps in one native call: those of the model's own modules, to rounding, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from fuse.engines import decoder
from fuse.engines.native_llama import is_served_in_place
from fuse.engines.transformers import TransformersEngine

from ..tiny_models import DECODED_BY_MODULES, build, language_model
from .driving import assert_same, run
from .test_quantized_model import randomize_small
from .test_speculation import REQUESTS

BuildModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_native_steps_are_those_of_the_modules(build_model: BuildModel, architecture: str) -> None:
    """Three rows, then two of them a token further on in another order; keys and values included."""
    engine = TransformersEngine(randomize_small(build_model(architecture)), num_tokens=90)
    assert is_served_in_place(engine._model)
    for one in REQUESTS[1:4]:
        engine.submit(one)
    engine.step()
    last = engine._rows.inputs
    slots = torch.tensor([2, 0])
    for inputs in (last, type(last)(torch.tensor([11, 7]), last.positions[slots] + 1, slots)):
        results = []
        for logits in (engine._decoder.logits, engine._decoder.logits_of_modules):
            results.append((logits(inputs, 64, 3), *(one.clone() for kv in engine._cache.buffers(3, 64) for one in kv)))
        for native, modules in zip(*results, strict=True):
            torch.testing.assert_close(native, modules, rtol=1e-4, atol=1e-5)
    together = engine._decoder.logits(last, 64, 3)
    some = type(last)(last.token_ids[slots], last.positions[slots], slots)
    assert torch.equal(engine._decoder.logits(some, 64, 3), together[slots]), "rows do not depend on each other"


def test_tokens_are_those_of_the_modules(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    native = run(TransformersEngine(build_model("llama")), REQUESTS)
    monkeypatch.setattr(decoder, "MOST_NATIVE_TOKENS", 0)
    assert_same(native, run(TransformersEngine(build_model("llama")), REQUESTS))


def test_models_that_tests_have_decoded_by_modules_are_not_served() -> None:
    assert is_served_in_place(build(language_model()))
    assert not is_served_in_place(build(language_model(**DECODED_BY_MODULES)))


def test_new_weights_are_read(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model("llama"))
    other = randomize_small(build_model("llama"))
    run(engine, REQUESTS[:1])
    engine.load_weights(other.state_dict())
    assert_same(run(engine, REQUESTS), run(TransformersEngine(other), REQUESTS))
