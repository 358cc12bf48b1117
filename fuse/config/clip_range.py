"""The two ends of what rewards are clipped to."""

from __future__ import annotations

from collections.abc import Sequence


def clip_range(ends: Sequence[float] | None) -> list[float] | None:
    """`reward_clip_range` as a list, whatever it came as: the command line and checkpoints know no tuples.

    Raises: ValueError for another number of ends than two, and for an empty range.
    """
    if ends is None:
        return None
    if len(ends) != 2 or ends[0] >= ends[1]:
        given = " ".join(map(str, ends))
        raise ValueError(f"reward_clip_range={given} is empty or no range: give a smaller and a larger number")
    return [*ends]


def as_pair(ends: Sequence[float] | None) -> tuple[float, float] | None:
    """What `clip_range` has checked."""
    return None if ends is None else (ends[0], ends[1])
