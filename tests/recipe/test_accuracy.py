"""Accuracy and calibration on held-out pairs, and the paired test between two policies."""

import numpy as np
import pytest
from PIL import Image

from fuse.recipe.accuracy import accuracy_of, save_calibration
from fuse.recipe.comparison import sign_flip_p_value


def test_accuracy_by_length_and_by_who_won():
    accuracy = accuracy_of([1.0, -1.0, 2.0, 0.0], [3, -2, 40, -50], [0, 0, 1, 1])
    assert accuracy.accuracy == pytest.approx(2.5 / 4)
    assert accuracy.longer_wins == 1.0
    assert accuracy.shorter_wins == pytest.approx(0.25)
    assert [(one.least_tokens, one.most_tokens, one.num_pairs, one.accuracy) for one in accuracy.by_length] == [
        (2, 3, 2, 0.5),
        (40, 50, 2, 0.75),
    ]


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    generator = np.random.default_rng(0)
    size = generator.exponential(1.5, 40_000)
    margins = np.where(generator.random(len(size)) < 1 / (1 + np.exp(-size)), size, -size)
    ones = [1] * len(size)
    assert accuracy_of(margins, ones, ones).calibration_error < 0.01
    assert accuracy_of(5 * margins, ones, ones).calibration_error > 0.1


def test_calibration_is_drawn(tmp_path):
    save_calibration(accuracy_of([1.0, -0.2, 3.0], [1, 1, 1], [0, 0, 0]), tmp_path / "calibration.png")
    assert Image.open(tmp_path / "calibration.png").size == (750, 750)


def test_p_values_are_uniform_where_nothing_changed_and_small_where_all_rose():
    generator = np.random.default_rng(1)
    p_values = [sign_flip_p_value(generator.normal(size=30), seed=0, num_draws=499) for _ in range(400)]
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.05)
    assert sign_flip_p_value([0.5] * 30, seed=0) == pytest.approx(1e-4)
    assert sign_flip_p_value([-0.5] * 30, seed=0) == 1.0
    assert sign_flip_p_value([0.0] * 30, seed=0) == 1.0
