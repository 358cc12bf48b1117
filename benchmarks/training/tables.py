"""What `fuse bench training` prints of profiles, steps and emulated schedules."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from fuse.benchmarks.options import Row, rows_table
from fuse.commands.tables import figures_table

if TYPE_CHECKING:  # what workers are made of takes seconds to import, and emulation does without
    from fuse.intrastage.cost_profile import Profile


def profile_table(sizes: str, profile: Profile) -> Table:
    """Costs of every stage on every shape, and of messages to the next stage."""
    titles = ("stage", "sequences x tokens", "F ms", "B ms", "I ms", "W ms", "send ms", "MB F-B", "MB I-W")
    transfers = {(one.pipeline, one.stage, one.shape): one.ticks for one in profile.transfers}

    def milliseconds(ticks: int | None) -> str:
        return "-" if ticks is None else f"{1e3 * profile.tick_s * ticks:.2f}"

    rows = [
        (
            f"{one.pipeline} stage {one.stage}",
            f"{one.shape.num_sequences} x {one.shape.num_tokens}",
            *map(milliseconds, (one.forward_ticks, one.backward_ticks, one.input_grad_ticks, one.weight_grad_ticks)),
            milliseconds(transfers.get((one.pipeline, one.stage, one.shape))),
            *(f"{size / 1e6:.1f}" for size in (one.activation_bytes, one.weight_grad_bytes)),
        )
        for one in profile.stages
    ]
    return figures_table(titles, rows, title=f"{sizes}: medians of measured operations", no_wrap=True)


def line(row: Row) -> str:
    """A setting for people, as it is done."""
    text = "{setting}: serial {serial_ms:.0f} ms, fused {fused_ms:.0f}: {ratio:.3f} times as fast, predicted "
    why = f"; {row['why']}" if row["why"] else ""
    return (text + "{predicted_ratio:.3f}").format_map(row) + why


def steps_table(rows: Sequence[Row]) -> Table:
    """One line per setting."""
    columns = {
        "setting": "{setting}",
        "trained": "{num_trained[serial]} {num_trained[fused]}",
        "pad": "{padding:.2f}",
        "serial": "{serial_ms:.0f}",
        "fused": "{fused_ms:.0f}",
        "ratio": "{ratio:.3f}",
        "plan": "{predicted_ratio:.3f}",
        "gain": "{gain_share:.0%}",
        "bubbles": "{bubble_serial:.0%} {bubble_fused:.0%} {bubble_planned:.0%}",
        "lost": "{fused[transfer_share]:.0%} {overhead_share:.1%}",
    }
    caption = (
        "trained: micro-batches of serial and of fused steps; pad: computed tokens over real ones, in fused ones; "
        "gain: share of the plan's; bubbles: of serial steps, of fused ones, "
        "of the fused plan; lost: to waiting for messages already made, to overhead"
    )
    return rows_table(rows, columns, title="Steps of actor and critic, ms", caption=caption)


def summary(rows: Sequence[Row]) -> str:
    """What the settings come to."""
    faster = sum(row["ratio"] > 1 for row in rows)
    gain_share = statistics.median(row["gain_share"] for row in rows)
    overhead = max(row["overhead_share"] for row in rows)
    return (
        f"fused steps were faster in {faster} of {len(rows)} settings; median of {gain_share:.0%} of the predicted "
        f"gain; executor overhead at most {overhead:.2%} of a step"
    )


def emulated_table(rows: Sequence[Row]) -> Table:
    """One line per emulated problem."""
    columns = {
        "setting": "{setting}",
        "serial plan": "{serial_planned_ms:.0f}",
        "plan": "{planned_ms:.0f}",
        "executed": "{executed_ms:.0f}",
        "beyond": "{beyond_plan:.1%}",
        "bubbles": "{bubble_planned:.0%} {bubble_executed:.0%}",
        "late": "{transfer_share:.1%}",
        "overhead": "{overhead_share:.1%}",
    }
    caption = "emulated: operations are waits; bubbles: planned, executed; late: waiting for messages already made"
    return rows_table(rows, columns, title="Emulated schedules, ms", caption=caption)
