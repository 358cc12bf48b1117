"""How many tokens are drafted: the best set against all of them, and what is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from fuse.engines.draft_lengths import Acceptance, Floats, StepTimes, best_lengths
from fuse.engines.speculation import SpeculationKind
from fuse.engines.transformers import TransformersEngine

from .driving import assert_same, run
from .test_speculation import REQUESTS, request


def affine(fixed: float, each: float) -> Callable[[Floats], Floats]:
    return lambda tokens: fixed + each * tokens


def rate(
    chances: Sequence[float], counts: Sequence[int], target: tuple[float, float], draft: tuple[float, float]
) -> float:
    """Tokens per second, written out."""
    tokens = sum(sum(chance**j for j in range(count + 1)) for chance, count in zip(chances, counts, strict=True))
    widths = [sum(count > level for count in counts) for level in range(max(counts))]
    seconds = target[0] + target[1] * (len(counts) + sum(counts)) + sum(draft[0] + draft[1] * width for width in widths)
    return tokens / seconds


@given(
    chances=st.lists(st.floats(0.05, 0.99), min_size=1, max_size=3),
    most=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    target=st.tuples(st.floats(0.5, 2), st.floats(0, 0.5)),
    each=st.floats(0, 0.5),
)
def test_no_other_lengths_are_faster(
    chances: list[float], most: list[int], target: tuple[float, float], each: float
) -> None:
    """With drafts that cost so much a token; a fixed cost of their steps makes it a matter of packing."""
    room = most[: len(chances)]
    counts = best_lengths(np.array(chances), np.array(room), affine(*target), affine(0.0, each))
    assert all(0 <= count <= limit for count, limit in zip(counts, room, strict=True))
    others = [other for other in product(*(range(limit + 1) for limit in room)) if any(other)]
    best = max((rate(chances, other, target, (0.0, each)) for other in others), default=0.0)
    assert any(counts) == any(room)
    assert not others or rate(chances, counts.tolist(), target, (0.0, each)) == pytest.approx(best)


@given(
    chances=st.lists(st.floats(0.05, 0.99), min_size=1, max_size=12),
    target=st.tuples(st.floats(0.5, 2), st.floats(0, 0.5)),
    fixed=st.floats(0, 1),
)
def test_as_many_for_each_are_no_faster(chances: list[float], target: tuple[float, float], fixed: float) -> None:
    """A step of the draft costs something for few samples, too, so that single deep drafts do not pay."""
    counts = best_lengths(np.array(chances), np.full(len(chances), 8), affine(*target), affine(fixed, 0.0))
    alike = max(rate(chances, [depth] * len(chances), target, (fixed, 0.0)) for depth in range(1, 9))
    assert rate(chances, counts.tolist(), target, (fixed, 0.0)) >= alike * (1 - 1e-9)


def test_drafts_end_where_they_cost_more_than_they_bring() -> None:
    """A draft's step takes 0.3 of a target's; 64 samples make the target compute, not read."""
    draft, memory_bound = affine(0.3, 0.0), affine(1.0, 0.02)
    most = np.array([8])
    assert best_lengths(np.array([0.97]), most, memory_bound, draft)[0] >= 4
    assert 0 < best_lengths(np.array([0.6]), most, memory_bound, draft)[0] <= 2
    assert best_lengths(np.array([0.2]), most, memory_bound, draft)[0] == 1
    assert best_lengths(np.full(64, 0.97), np.full(64, 8), affine(0.0, 1.0), affine(0.0, 0.3)).sum() == 1


def test_chances_follow_a_sample_and_begin_with_those_of_all() -> None:
    acceptance = Acceptance(0.8)
    first = acceptance.of(0)
    for _ in range(30):
        acceptance.learn(0, 4, 0)
        acceptance.learn(1, 4, 4)
    assert acceptance.of(0) < 0.4 < acceptance.of(2) < 0.9 < acceptance.of(1) < 1
    acceptance.forget(0)
    assert acceptance.of(0) == acceptance.of(2)
    assert first == pytest.approx(0.8)


def test_times_are_between_those_that_were_measured_and_grow_beyond() -> None:
    times = StepTimes(slope=0.1)
    times.learn(1, 2.0)
    for seconds in (9.0, 4.0, 5.0):
        assert times.of(np.array([5.0]))[0] == pytest.approx(2.8), "one that was slow once or twice is tried again"
        times.learn(5, seconds)
    known = np.array([1.0, 3.0, 5.0, 10.0]), pytest.approx([2.0, 3.0, 4.0, 5.0])
    assert times.of(known[0]).tolist() == known[1], "the smallest size counts as soon as others do"
    for _ in range(3):
        times.learn(1, 2.0)
    assert times.of(known[0]).tolist() == known[1]
    times.learn(1, 90.0)
    assert times.of(np.array([1.0]))[0] == pytest.approx(2.2), "one slow step is not believed at once"
    times.learn(1, 0.2)
    assert times.of(np.array([1.0]))[0] == pytest.approx(2.0), "nor is a fast one"
    for _ in range(300):
        times.pass_step()
        times.learn(1, 2.0)
    assert times.of(np.array([5.0]))[0] == pytest.approx(2.8), "what was slow long ago is tried again"


@pytest.mark.parametrize("kind", ["auto", "int4", "ngram"])
def test_tokens_are_those_of_plain_decoding(kind: Any, build_model: Callable[..., PreTrainedModel]) -> None:
    """Of greedy samples too, which come to repeat themselves; through weights that change."""
    weights = build_model(seed=3).state_dict()
    requests = [*REQUESTS, request(10, stops=False, max_new_tokens=80)]
    plain, drafting = (TransformersEngine(build_model(), max_batch=4, speculation=one) for one in ("off", kind))
    for _ in range(2):
        assert_same(run(drafting, requests), run(plain, requests))
        for engine in (plain, drafting):
            engine.load_weights({name: weight.clone() for name, weight in weights.items()})


def test_an_unknown_draft_is_refused(build_model: Callable[..., PreTrainedModel]) -> None:
    unknown: Any = "int3"
    with pytest.raises(ValueError, match="speculation='int3' is unknown: use 'auto', 'off', 'int8', 'int4' or 'ngram'"):
        TransformersEngine(build_model(), speculation=unknown)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_drafts_are_refused_where_there_is_no_code_for_them(
    build_model: Callable[..., PreTrainedModel], kind: SpeculationKind
) -> None:
    import torch

    with pytest.raises(ValueError, match=rf"speculation='{kind}' with a model in torch.bfloat16 on cpu: .* 'ngram'"):
        TransformersEngine(build_model(dtype=torch.bfloat16), speculation=kind)
