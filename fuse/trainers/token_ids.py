"""Prompts that come tokenised: whether they are tokens at all."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def token_ids(tokens: Any, index: int, column: str = "input_ids") -> list[int]:
    """The `input_ids` of row `index`, or their mask: a list, an array or a tensor of one dimension.

    Raises:
        ValueError: they are no integers from 0 on.
    """
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
        raise ValueError(
            f"dataset row {index} has {column} of type {type(tokens).__name__}, not a list of integers: give the "
            "tokens of the prompt, or name the column that holds its text"
        )
    for token in tokens:
        if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
            raise ValueError(
                f"dataset row {index} has {str(token)[:40]!r} among its {column}: they are integers from 0 on"
            )
    return [int(token) for token in tokens]
