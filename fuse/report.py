"""Where an iteration's time went: seconds per phase, idle share per device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fuse.trace import PhaseClock, Span, busy_s


def iteration_report(tracks: Mapping[str, Mapping[str, Sequence[Span]]], clock: PhaseClock) -> dict[str, float]:
    """`time/{phase}` and `time/total` in seconds, and `idle/{device}`: the share in which no worker of it computed."""
    total_s = clock.end_s - clock.start_s
    report = {f"time/{name}": seconds for name, seconds in clock.seconds.items()} | {"time/total": total_s}
    for device, workers in tracks.items():
        spans = [span for spans in workers.values() for span in spans]
        report[f"idle/{device}"] = 1.0 - busy_s(spans, clock.start_s, clock.end_s) / total_s
    return report


def summary_line(report: Mapping[str, float]) -> str:
    """One line for people: `3.2 s (generation 1.1, inference 0.4, ...), idle device0 12%, device1 15%`."""
    phases = ", ".join(
        f"{name.removeprefix('time/')} {seconds:.2f}"
        for name, seconds in report.items()
        if name.startswith("time/") and name != "time/total"
    )
    idle = ", ".join(
        f"{name.removeprefix('idle/')} {share:.0%}" for name, share in report.items() if name.startswith("idle/")
    )
    return f"{report['time/total']:.2f} s ({phases}), idle {idle}"
