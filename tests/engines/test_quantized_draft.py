"""Drafts by the model itself with fewer bits: what they agree with, and when they are made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from fuse.engines import quantized_draft
from fuse.engines.engine import GeneratedToken
from fuse.engines.native_llama import is_served
from fuse.engines.quantized_draft import WINDOW, QuantizedSelf
from fuse.engines.quantized_model import PRECISIONS
from fuse.engines.speculation import FixedLength, Speculation
from fuse.engines.transformers import TransformersEngine
from fuse.engines.window import Window
from fuse.interstage.speculation import DRAFTS
from fuse.intrastage.adapters import base_of, with_adapter

from .driving import Outputs, assert_same, collect, run
from .test_speculation import REQUESTS, request

BuildModel = Callable[..., PreTrainedModel]


def speculating(model: PreTrainedModel, count: int = 4, precision: str = "int8", **limits: Any) -> TransformersEngine:
    engine = TransformersEngine(model, **limits)
    draft = QuantizedSelf(engine._decoder, PRECISIONS[precision])
    engine._speculation = Speculation(draft, FixedLength(count), 97)
    return engine


def test_a_window_is_read_where_keys_and_values_are_more_than_weights(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model())
    run(engine, REQUESTS[:1])
    draft = QuantizedSelf(engine._decoder, PRECISIONS["int8"])
    keys_bytes = 4 * 2 * engine._model.config.num_key_value_heads * engine._model.model.layers[0].self_attn.head_dim
    most = engine._model.num_parameters() // (keys_bytes * len(engine._model.model.layers))
    assert draft._window([most - 7, 7]) is None
    assert draft._window([most - 7, 8]) == WINDOW
    for name in PRECISIONS:
        assert DRAFTS[name].window_tokens == WINDOW.width, "the simulated draft reads as many"


@pytest.mark.parametrize(
    ("architecture", "served", "window", "precision"),
    [
        ("llama", True, None, "int8"),
        ("llama", True, None, "int4"),
        ("qwen3", True, Window(first=8, last=16), "int8"),
        ("gpt_neox", False, None, "int8"),
        ("gpt_neox", False, None, "int4"),
        ("gpt_neox", False, Window(first=8, last=16), "int8"),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    build_model: BuildModel,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    served: bool,
    window: Window | None,
    precision: str,
) -> None:
    monkeypatch.setattr(QuantizedSelf, "_window", lambda *_: window)
    engine = speculating(build_model(architecture), max_batch=5, precision=precision)
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
    least = {"int8": 0.8, "int4": 0.4}[precision] if window is None else 0.3
    assert emitted - rows > least * drafted, "such weights draw the target's tokens, by the same noise"


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
