"""Response lengths that benchmarks force."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.benchmarks.lengths import response_lengths, scaled, scaled_to


def test_a_trace_may_be_longer_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("output_tokens\n3\n4\n5\n")
    assert response_lengths(path, 2) == [3, 4]
    assert response_lengths(path, 2, 9) == [3, 4, 5]
    with pytest.raises(ValueError, match="has 3 rows, and 4 responses are needed"):
        response_lengths(path, 4)


def test_the_default_mix_is_long_tailed() -> None:
    lengths = sorted(response_lengths(None, 128))
    assert lengths == sorted(response_lengths(None, 128))
    assert 3 < lengths[-1] / lengths[64] < 8


def test_scaled_lengths_keep_their_proportions() -> None:
    assert scaled([10, 2, 1], 0.3) == [3, 1, 1]
    assert scaled_to([10, 40, 20], 8) == [2, 8, 4]
