"""The int8 draft: native steps against the same model of Python modules, and what it agrees with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from fuse.engines import quantized_draft
from fuse.engines.engine import GeneratedToken
from fuse.engines.int8_llama import is_served
from fuse.engines.quantized_draft import QuantizedSelf, quantized, quantized_copy
from fuse.engines.speculation import FixedLength, Speculation
from fuse.engines.transformers import TransformersEngine
from fuse.intrastage.adapters import base_of, with_adapter

from .driving import Outputs, assert_same, collect, run
from .test_speculation import REQUESTS, request

BuildModel = Callable[..., PreTrainedModel]


def speculating(model: PreTrainedModel, count: int = 4, **limits: Any) -> TransformersEngine:
    engine = TransformersEngine(model, **limits)
    engine._speculation = Speculation(QuantizedSelf(engine._decoder), FixedLength(count), 97)
    return engine


def randomize_small(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms as they are initialised would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_native_steps_are_those_of_python_modules(build_model: BuildModel, architecture: str) -> None:
    """Three rows at once, of which one is left out, two tokens one after the other; keys and values included."""
    results: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for _ in range(2):
        engine = TransformersEngine(randomize_small(build_model(architecture)), num_tokens=90)
        for one in REQUESTS[1:4]:
            engine.submit(one)
        engine.step()
        target = engine._decoder
        decoder = quantized(target) if not results else target.of(quantized_copy(target.model))
        rows, last = engine._rows, engine._rows.inputs
        logits = []
        for ahead in range(2):
            slots = torch.tensor([2, 0])
            inputs = type(last)(torch.tensor([11, 7]) + ahead, last.positions[slots] + ahead, slots)
            logits.append(decoder.logits(inputs, 64, len(rows)))
        results.append((torch.stack(logits), [keys[:3] for keys, _ in engine._cache.buffers(3, 64)]))
    assert is_served(target.model)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    for native, python in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(native, python, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "served"), [("llama", True), ("qwen3", True), ("gpt_neox", False)])
def test_tokens_are_those_of_plain_decoding(build_model: BuildModel, architecture: str, served: bool) -> None:
    engine = speculating(build_model(architecture), max_batch=5)
    assert is_served(engine._model) == served
    steps = run_steps(engine)
    outputs: Outputs = {}
    for tokens in steps:
        collect(outputs, tokens)
    assert_same(outputs, run(TransformersEngine(build_model(architecture)), REQUESTS))
    drafted = sum(token.drafted_tokens for tokens in steps for token in tokens)
    emitted = sum(map(len, steps))
    rows = sum(len({token.sample_id for token in tokens}) for tokens in steps)
    assert drafted > 100
    assert emitted - rows > 0.8 * drafted, "int8 weights draw the target's tokens, by the same noise"


def run_steps(engine: TransformersEngine) -> list[list[GeneratedToken]]:
    for one in REQUESTS:
        engine.submit(one)
    steps = []
    while tokens := engine.step():
        steps.append(tokens)
    return steps


def test_it_drafts_by_the_weights_of_the_moment(build_model: BuildModel) -> None:
    engine = speculating(build_model())
    run(engine, REQUESTS[:3])
    engine.load_weights({name: weight.clone() for name, weight in build_model(seed=1).state_dict().items()})
    one = request(8, stops=False, max_new_tokens=30)
    engine.submit(one)
    steps = []
    while tokens := engine.step():
        steps.append(tokens)
    assert len(steps) < 12, "30 tokens; the draft of the old weights would agree with hardly any"


def test_it_drafts_by_the_adapters_of_the_moment(build_model: BuildModel) -> None:
    """Merged anew where adapters come alone; the base stays."""
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    adapted = base_of(with_adapter(build_model(), lora, "peft_config"))
    assert is_served(adapted)
    frozen = {name for name, one in adapted.named_parameters() if not one.requires_grad}
    engine = speculating(adapted.requires_grad_(False), frozen=frozen)
    run(engine, REQUESTS[:3])
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: 0.2 * torch.randn(one.shape, generator=generator)
        for name, one in adapted.named_parameters()
        if name not in frozen
    }
    engine.load_weights(drawn)
    outputs: Outputs = {}
    steps = 0
    engine.submit(request(8, stops=False, max_new_tokens=30))
    while tokens := engine.step():
        collect(outputs, tokens)
        steps += 1
    assert steps < 12, "30 tokens; the draft without adapters would agree with hardly any"
    plain = TransformersEngine(adapted, frozen=frozen)
    assert_same(outputs, run(plain, [request(8, stops=False, max_new_tokens=30)]))
    plain.load_weights({name: torch.zeros_like(one) for name, one in drawn.items()})
    assert run(plain, [request(8, stops=False, max_new_tokens=30)]) != outputs


def test_a_draft_ends_where_it_stops(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = speculating(build_model(), count=6)
    engine.submit(request(8, stops=False, max_new_tokens=40))
    engine.step()
    monkeypatch.setattr(quantized_draft, "_has_stopped", lambda _, draft: len(draft) == 2)
    (draft,) = engine._speculation.draft.propose(engine._rows, [6]) if engine._speculation else ([],)
    assert len(draft) == 2
