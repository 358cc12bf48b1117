"""Tokenised prompts: what is a list of integers, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fuse.trainers.token_ids import token_ids


@pytest.mark.parametrize("tokens", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), np.int64(4)]])
def test_lists_arrays_and_tensors_are_tokens(tokens: Any) -> None:
    found = token_ids(tokens, 0)
    assert found == [3, 4]
    assert {type(token) for token in found} == {int}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (3, "row 7 has input_ids of type int, not a list of integers"),
        ("345", "row 7 has input_ids of type str, not a list of integers"),
        ({"a": 3}, "row 7 has input_ids of type dict, not a list of integers"),
        (torch.tensor(3), "row 7 has input_ids of type int, not a list of integers"),
        ([3, -1], "row 7 has '-1' among its input_ids: they are integers from 0 on"),
        ([3, 1.5], "row 7 has '1.5' among its input_ids"),
        ([3, None], "row 7 has 'None' among its input_ids"),
        ([3, True], "row 7 has 'True' among its input_ids"),
        ([[3, 4]], r"row 7 has '\[3, 4\]' among its input_ids"),
        (np.array([3.0]), "row 7 has '3.0' among its input_ids"),
    ],
)
def test_anything_else_is_refused_with_its_row(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_ids(tokens, 7)
