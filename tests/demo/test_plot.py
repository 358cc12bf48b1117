"""The learning curve."""

from pathlib import Path

import pytest

from fuse.demo.plot import save_curve, tenth_means, terminal_curve


def test_tenths_are_at_least_one_update() -> None:
    assert tenth_means([0.1, 0.5]) == pytest.approx((0.1, 0.5))
    assert tenth_means([0.0, 0.2, *[0.5] * 16, 0.8, 1.0]) == pytest.approx((0.1, 0.9))


def test_the_terminal_shows_each_update_as_a_column() -> None:
    assert terminal_curve([0.0, 0.25, 0.5, 1.0], height=2).splitlines() == [
        " 1.00 ┤   █",
        "      ┤ ▄██",
        " 0.00 └────",
        "       1 4 updates",
    ]


def test_many_updates_share_columns() -> None:
    assert max(map(len, terminal_curve([0.5] * 200, width=40).splitlines())) == 47


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    save_curve([0.1, 0.4, 0.3], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
