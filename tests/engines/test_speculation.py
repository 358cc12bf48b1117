"""Speculative decoding: whatever a draft proposes, tokens and log-probabilities are those of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from fuse.engines import decoder
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.rows import Row, Rows
from fuse.engines.speculation import FixedLength, Speculation
from fuse.engines.transformers import TransformersEngine

from .conftest import build
from .driving import Outputs, assert_same, collect, run

VOCABULARY = 97
STOP_TOKEN_IDS = (5, 17, 33, 60, 81)
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.7},
    {"top_k": 5},
    {"repetition_penalty": 1.5},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


def request(
    sample_id: int, *, stops: bool = True, max_new_tokens: int | None = None, length: int | None = None
) -> GenerationRequest:
    """length: of the prompt."""
    params = SamplingParams(
        seed=3,
        temperature=1.0,
        max_new_tokens=1 + 11 * sample_id % 40 if max_new_tokens is None else max_new_tokens,
        stop_token_ids=STOP_TOKEN_IDS if stops else (),
    )
    prompt_ids = tuple(1 + (sample_id + 5 * index) % 90 for index in range(length or 1 + 7 * sample_id % 23))
    options = FILTERS[sample_id % len(FILTERS)]
    return GenerationRequest(sample_id=sample_id, prompt_ids=prompt_ids, params=replace(params, **options))


REQUESTS = [request(sample_id) for sample_id in range(8)] + [request(8, stops=False, max_new_tokens=50)]


@cache
def model(architecture: str = "llama") -> PreTrainedModel:
    """Of all engines here, none of which gets other weights."""
    return build(architecture)


@cache
def expected_outputs(architecture: str = "llama") -> Outputs:
    return run(TransformersEngine(model(architecture)), REQUESTS)


class Scripted:
    """A draft that knows what is right: `twist` makes of the right tokens to follow a row's what it proposes."""

    def __init__(self, right: Outputs, twist: Callable[[list[int], int], list[int]]) -> None:
        self._right, self._twist = right, twist
        self.released: list[int] = []
        self.num_proposed = 0

    reads_window = False

    def prepare(self) -> None:
        pass

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        proposed = []
        for row, count in zip(rows, counts, strict=True):
            token_ids = self._right[row.request.sample_id][0][len(row.response_ids) :][:count]
            proposed.append(self._twist(token_ids, count))
        self.num_proposed += sum(map(len, proposed))
        return proposed

    def release(self, row: Row) -> None:
        self.released.append(row.request.sample_id)

    def forget(self) -> None:
        pass


def speculating(
    twist: Callable[[list[int], int], list[int]], count: int = 4, architecture: str = "llama", **limits: Any
) -> tuple[TransformersEngine, Scripted]:
    engine = TransformersEngine(model(architecture), **limits)
    draft = Scripted(expected_outputs(architecture), twist)
    engine._speculation = Speculation(draft, FixedLength(count), VOCABULARY)
    return engine, draft


def right(token_ids: list[int], count: int) -> list[int]:
    return token_ids


def wrong(token_ids: list[int], count: int) -> list[int]:
    return [(token_id + 1) % VOCABULARY for token_id in token_ids] + [7] * (count - len(token_ids))


def right_then_wrong(token_ids: list[int], count: int) -> list[int]:
    return token_ids[: count // 2] + wrong(token_ids, count)[count // 2 :]


def unknown(token_ids: list[int], count: int) -> list[int]:
    """The right one, then tokens that the model does not know, and more than were asked for."""
    return [*token_ids[:1], VOCABULARY, -1, *token_ids, *token_ids]


def stopping(token_ids: list[int], count: int) -> list[int]:
    return [STOP_TOKEN_IDS[0]] * count


TWISTS = {one.__name__: one for one in (right, wrong, right_then_wrong, unknown, stopping)}


@pytest.mark.parametrize("twist", TWISTS.values(), ids=TWISTS)
def test_no_draft_changes_a_token(twist: Callable[[list[int], int], list[int]]) -> None:
    engine, draft = speculating(twist, max_batch=5)
    assert_same(run(engine, REQUESTS), expected_outputs())
    assert draft.num_proposed > 0
    assert sorted(draft.released) == sorted(one.sample_id for one in REQUESTS)


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3"])
def test_other_architectures(architecture: str) -> None:
    engine, _ = speculating(right_then_wrong, architecture=architecture)
    assert_same(run(engine, REQUESTS), expected_outputs(architecture))


def test_without_native_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "is_native", lambda *_: False)
    monkeypatch.setattr(decoder, "MOST_NATIVE_TOKENS", 0)
    engine, _ = speculating(right_then_wrong)
    assert_same(run(engine, REQUESTS), expected_outputs())


