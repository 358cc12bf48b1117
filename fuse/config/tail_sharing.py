"""What a configuration says of devices that decode and train at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fuse.interstage.tail import ONE_CORE, Sharing


def tail_sharing(factors: Sequence[float] | None, accelerator: Literal["cpu", "cuda"]) -> Sharing | None:
    """Of the option `tail_sharing`; where that is not set, what is known of such devices.

    Raises: ValueError for another number of factors than two, or one below 1.
    """
    if factors is None:
        return ONE_CORE if accelerator == "cpu" else None
    if len(factors) != 2 or min(factors) < 1:
        given = " ".join(map(str, factors))
        raise ValueError(
            f"tail_sharing={given} must be two numbers, at least 1: how many times as long decoding and training take "
            "beside one another"
        )
    return Sharing(decoding=factors[0], training=factors[1])
