"""What changed since an earlier run."""

from __future__ import annotations

from typing import Any

import pytest

from fuse.benchmarks.iteration.changes import changes, changes_table, check_same_work, other_machine


def results(cpu: str = "EPYC", **figures: tuple[float, float, float]) -> dict[str, Any]:
    """Of one variant: by figure its median, least and most."""
    row: dict[str, Any] = {"variant": "both"}
    for name, (median, low, high) in figures.items():
        row |= {name: median, f"{name}_range": (low, high)}
    return {"machine": {"cpu": cpu, "num_cores": 2}, "options": {"batch": 64}, "rows": [row]}


def test_a_figure_changed_where_its_ranges_are_apart() -> None:
    old = results(samples_per_s=(10, 9, 11), ratio_to_serial=(1.2, 1.1, 1.3), ratio_to_trl=(2, 1.9, 2.1))
    new = results(samples_per_s=(8, 7, 8.9), ratio_to_serial=(1.3, 1.2, 1.4), ratio_to_trl=(2.3, 2.2, 2.4))
    slower, same, faster = changes(old, new)
    assert (slower.figure, slower.is_beyond_noise, slower.fails) == ("samples_per_s", True, True)
    assert slower.gain == pytest.approx(-0.2)
    assert (same.figure, same.is_beyond_noise, same.fails) == ("ratio_to_serial", False, False)
    assert (faster.figure, faster.is_beyond_noise, faster.fails) == ("ratio_to_trl", True, False)
    assert changes_table([slower, same, faster], False).row_count == 2


@pytest.mark.parametrize(("now", "fails"), [((8.6, 8.5, 8.7), False), ((8.4, 8.3, 8.5), True), ((8.4, 7, 9.5), False)])
def test_a_loss_of_more_than_15_percent_beyond_noise_fails(now: tuple[float, float, float], fails: bool) -> None:
    (change,) = changes(results(samples_per_s=(10, 9.5, 11)), results(samples_per_s=now))
    assert change.fails == fails


def test_speeds_of_another_machine_are_not_compared() -> None:
    old = results(samples_per_s=(10, 9, 11), ratio_to_serial=(1.2, 1.1, 1.3))
    new = results(cpu="Xeon", samples_per_s=(2, 2, 2), ratio_to_serial=(1.2, 1.1, 1.3))
    assert other_machine(old, new)
    assert [change.figure for change in changes(old, new)] == ["ratio_to_serial"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--batch was 64 and is 32"):
        check_same_work({"batch": 64}, {"batch": 32})
    other = results(samples_per_s=(10, 9, 11))
    other["rows"][0]["variant"] = "inter"
    with pytest.raises(ValueError, match="no figure of a variant in common"):
        changes(results(samples_per_s=(10, 9, 11)), other)
