from __future__ import annotations

import pytest
import torch

from fuse.algorithms.groups import by_group


def test_samples_of_a_prompt_are_consecutive() -> None:
    assert by_group(torch.arange(6), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_no_samples_are_no_groups() -> None:
    assert by_group(torch.zeros(0), 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "num_generations", "message"),
    [
        ((5,), 2, r"shape \[5\] are not whole groups of 2"),
        ((2, 2), 2, r"shape \[2, 2\] are not whole groups of 2"),
        ((4,), 0, "num_generations is 0"),
    ],
)
def test_refuses_what_is_no_number_of_groups(shape: tuple[int, ...], num_generations: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_group(torch.zeros(shape), num_generations)
