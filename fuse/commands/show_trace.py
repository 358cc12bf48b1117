"""What `fuse show` says of one update's trace: its rollout, as it was and as it is simulated, and its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Column, Table

from fuse.commands.tables import cell
from fuse.interstage.recorded import recorded_rollout, simulated
from fuse.interstage.rollout import SimulationResult
from fuse.interstage.timeline import chart
from schedules.export.chart import MICROSECONDS
from schedules.recorded import RecordedStep

MOST_CHARTS = 4
"""Steps that are drawn where none is chosen."""
_LEAST_COLUMNS = 20
_MARGIN = 8


def print_rollout(console: Console, trace: Mapping[str, object]) -> None:
    """Timelines and figures of a trace's rollout; nothing where it holds no samples. Raises: ValueError, damaged."""
    recorded = recorded_rollout(trace)
    if recorded is None:
        return
    results = {"executed": recorded.result}
    if (result := simulated(recorded)) is not None:
        results[f"simulated, {recorded.policy}"] = result
    width = max(_LEAST_COLUMNS, console.width - _MARGIN)
    end_s = max(one.makespan_s for one in results.values())
    for name, one in results.items():
        console.print(f"rollout, {name}", markup=False)
        console.print(chart(one, width=width, end_s=end_s), soft_wrap=True, markup=False)
    console.print(_rollouts(results, len(recorded.tokens)))
    if result is None:
        console.print("too little was measured in this update to simulate its rollout")


def print_steps(console: Console, steps: Sequence[RecordedStep]) -> None:
    """A line of every optimizer step, where there are several."""
    if len(steps) < 2:
        return
    columns = ("planned", "idle", "executed", "idle")
    table = Table("step", *(Column(name, justify="right") for name in columns))
    for number, step in enumerate(steps, start=1):
        cells = [
            text
            for timing in (step.planned, step.executed)
            for text in (
                ("", "") if timing is None else (MICROSECONDS.time_text(timing.makespan), f"{timing.bubble_ratio:.1%}")
            )
        ]
        table.add_row(str(number), *cells)
    console.print(table)
    if len(steps) > MOST_CHARTS:
        console.print(f"the first {MOST_CHARTS} of them follow; --step N draws another")


def _rollouts(results: Mapping[str, SimulationResult], num_samples: int) -> Table:
    columns = ("seconds", "generation", "idle", "migrations", "MB moved")
    table = Table(f"{num_samples} samples", *(Column(name, justify="right") for name in columns))
    for name, one in results.items():
        table.add_row(
            cell(name),
            f"{one.makespan_s:.4g}",
            f"{one.generation_s:.4g}",
            f"{one.idle_share:.1%}",
            str(one.num_migrations),
            f"{one.moved_bytes / 1e6:.3g}",
        )
    return table
