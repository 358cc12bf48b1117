"""Rewards from a Python callable, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RewardFunction = Callable[..., Sequence[float]]
"""(prompts: list[str], responses: list[str], **columns: list) -> one finite number per response."""


def call_reward_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Call `function` with a list per dataset column and check what it returns.

    Raises:
        ValueError: another number of rewards than responses, or one that is not a finite number.
    """
    names = columns[0].keys() if columns else ()
    rewards = list(function(prompts, responses, **{name: [row[name] for row in columns] for name in names}))
    name = getattr(function, "__name__", type(function).__name__)
    if len(rewards) != len(responses):
        raise ValueError(
            f"reward function {name} returned {len(rewards)} rewards for {len(responses)} responses: "
            f"return one number per response, in their order"
        )
    for index, reward in enumerate(rewards):
        if not _is_finite_number(reward):
            raise ValueError(
                f"reward function {name} returned {reward!r} for response {index} ({responses[index][:60]!r}): "
                f"return a finite number"
            )
    return [float(reward) for reward in rewards]


def _is_finite_number(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]  # anything that converts: numpy and torch scalars
    except (TypeError, ValueError):
        return False
