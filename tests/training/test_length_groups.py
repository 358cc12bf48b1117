"""Groups of similar length against all the groups there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.training.length_groups import length_groups

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=7)


def partitions(count: int, num_groups: int) -> Iterator[list[list[int]]]:
    """Of 0 .. count - 1, every way to make so many groups that are not empty."""
    if count == 0:
        if num_groups == 0:
            yield []
        return
    for smaller in partitions(count - 1, num_groups - 1):
        yield [*smaller, [count - 1]]
    for same in partitions(count - 1, num_groups):
        for index in range(num_groups):
            yield [[*group, count - 1] if number == index else group for number, group in enumerate(same)]


def check_partition(found: Sequence[Sequence[int]], count: int, num_groups: int) -> None:
    """All indices are in one of so many groups each, none of which is empty."""
    assert sorted(index for group in found for index in group) == list(range(count))
    assert len(found) == num_groups
    assert all(found)


def sizes(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> list[int]:
    return [len(group) * max(lengths[index] for index in group) for group in groups]


@given(lengths=LENGTHS, data=st.data())
def test_the_largest_is_the_least_and_so_is_the_sum_among_neighbours(lengths: list[int], data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, len(lengths)))
    found = length_groups(lengths, num_groups)
    check_partition(found, len(lengths), num_groups)
    in_order = [lengths[index] for group in found for index in group]
    assert in_order == sorted(lengths)

    bound = max(sizes(lengths, found))
    assert bound == min(max(sizes(lengths, groups)) for groups in partitions(len(lengths), num_groups))
    ends = ((0, *cuts, len(lengths)) for cuts in combinations(range(1, len(lengths)), num_groups - 1))
    of_neighbours = [sizes(in_order, [range(start, stop) for start, stop in pairwise(one)]) for one in ends]
    assert sum(sizes(lengths, found)) == min(sum(one) for one in of_neighbours if max(one) <= bound)


def test_by_hand() -> None:
    """Six of 1 beside one of 6; in equal numbers one group would have 4 x 6."""
    assert length_groups([1, 6, 1, 1, 1, 1, 1], 2) == [(0, 2, 3, 4, 5, 6), (1,)]
    assert length_groups([5, 5, 5], 1) == [(0, 1, 2)]


@pytest.mark.parametrize("num_groups", [0, 3])
def test_groups_that_would_be_empty_are_refused(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups={num_groups} of 2 lengths: it must be from 1"):
        length_groups([1, 2], num_groups)
