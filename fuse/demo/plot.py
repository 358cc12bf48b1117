"""The learning curve, as a picture and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

BLOCKS = " ▁▂▃▄▅▆▇█"


def tenth_means(rewards: Sequence[float]) -> tuple[float, float]:
    """Mean reward of the first and of the last tenth of the updates, of at least one each."""
    size = max(1, len(rewards) // 10)
    return float(np.mean(rewards[:size])), float(np.mean(rewards[-size:]))


def terminal_curve(rewards: Sequence[float], *, width: int = 60, height: int = 8) -> str:
    """Rewards in 0..1 over updates as a bar chart of `height` lines; a column is the mean of neighbouring updates."""
    columns = [float(np.mean(part)) for part in np.array_split(rewards, min(width, len(rewards)))]
    lines = []
    for row in reversed(range(height)):
        eighths = (round(8 * min(1.0, max(0.0, column * height - row))) for column in columns)
        label = f"{(row + 1) / height:.2f}" if row % 2 else ""
        lines.append(f"{label:>5} ┤" + "".join(BLOCKS[count] for count in eighths))
    lines.append(f"{0:>5.2f} └" + "─" * len(columns))
    lines.append(" " * 7 + "1" + f" {len(rewards)} updates".rjust(len(columns) - 1))
    return "\n".join(lines)


def save_curve(rewards: Sequence[float], path: Path) -> None:
    """Write the mean reward of each update, and their moving average over a tenth of the run, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    window = max(1, len(rewards) // 10)
    updates = np.arange(1, len(rewards) + 1)
    average = np.convolve(rewards, np.full(window, 1 / window), mode="valid")
    first, last = tenth_means(rewards)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(updates, rewards, color="tab:blue", alpha=0.3, label="mean reward of the update")
    axes.plot(updates[window - 1 :], average, color="tab:blue", label=f"average of the last {window}")
    axes.set_title(f"PPO on worked sums: {first:.2f} in the first tenth, {last:.2f} in the last")
    axes.set_xlabel("update")
    axes.set_ylabel("share of exact answers")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
