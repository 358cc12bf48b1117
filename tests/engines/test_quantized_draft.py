"""The int8 draft: native steps against the same model of Python modules, and what it agrees with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from fuse.engines import decoder, quantized_draft
from fuse.engines.engine import GeneratedToken
from fuse.engines.native_llama import is_served
from fuse.engines.quantized_draft import WINDOW, QuantizedSelf, quantized, quantized_copy
from fuse.engines.speculation import FixedLength, Speculation
from fuse.engines.transformers import TransformersEngine
from fuse.engines.window import Window
from fuse.interstage.speculation import DRAFTS
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


@pytest.mark.parametrize("window", [None, Window(first=8, last=5)])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_steps_are_those_of_modules_with_a_mask(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch, architecture: str, window: Window | None
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
    copied = quantized_copy(target.model)
    steps = [quantized(target).logits, target.of(copied).logits]
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


def test_a_window_is_read_where_keys_and_values_are_more_than_weights(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model())
    run(engine, REQUESTS[:1])
    draft = QuantizedSelf(engine._decoder)
    keys_bytes = 4 * 2 * engine._model.config.num_key_value_heads * engine._model.model.layers[0].self_attn.head_dim
    most = engine._model.num_parameters() // (keys_bytes * len(engine._model.model.layers))
    assert draft._window([most - 7, 7]) is None
    assert draft._window([most - 7, 8]) == WINDOW
    assert DRAFTS["int8"].window_tokens == WINDOW.width, "the simulated draft reads as many"


@pytest.mark.parametrize(
    ("architecture", "served", "window"),
    [
        ("llama", True, None),
        ("qwen3", True, Window(first=8, last=16)),
        ("gpt_neox", False, None),
        ("gpt_neox", False, Window(first=8, last=16)),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch, architecture: str, served: bool, window: Window | None
) -> None:
    monkeypatch.setattr(QuantizedSelf, "_window", lambda *_: window)
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
    least = 0.8 if window is None else 0.3
    assert emitted - rows > least * drafted, "int8 weights draw the target's tokens, by the same noise"


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
