"""Micro-batches and optimizer steps."""

from __future__ import annotations

import numpy as np
import pytest

from fuse.training.steps import optimizer_steps, trl_optimizer_steps

ORDER = [np.array([3, 1, 0, 2, 5, 4, 7, 6]), np.arange(8)]


def test_every_mini_batch_of_every_epoch_is_one_step() -> None:
    steps = optimizer_steps(ORDER, num_mini_batches=2, micro_batch_size=2)
    assert [step.micro_batches for step in steps] == [
        ((3, 1), (0, 2)),
        ((5, 4), (7, 6)),
        ((0, 1), (2, 3)),
        ((4, 5), (6, 7)),
    ]
    assert all(step.weight == 1 / 2 for step in steps)


def test_a_mini_batch_that_micro_batches_do_not_divide_ends_in_a_smaller_one() -> None:
    (step,) = optimizer_steps([np.arange(5)], num_mini_batches=1, micro_batch_size=2)
    assert step.micro_batches == ((0, 1), (2, 3), (4,))


def test_trl_steps_by_accumulation_whatever_the_mini_batches() -> None:
    options = {"num_mini_batches": 2, "micro_batch_size": 2, "accumulation": 4}
    steps = trl_optimizer_steps(ORDER, **options, last_of_pass=False)  # type: ignore[arg-type]
    assert [len(step.micro_batches) for step in steps] == [4, 4]
    steps = trl_optimizer_steps(ORDER, **options, last_of_pass=True)  # type: ignore[arg-type]
    assert [len(step.micro_batches) for step in steps] == [1] * 8
    assert all(step.weight == 1 / 4 for step in steps)


def test_trl_gradients_left_over_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of gradient_accumulation_steps=3"):
        trl_optimizer_steps([np.arange(8)], num_mini_batches=1, micro_batch_size=2, accumulation=3, last_of_pass=False)
