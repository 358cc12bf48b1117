"""Groups of nearly equal size: what is packed costs its tokens, whatever else is in its group."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced_groups(sizes: Sequence[int], num_groups: int) -> list[tuple[int, ...]]:
    """Indices of positive `sizes` in so many groups, none of them empty; the largest group first.

    A pipeline that begins with the largest waits less, for what ends it is small, and neighbours differ little.

    The largest is at most 4/3 of the least there could be. Of at most num_groups * m sizes of at most L, none has more
    than m * L in all: a group that did would have more than m of them, and the others then at least m each.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969: the longest first, each to the least loaded.

    Complexity: O(n log n).

    Raises: ValueError where there are fewer sizes than groups, or no group.
    """
    if not 1 <= num_groups <= len(sizes):
        raise ValueError(f"num_groups={num_groups} of {len(sizes)} sizes: it must be from 1 to their number")
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0, number) for number in range(num_groups)]
    for index in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        load, number = loads[0]
        groups[number].append(index)
        heapq.heapreplace(loads, (load + sizes[index], number))
    return [tuple(groups[number]) for _, number in sorted(loads, key=lambda one: (-one[0], one[1]))]
