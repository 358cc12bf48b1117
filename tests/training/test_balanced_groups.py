"""Groups of nearly equal size against all the groups there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.training.balanced_groups import balanced_groups

from .test_length_groups import check_partition, partitions


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7), data=st.data())
def test_the_largest_is_within_its_bounds(sizes: list[int], data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, len(sizes)))
    found = balanced_groups(sizes, num_groups)
    check_partition(found, len(sizes), num_groups)
    totals = [sum(sizes[index] for index in group) for group in found]
    assert totals == sorted(totals, reverse=True)
    least = min(
        max(sum(sizes[index] for index in group) for group in groups) for groups in partitions(len(sizes), num_groups)
    )
    assert 3 * totals[0] <= 4 * least
    assert totals[0] <= -(-len(sizes) // num_groups) * max(sizes), (
        "no larger than micro-batches of as many of the longest"
    )


def test_by_hand() -> None:
    assert balanced_groups([1, 6, 2, 3, 4, 2], 3) == [(1,), (4, 5), (3, 2, 0)]
    assert balanced_groups([5, 5, 5], 1) == [(0, 1, 2)]


@pytest.mark.parametrize("num_groups", [0, 3])
def test_groups_that_would_be_empty_are_refused(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups={num_groups} of 2 sizes: it must be from 1"):
        balanced_groups([1, 2], num_groups)
