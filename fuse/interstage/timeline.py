"""A simulated rollout as plain characters, one line per device."""

from __future__ import annotations

from collections.abc import Sequence

from fuse.interstage.rollout import BusySpan, SimulationResult, SpanKind

_LETTERS = {SpanKind.GENERATE: "G", SpanKind.INFER: "i", SpanKind.TRAIN: "t"}
_IDLE = "."
_MAX_LINES = 16


def chart(result: SimulationResult, *, width: int = 80, end_s: float | None = None) -> str:
    """Each column shows what the device does in its middle: G generates, i infers, t trains, a dot is idle.

    `end_s` is the time at the right edge (default: the makespan), for charts to compare. Of many devices some
    are shown, evenly chosen by when they are done with generation, in their order.
    """
    end_s = end_s or result.makespan_s
    order = sorted(range(len(result.timeline)), key=lambda device: (-_generated_s(result.timeline[device]), device))
    num_lines = min(_MAX_LINES, len(order))
    shown = sorted(order[line * len(order) // num_lines] for line in range(num_lines))
    lines = []
    for device in shown:
        spans = result.timeline[device]
        row = [_letter_at(spans, (column + 0.5) * end_s / width) for column in range(width)]
        lines.append(f"{device:>5} {''.join(row)}")
    kinds = {span.kind for spans in result.timeline for span in spans}
    trains = "t trains, " if SpanKind.TRAIN in kinds else ""
    hidden = f", {num_lines} of {len(order)} devices" if num_lines < len(order) else ""
    return "\n".join([*lines, f"      0 to {end_s:.4g} s; G generates, i infers, {trains}. idle{hidden}"])


def _generated_s(spans: Sequence[BusySpan]) -> float:
    return max((span.end_s for span in spans if span.kind is SpanKind.GENERATE), default=0.0)


def _letter_at(spans: Sequence[BusySpan], time_s: float) -> str:
    for span in spans:
        if span.start_s <= time_s < span.end_s:
            return _LETTERS[span.kind]
    return _IDLE
