"""Samples of one prompt: it is computed once, and each draws what it would draw alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.engines.engine import GeneratedToken, GenerationEngine, GenerationRequest, SamplingParams
from fuse.engines.slot_cache import SlotCache
from fuse.engines.transformers import TransformersEngine

from .driving import Outputs, assert_same, collect, run
from .vllm_pool import VllmPool

BuildModel = Callable[..., PreTrainedModel]


def request(sample_id: int, prompt: int, num_prompt_tokens: int, max_new_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        sample_id=sample_id,
        prompt_ids=tuple(1 + (11 * prompt + 5 * index) % 96 for index in range(num_prompt_tokens)),
        params=SamplingParams(seed=3, temperature=1.0, max_new_tokens=max_new_tokens),
    )


class Engine(TransformersEngine):
    """Counts what its model prefills: tokens of forwards over more than one position, padding left out."""

    def __init__(self, model: PreTrainedModel, **options: int) -> None:
        self.computed = 0
        super().__init__(model, **options)
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Tensor]) -> None:
        input_ids = args[0] if args else options["input_ids"]
        if input_ids.shape[1] > 1:
            self.computed += int((input_ids != 0).sum())


def drain(engine: GenerationEngine, outputs: Outputs) -> dict[int, int]:
    """Step until the engine is empty; the shared tokens that each sample's first token tells of."""
    shared: dict[int, int] = {}
    while tokens := engine.step():
        add(shared, tokens)
        collect(outputs, tokens)
    return shared


def add(shared: dict[int, int], tokens: Sequence[GeneratedToken]) -> None:
    for token in tokens:
        assert token.sample_id not in shared or not token.shared_tokens, "a sample tells once"
        shared.setdefault(token.sample_id, token.shared_tokens)


def alone(model: PreTrainedModel, requests: Sequence[GenerationRequest]) -> Outputs:
    engine = TransformersEngine(model, max_batch=1)
    outputs: Outputs = {}
    for one in requests:
        run(engine, [one], outputs)
    return outputs


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_prompt_is_computed_once_for_all_that_enter_with_it(build_model: BuildModel, architecture: str) -> None:
    """Past one growth of the buffers, in rows and in tokens; beside prompts of one token, and of no sibling."""
    lengths = {0: 130, 1: 30, 2: 1, 3: 9}
    prompts = [0, 1, 0, 2, 0, 1, 3, 0, 2]
    requests = [request(index, prompt, lengths[prompt]) for index, prompt in enumerate(prompts)]
    engine = Engine(build_model(architecture))
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    shared = drain(engine, outputs)
    assert_same(outputs, alone(build_model(architecture), requests))
    assert engine.computed == 129 + 29 + 8
    assert shared == {0: 0, 1: 0, 2: 129, 3: 0, 4: 129, 5: 29, 6: 0, 7: 129, 8: 0}


def test_a_later_sample_takes_the_prompt_of_one_that_decodes(build_model: BuildModel) -> None:
    """Of one that has moved between slots meanwhile, too; but not of one that has left."""
    requests = [request(0, 0, 40, 5), request(1, 1, 30, 40), request(2, 1, 30), request(3, 1, 30), request(4, 0, 40)]
    engine = Engine(build_model(), max_batch=2)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    shared = drain(engine, outputs)
    assert_same(outputs, alone(build_model(), requests))
    assert shared == {0: 0, 1: 0, 2: 29, 3: 29, 4: 0}
    assert engine.computed == 39 + 29 + 39


@pytest.mark.parametrize("with_kv", [False, True])
def test_samples_that_moved_give_their_prompt_and_take_none(build_model: BuildModel, with_kv: bool) -> None:
    requests = [request(index, 0, 40) for index in range(4)]
    source, target = Engine(build_model()), Engine(build_model())
    outputs: Outputs = {}
    for one in requests[:2]:
        source.submit(one)
    for _ in range(4):
        collect(outputs, source.step())
    for sample_id in (0, 1):
        target.admit(source.evict(sample_id, with_kv=with_kv))
    for one in requests[2:]:
        target.submit(one)
    shared = drain(target, outputs)
    assert_same(outputs, alone(build_model(), requests))
    assert shared == {0: 0, 1: 0, 2: 39, 3: 39}
    assert target.computed == (0 if with_kv else 2 * 43)


def test_what_is_copied_needs_no_prefill_budget(build_model: BuildModel) -> None:
    engine = TransformersEngine(build_model(), max_prefill_tokens=50)
    for index in range(6):
        engine.submit(request(index, 0, 21))
    for index in range(6, 9):
        engine.submit(request(index, index, 21))
    assert [len(engine.step()) for _ in range(2)] == [7, 9]


def test_a_wrong_copy_would_show(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: what is copied is what the others go on from."""
    requests = [request(index, 0, 40) for index in range(3)]
    expected = alone(build_model(), requests)
    copy = SlotCache.copy
    monkeypatch.setattr(SlotCache, "copy", lambda cache, *rows_and_tokens: copy(cache, *rows_and_tokens[:3], 1))
    outputs = run(TransformersEngine(build_model()), requests)
    assert outputs[0][0] == expected[0][0]
    assert outputs[1][0] != expected[1][0]


@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 15)), min_size=1, max_size=12),
    max_batch=st.integers(1, 5),
    between=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_whenever_siblings_come_they_draw_what_they_draw_alone(
    build_model: BuildModel, prompts: list[tuple[int, int]], max_batch: int, between: list[int]
) -> None:
    requests = [request(index, prompt, 4 + 9 * prompt, length) for index, (prompt, length) in enumerate(prompts)]
    engine = Engine(build_model(), max_batch=max_batch, max_prefill_tokens=20)
    outputs: Outputs = {}
    shared: dict[int, int] = {}
    for one, num_steps in zip(requests, between, strict=False):
        engine.submit(one)
        for _ in range(num_steps):
            tokens = engine.step()
            add(shared, tokens)
            collect(outputs, tokens)
    shared |= {one: tokens for one, tokens in drain(engine, outputs).items() if one not in shared}
    assert_same(outputs, alone(build_model(), requests))
    assert engine.computed + sum(shared.values()) == sum(len(one.prompt_ids) - 1 for one in requests)


@pytest.mark.processes
def test_vllm_shares_whole_blocks(vllm_pool: VllmPool, build_model: BuildModel) -> None:
    """Of samples that enter together, and of one that comes later."""
    options = {"max_batch": 2, "max_context": 256, "max_prefill_tokens": 300}
    requests = [request(index, 0, 140) for index in range(3)]
    engine = vllm_pool.engine(build_model(hidden_size=128), **options)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    assert drain(engine, outputs) == {0: 0, 1: 128, 2: 128}
    assert_same(outputs, alone(build_model(hidden_size=128), requests))
