"""The adaptive KL coefficient: by hand, against the published code, and towards its target."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.algorithms.kl_control import next_kl_coef


@pytest.mark.parametrize(
    ("kl", "coefficient"),
    [
        (6.0, 0.2),  # at its target
        (6.6, 0.2 * 1.01),  # a tenth above it, a tenth of the horizon
        (5.4, 0.2 * 0.99),
        (60.0, 0.2 * 1.02),  # clipped to a fifth
        (-60.0, 0.2 * 0.98),  # an estimate may be negative
        (math.inf, 0.2 * 1.02),
    ],
)
def test_by_hand(kl: float, coefficient: float) -> None:
    assert next_kl_coef(0.2, kl, 100, target=6.0, horizon=1000) == pytest.approx(coefficient)


def test_the_paper_has_a_gain_of_a_tenth() -> None:
    """K_beta = 0.1: updates of a tenth of the horizon."""
    error = (8.0 - 10.0) / 10.0
    assert next_kl_coef(0.15, 8.0, 512, target=10.0, horizon=5120) == pytest.approx(0.15 * (1 + 0.1 * error))


@given(kls=st.lists(st.floats(-10, 100), max_size=20), num_samples=st.integers(1, 4000))
def test_equals_the_published_controller(kls: list[float], num_samples: int) -> None:
    value = ours = 0.2
    for current in kls:
        proportional_error = np.clip(current / 6.0 - 1, -0.2, 0.2)
        value *= 1 + proportional_error * num_samples / 10_000
        ours = next_kl_coef(ours, current, num_samples, target=6.0, horizon=10_000)
        assert ours == pytest.approx(value)
        assert ours > 0


def test_settles_where_the_kl_is_at_its_target() -> None:
    """For a policy whose KL is inversely proportional to the coefficient: 3 / coefficient."""
    coefficient = 0.1
    for _ in range(1000):
        coefficient = next_kl_coef(coefficient, 3 / coefficient, 100, target=6.0, horizon=1000)
    assert coefficient == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kl", "num_samples", "target", "horizon", "message"),
    [
        (1.0, 10, 0.0, 100, "the target of the KL is 0.0"),
        (1.0, 10, 6.0, 2, "an update of 10 samples and a horizon of 2"),
        (1.0, 0, 6.0, 100, "an update of 0 samples"),
        (math.nan, 10, 6.0, 100, "the KL is NaN"),
    ],
)
def test_refuses_what_makes_no_sense(kl: float, num_samples: int, target: float, horizon: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_kl_coef(0.2, kl, num_samples, target=target, horizon=horizon)