def test_a_draft_that_is_right_saves_steps_and_tokens_say_what_was_drafted() -> None:
    engine, draft = speculating(right, count=3)
    one = REQUESTS[8]
    engine.submit(one)
    steps = []
    while tokens := engine.step():
        steps.append(tokens)
    assert [len(tokens) for tokens in steps] == [4] * 12 + [2], "50 tokens: three drafted ones and one more a step"
    assert [[token.drafted_tokens for token in tokens] for tokens in steps] == [[3, 0, 0, 0]] * 12 + [[1, 0]]
    assert all(tokens[0].draft_s > 0 for tokens in steps), "it took some time"
    assert [token.finished for token in steps[-1]] == [False, True]
    assert draft.num_proposed == 37


def test_a_draft_that_is_wrong_costs_no_token() -> None:
    engine, _ = speculating(wrong, count=3)
    engine.submit(REQUESTS[8])
    lengths = []
    while tokens := engine.step():
        lengths.append(len(tokens))
    assert lengths == [1] * 50


twists = st.lists(st.sampled_from([None, "right", "wrong", "stop", "any"]), max_size=6)


@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data(), max_batch=st.integers(1, 9), with_kv=st.booleans(), moves=st.integers(0, 4))
def test_any_draft_while_samples_move(data: st.DataObject, max_batch: int, with_kv: bool, moves: int) -> None:
    """Rows draft different numbers of tokens, some right; samples move between two engines, one of which drafts not."""
    expected = expected_outputs()

    def twist(token_ids: list[int], count: int) -> list[int]:
        kinds = data.draw(twists)
        chosen = {"right": lambda i: token_ids[i], "wrong": lambda i: (token_ids[i] + 1) % VOCABULARY}
        chosen |= {"stop": lambda i: STOP_TOKEN_IDS[0], "any": lambda i: data.draw(st.integers(0, VOCABULARY - 1))}
        return [chosen[kind](index) for index, kind in zip(range(len(token_ids)), kinds, strict=False) if kind]

    source, _ = speculating(twist, count=5, max_batch=max_batch)
    target = TransformersEngine(model(), max_batch=4)
    outputs: Outputs = {}
    for one in REQUESTS:
        source.submit(one)
    for _ in range(moves):
        collect(outputs, source.step())
        collect(outputs, target.step())
        live = [one.sample_id for one in REQUESTS if len(outputs.get(one.sample_id, ([],))[0]) < num_expected(one)]
        moved = data.draw(st.sampled_from(live)) if live else None
        for engine, other in ((source, target), (target, source)):
            if moved is not None and is_in(engine, moved):
                other.admit(engine.evict(moved, with_kv=with_kv))
                break
    run(source, outputs=outputs)
    run(target, outputs=outputs)
    assert_same(outputs, expected)


def num_expected(one: GenerationRequest) -> int:
    return len(expected_outputs()[one.sample_id][0])


def is_in(engine: TransformersEngine, sample_id: int) -> bool:
    return sample_id in engine._rows or sample_id in engine._queue


def test_the_control() -> None:
    """Requests differ in what they exercise: some stop early, some reach their limits."""
    lengths: Mapping[int, int] = {one.sample_id: num_expected(one) for one in REQUESTS}
    stopped = [one for one in REQUESTS if lengths[one.sample_id] < one.params.max_new_tokens]
    assert 2 <= len(stopped) < len(REQUESTS) - 2
