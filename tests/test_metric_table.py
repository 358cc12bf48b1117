"""The page of metrics is the table that pages of runs take their words from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.metric_table import GROUPS, document, entry_of, is_timed

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "write fuse.metric_table.document() there"


def test_names_are_found_once_and_plain_ones_first() -> None:
    names = [entry.name for group in GROUPS for entry in group.entries]
    assert len(set(names)) == len(names)
    for name, found in {
        "time/total": "time/total",
        "time/rollout": "time/{phase}",
        "grad_norm/critic": "grad_norm/{role}",
        "rewards/my_function/mean": "rewards/{function}/mean",
        "rewards/chosen": "rewards/chosen",
        "objective/kl_quartile_3": "objective/kl_quartile_{1 to 4}",
        "completions/mean_terminated_length": "completions/{of}_terminated_length",
    }.items():
        entry = entry_of(name)
        assert entry is not None
        assert entry.name == found
    assert entry_of("objective/unheard_of") is None


@pytest.mark.parametrize(("name", "timed"), [("idle/device3", True), ("memory/max", True), ("lr", False), ("x", False)])
def test_what_differs_from_run_to_run(name: str, timed: bool) -> None:
    assert is_timed(name) is timed
