"""What `fuse bench training` prints of profiles, steps and emulated schedules."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from fuse.benchmarks.options import Row
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
    why = f"; {row['why']}" if row["why"] else ""
    return (
        f"{row['setting']}: serial {row['serial_ms']:.0f} ms, fused {row['fused_ms']:.0f}: {row['ratio']:.3f} times as "
        f"fast, predicted {row['predicted_ratio']:.3f}{why}"
    )


def steps_table(rows: Sequence[Row]) -> Table:
    """One line per setting."""
    titles = ("setting", "serial", "fused", "ratio", "plan", "gain", "bubbles", "late", "overhead")
    caption = (
        "gain: share of the plan's; bubbles: of serial steps, of fused ones, of the fused plan; "
        "late: waiting for messages already made"
    )
    cells = [
        (
            row["setting"],
            f"{row['serial_ms']:.0f}",
            f"{row['fused_ms']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['predicted_ratio']:.3f}",
            f"{row['gain_share']:.0%}",
            f"{row['bubble_serial']:.0%} {row['bubble_fused']:.0%} {row['bubble_planned']:.0%}",
            f"{row['fused']['transfer_share']:.1%}",
            f"{row['overhead_share']:.1%}",
        )
        for row in rows
    ]
    return figures_table(titles, cells, title="Steps of actor and critic, ms", caption=caption, no_wrap=True)


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
    titles = ("setting", "serial plan", "plan", "executed", "beyond", "bubbles", "late", "overhead")
    caption = "emulated: operations are waits; bubbles: planned, executed; late: waiting for messages already made"
    cells = [
        (
            row["setting"],
            *(f"{one:.0f}" for one in (row["serial_planned_ms"], row["planned_ms"], row["executed_ms"])),
            f"{row['beyond_plan']:.1%}",
            f"{row['bubble_planned']:.0%} {row['bubble_executed']:.0%}",
            *(f"{share:.1%}" for share in (row["transfer_share"], row["overhead_share"])),
        )
        for row in rows
    ]
    return figures_table(titles, cells, title="Emulated schedules, ms", caption=caption, no_wrap=True)
