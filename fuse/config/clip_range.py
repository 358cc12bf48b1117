"""The two ends of what rewards are clipped to."""

from __future__ import annotations


def clip_range(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    """`reward_clip_range` as a tuple, whatever it came as. Raises: ValueError for an empty one."""
    if ends is None:
        return None
    least, most = ends
    if least >= most:
        raise ValueError(f"reward_clip_range={ends} is empty: give a smaller and a larger number")
    return least, most
