"""Quality over time of the fused-schedule solver, as a figure: one panel per published instance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = 4
_PANEL_INCHES = (3.1, 2.5)
_TICKS_PERCENT = (-10, -3, 0, 3, 10, 30, 100, 300)
_MAKESPAN_COLOUR, _MEMORY_COLOUR = "#1f5fa8", "#d9731a"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw makespan over its lower bound, and memory over its target once the makespan is the final one.

    Both are in percent, on an axis that is linear near zero and logarithmic beyond; time is logarithmic. One line per
    seed; a dotted line is the memory that others published. Rows without a target (uneven, large) are left out.

    Raises:
        ValueError: no row has a target.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "fuse"  # the same rows give the same file
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["target"] is not None:
            panels.setdefault(row["name"], []).append(row)
    if not panels:
        raise ValueError("no published instance was solved: give --instances FILE")
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * _PANEL_INCHES[0], lines * _PANEL_INCHES[1] + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, runs) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, name, runs)
    for axis in axes[:, 0]:
        axis.set_ylabel("above, below (%)")
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    handles = [
        axes[0, 0].plot([], [], color=_MAKESPAN_COLOUR, linewidth=2.2)[0],
        axes[0, 0].plot([], [], color=_MEMORY_COLOUR, linewidth=2.2)[0],
        axes[0, 0].plot([], [], color=_MEMORY_COLOUR, linestyle=":", linewidth=1.6)[0],
    ]
    labels = ["makespan above its lower bound", "memory against its target, at that makespan", "memory published"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axis: Any, name: str, runs: Sequence[Mapping[str, Any]]) -> None:
    target, published = runs[0]["target"], runs[0]["published"]
    for row in runs:
        bound, best = row["makespan_lower_bound"], row["makespan"]
        end = max(row["history"][-1][0], 1.0)
        makespans = [(seconds, 100 * (makespan / bound - 1)) for seconds, makespan, _ in row["history"]]
        at_best = [(seconds, used) for seconds, makespan, used in row["history"] if makespan == best]
        memory = [(seconds, 100 * (used / target[1] - 1)) for seconds, used in at_best]
        for steps, colour in ((makespans, _MAKESPAN_COLOUR), (memory, _MEMORY_COLOUR)):
            times, values = zip(*steps, (max(end, 60.0), steps[-1][1]), strict=True)
            axis.step(times, values, where="post", color=colour, linewidth=1.8, alpha=0.8)
    if published is not None and published[1] > target[1]:
        axis.axhline(100 * (published[1] / target[1] - 1), color=_MEMORY_COLOUR, linestyle=":", linewidth=1.4)
    best_memory = min(row["peak_memory"] for row in runs)
    axis.set_title(f"{name}: {min(row['makespan'] for row in runs)} ticks, memory {best_memory:g}", fontsize=11)
    axis.set_xscale("log")
    axis.set_xlim(0.02, 60)
    axis.set_xticks([0.1, 1, 10, 60], ["0.1", "1", "10", "60"])
    axis.set_yscale("symlog", linthresh=3)
    axis.set_ylim(-15, _TICKS_PERCENT[-1])
    axis.set_yticks(_TICKS_PERCENT, [str(tick) for tick in _TICKS_PERCENT])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.axhline(0, color="black", linewidth=0.8, zorder=1)
    axis.tick_params(labelsize=11)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
