"""Groups of similar length: what is padded to the longest of its group wastes least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def length_groups(lengths: Sequence[int], num_groups: int) -> list[tuple[int, ...]]:
    """Indices of `lengths` in so many groups, shortest first, none of them empty.

    The largest padded size, a group's number times its longest length, is the least there is; of all groups of
    neighbours in sorted order with that bound the padded sizes add up to the least. No other groups have a lower
    bound: from the longest down, a group that may hold m of its longest length holds the m longest that are left.

    Complexity: O(n w g) for groups of up to w by dynamic programming, vectorised over w and g.

    Raises: ValueError where there are fewer lengths than groups, or no group.
    """
    count = len(lengths)
    if not 1 <= num_groups <= count:
        raise ValueError(f"num_groups={num_groups} of {count} lengths: it must be from 1 to their number")
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")
    in_order = np.asarray(lengths, dtype=np.int64)[order]
    bound = _least_bound(in_order, num_groups)

    # least[j, g]: the least sum of padded sizes of the first j in g groups; last[j, g]: where the last of them starts.
    unreachable = np.iinfo(np.int64).max // 2
    least = np.full((count + 1, num_groups + 1), unreachable, dtype=np.int64)
    last = np.zeros((count + 1, num_groups + 1), dtype=np.int64)
    least[0, 0] = 0
    for stop in range(1, count + 1):
        longest = in_order[stop - 1]
        first = max(0, stop - _most(bound, longest, stop))
        sizes = np.arange(stop - first, 0, -1) * longest
        sums = least[first:stop, :-1] + sizes[:, None]
        starts = sums.argmin(axis=0)
        least[stop, 1:] = np.minimum(sums[starts, np.arange(num_groups)], unreachable)
        last[stop, 1:] = first + starts
    groups = []
    stop = count
    for number in range(num_groups, 0, -1):
        start = int(last[stop, number])
        groups.append(tuple(order[start:stop].tolist()))
        stop = start
    assert stop == 0
    return groups[::-1]


def _least_bound(in_order: NDArray[np.int64], num_groups: int) -> int:
    """The least size within which so many groups hold all."""
    low, high = int(in_order[-1]), len(in_order) * int(in_order[-1])
    while low < high:
        middle = (low + high) // 2
        if _num_groups_within(in_order, middle, num_groups) <= num_groups:
            high = middle
        else:
            low = middle + 1
    return low


def _num_groups_within(in_order: NDArray[np.int64], bound: int, enough: int) -> int:
    """How many groups of at most this size hold all, filled from the longest down; counted up to `enough` + 1."""
    left = len(in_order)
    number = 0
    while left and number <= enough:
        left -= _most(bound, int(in_order[left - 1]), left)
        number += 1
    return number + (left > 0)


def _most(bound: int, longest: int, left: int) -> int:
    """How many of this length a group may hold."""
    return left if longest == 0 else min(left, bound // longest)
