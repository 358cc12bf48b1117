"""Rows of emulated iterations, and tables of what they took beside what simulator and planner predict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fuse.benchmarks.iteration.rates import Scale
from fuse.benchmarks.iteration.rows import SERIAL, row_of
from fuse.benchmarks.iteration.spread import medians
from fuse.benchmarks.iteration.sweep import short
from fuse.benchmarks.iteration.turn import Turn
from fuse.benchmarks.options import Row
from fuse.commands.tables import figures_table

_CAPTION = (
    "devices wait in place of computing; simulated: by the rollout simulator and planned schedules, from the same "
    "lengths and costs"
)
_TITLES = ["variant", "emulated s", "simulated s", "x off", "simulated", "of its gain"]


def emulated_row(name: str, turns: Mapping[str, Sequence[Turn]], scale: Scale) -> Row:
    """As `row_of`, in emulated seconds, and: emulated, True.

    simulated_seconds, simulated_phases: what simulator and planner predict, medians too. simulated_ratio: how many
    times as fast as `off` that is. gain_share: what is gained over `off`, of what they predict of it; None of `off`.
    """
    simulated = {
        one: statistics.median(sum(turn.simulated_phases.values()) for turn in own) for one, own in turns.items()
    }
    row = row_of(name, turns, scale)
    ratio = simulated[SERIAL] / simulated[name]
    return {
        **row,
        "emulated": True,
        "simulated_seconds": simulated[name],
        "simulated_phases": medians([turn.simulated_phases for turn in turns[name]]),
        "simulated_ratio": ratio,
        "gain_share": None if name == SERIAL or ratio == 1 else (row["ratio_to_serial"] - 1) / (ratio - 1),
    }


def emulated_table(rows: Sequence[Row]) -> Table:
    """Emulated beside simulated."""
    return figures_table(
        _TITLES,
        [_cells(row) for row in rows],
        title="Emulated iterations",
        caption=_CAPTION,
    )


def emulated_sweep_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """The variants of all points, as JSON has them, but for `off`."""
    rows = [(point["settings"], row) for point in points for row in point["rows"] if row["variant"] != SERIAL]
    return figures_table(
        [*points[0]["settings"], *_TITLES],
        [(*map(short, settings.values()), *_cells(row)) for settings, row in rows],
        title="Emulated iterations",
        caption=_CAPTION,
    )


def emulated_markdown(results: Mapping[str, Any]) -> str:
    """The same as a table for documents, with its setting."""
    rows, options = results["rows"], results["options"]
    lines = [_TITLES, ["---", *["---:"] * (len(_TITLES) - 1)], *map(_cells, rows)]
    mix = Path(options["lengths"]).stem if options["lengths"] else "synthetic"
    setting = (
        f"Emulated, {results['date']}: {options['emulate']} devices, costs {options['costs']}, {options['batch']} "
        f"prompts an iteration, {options['mini_batches']} mini-batches of micro-batches of {options['micro_batch']}, "
        f"at most {options['max_new_tokens']} tokens, lengths: {mix}; an emulated second took "
        f"{options['time_scale']} s."
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", setting])


def _cells(row: Row) -> list[str]:
    share = row["gain_share"]
    return [
        row["variant"],
        f"{row['seconds']:.2f}",
        f"{row['simulated_seconds']:.2f}",
        f"{row['ratio_to_serial']:.2f}",
        f"{row['simulated_ratio']:.2f}",
        "-" if share is None else f"{share:.0%}",
    ]
