"""How many examples tests take that draw them by hand: FUSE_EXAMPLES counts for these too."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> int:
    """So many, where hypothesis generates its 40; as much of them as it does, and at least one."""
    return max(1, round(count * settings.default.max_examples / 40))
