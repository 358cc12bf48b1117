"""What changed between two runs of `fuse bench iteration`, beyond what their repeats differ by anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fuse.benchmarks.options import Row
from fuse.commands.options import option_name
from fuse.commands.tables import figures_table

MOST_LOST = 0.15
"""The share of a figure whose loss fails a comparison."""
_RATIOS = ("ratio_to_serial", "ratio_to_trl")
"""Figures that hold on other machines too: both sides of them were measured there, in turn."""
_SPEEDS = ("samples_per_s", "tokens_per_s")
_SAME_WORK = (
    "algorithm", "num_generations", "model", "prompts", "prompt_column", "lengths", "devices", "engine", "batch",
    "mini_batches", "micro_batch", "epochs", "max_new_tokens", "smoke", "emulate", "costs", "time_scale",
    "speculation", "acceptance", "draft_share",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A variant's figure, of which more is better: medians before and now, and whether their ranges are apart."""

    variant: str
    figure: str
    before: float
    now: float
    is_beyond_noise: bool

    @property
    def gain(self) -> float:
        """As a share of what it was; negative for a loss."""
        return self.now / self.before - 1

    @property
    def fails(self) -> bool:
        return self.is_beyond_noise and self.gain < -MOST_LOST


def check_same_work(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Accept options of two runs that do the same.

    Raises:
        ValueError: they do not, with the first option that differs.
    """
    for name in _SAME_WORK:
        before, now = old.get(name), new.get(name)
        if before != now:
            raise ValueError(
                f"--compare: {option_name(name)} was {before} and is {now}: compare results of the same options"
            )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Figures of variants that both results have; speeds only where both are of one machine.

    Raises:
        ValueError: they do not do the same, or have no variant in common.
    """
    check_same_work(old["options"], new["options"])
    compared = _RATIOS if other_machine(old, new) else (*_SPEEDS, *_RATIOS)
    rows = {row["variant"]: row for row in new["rows"]}
    found = [
        change
        for row in old["rows"]
        if row["variant"] in rows
        for figure in compared
        for change in _change(row, rows[row["variant"]], figure)
    ]
    if not found:
        raise ValueError("--compare: the results have no figure of a variant in common: measure the same --variants")
    return found


def _change(old: Row, new: Row, figure: str) -> Iterator[Change]:
    """None for a figure that one of the two lacks, and where a variant is held against itself."""
    before, now = old.get(figure), new.get(figure)
    if before is None or now is None or before == now == 1:
        return
    (low_before, high_before), (low, high) = old[f"{figure}_range"], new[f"{figure}_range"]
    yield Change(old["variant"], figure, before, now, low > high_before or high < low_before)


def other_machine(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether speeds cannot be compared."""
    return any(old["machine"].get(name) != new["machine"].get(name) for name in ("cpu", "num_cores", "gpus"))


def changes_table(found: list[Change], on_other_machine: bool) -> Table:
    """A line for each figure that changed beyond noise."""
    caption = f"{sum(not change.is_beyond_noise for change in found)} figures changed by no more than repeats differ"
    if on_other_machine:
        caption += "; speeds are not compared, for the machine is another"
    return figures_table(
        ["variant", "figure", "before", "now", "change"],
        [
            (
                change.variant,
                change.figure,
                f"{change.before:.4g}",
                f"{change.now:.4g}",
                f"{change.gain:+.0%}{' (too much)' if change.fails else ''}",
            )
            for change in found
            if change.is_beyond_noise
        ],
        title="Changes",
        caption=caption,
    )
