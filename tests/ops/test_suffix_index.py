"""The index of what was written: native code against looking through lists, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.ops import describe
from fuse.ops.suffix_index import SuffixIndex, suffix_index, suffix_index_reference

PROMPTS = ((), (1,), (1, 2), (0, 1, 2, 0, 1, 2, 0), tuple(range(40)) + tuple(range(1, 40)))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [suffix_index, suffix_index_reference])

numbers = st.integers(0, 5)
tokens = st.lists(st.integers(0, 2), max_size=9) | st.builds(
    lambda length, first: [(first + i) % 37 for i in range(length)], st.integers(0, 50), st.integers(0, 30)
)
steps = st.lists(
    st.tuples(st.just("open"), numbers)
    | st.tuples(st.just("close"), numbers)
    | st.tuples(st.just("extend"), st.lists(st.tuples(numbers, tokens, st.integers(0, 12)), max_size=4)),
    max_size=30,
)


@given(steps=steps, most_tokens=st.sampled_from([0, 60, 10_000]))
def test_native_code_finds_what_looking_through_lists_does(steps: list[tuple], most_tokens: int) -> None:
    """Prompts of which some are short or repeat themselves, few different tokens, and texts longer than is compared."""
    native, reference = suffix_index(most_tokens), suffix_index_reference(most_tokens)
    live: list[int] = []
    for step, argument in steps:
        if step == "open":
            live.append(native.open(PROMPTS[argument % len(PROMPTS)]))
            assert reference.open(PROMPTS[argument % len(PROMPTS)]) == live[-1]
        elif live and step == "close":
            closed = live.pop(argument % len(live))
            native.close(closed)
            reference.close(closed)
        elif live:
            responses = [live[number % len(live)] for number, _, _ in argument]
            added, counts = [one for _, one, _ in argument], [count for _, _, count in argument]
            found = native.extend(responses, added, counts)
            assert found == reference.extend(responses, added, counts)


@IMPLEMENTATIONS
def test_beyond_the_latest_places_nothing_is_looked_at(implementation: Callable[[int], SuffixIndex]) -> None:
    index = implementation(10_000)
    response = index.open((9, 8, 7, 6, 5))
    others = [0, 7, 6, 1] * 63
    assert index.extend([response], [[*others, 9, 8, 7, 6]], [1]) == [[5]]
    assert index.extend([response], [[1, *others[:4], 9, 8, 7, 6]], [1]) == [[1]], "the prompt's is the 65th"


@IMPLEMENTATIONS
def test_prompts_beyond_the_most_tokens_are_dropped_the_longest_closed_first(
    implementation: Callable[[int], SuffixIndex],
) -> None:
    index = implementation(14)
    first, second, third = (index.open((n, n + 1, n + 2)) for n in (10, 20, 30))
    index.extend([first, second, third], [[1, 2, 3]] * 3, [0] * 3)
    index.close(second)
    assert index.extend([third], [[1, 2]], [1]) == [[3]], "it stays while it is open, however many tokens there are"
    index.close(first)
    assert index.extend([index.open((20, 21, 22))], [[1, 2]], [1]) == [[]], "closed first"
    assert index.extend([index.open((10, 11, 12))], [[1, 2]], [1]) == [[3]]


def test_native_code_serves() -> None:
    assert describe()["suffix_index"] == "native C++"
