"""The soft overlong punishment: by hand, and as DAPO and OpenRLHF print it."""

from __future__ import annotations

import pytest
import torch

from fuse.algorithms.overlong_penalty import overlong_penalty


def test_by_hand() -> None:
    penalty = overlong_penalty(torch.tensor([0, 12, 16, 17, 18, 20, 25]), max_length=20, buffer=4)
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == [0, 0, 0, -0.25, -0.5, -1, -1]


def dapo(length: int, max_length: int, cache: int) -> float:
    """Equation 13."""
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return ((max_length - cache) - length) / cache
    return -1.0


def openrlhf(length: int, max_new_tokens: int, buffer: int, factor: float) -> float:
    excess = min(length - (max_new_tokens - buffer), buffer)
    return -excess / buffer * factor if excess > 0 else 0.0


@pytest.mark.parametrize(("max_length", "buffer"), [(20, 4), (20, 20), (7, 1), (1, 1), (20_480, 4096)])
def test_equals_what_dapo_and_openrlhf_print(max_length: int, buffer: int) -> None:
    lengths = range(0, max_length + 3, max(1, max_length // 100))
    penalty = overlong_penalty(torch.tensor(lengths), max_length=max_length, buffer=buffer)
    assert penalty.tolist() == pytest.approx([dapo(length, max_length, buffer) for length in lengths])
    halved = overlong_penalty(torch.tensor(lengths), max_length=max_length, buffer=buffer, factor=0.5)
    assert halved.tolist() == pytest.approx([openrlhf(length, max_length, buffer, 0.5) for length in lengths])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": 0}, "the buffer is 0 tokens"),
        ({"buffer": 21}, "the buffer is 21 tokens.*max_length, 20"),
        ({"buffer": 4, "factor": -1.0}, "the factor is -1.0"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([1]), max_length=20, **options)  # type: ignore[arg-type]
