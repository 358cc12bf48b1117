"""Where an iteration's time went: seconds per phase, idle share per device, bubbles of training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fuse.idle_causes import idle_causes, shares, training_steps
from fuse.trace import PhaseClock, Span
from fuse.trainers.update_metrics import MOST_DEVICES


def iteration_report(
    tracks: Mapping[str, Mapping[str, Sequence[Span]]],
    clock: PhaseClock,
    planned: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """What an iteration's spans, by device and worker, say.

    `time/{phase}` and `time/total` in seconds; `idle/{device}`: the share in which no worker of it computed, and of
    more than 8 devices `idle/min`, `idle/mean` and `idle/max`, so that logs do not grow with devices;
    `idle_cause/{cause}`, the parts of all devices' time that these add up to. Where training was planned,
    `bubble/planned`, `bubble/executed` and `bubble/serial`: idle shares of all devices while they train, in the plan,
    in fact, and as it would be without fusion. Then, too, `gain/bidirectional`: how much faster
    than by plain 1F1B two opposite replicas were planned to train, a ratio less one; and `gain/forward_only`: as much
    of steps that score, too, against scoring first. Where a run does both, both are of the two together.

    planned: what of these plans say.
    """
    total_s = clock.end_s - clock.start_s
    report = {f"time/{name}": seconds for name, seconds in clock.seconds.items()} | {"time/total": total_s}
    causes = idle_causes(tracks, clock.start_s, clock.end_s, clock.spans)
    idle = {device: sum(own.values()) / total_s for device, own in causes.items()}
    if len(idle) > MOST_DEVICES:
        known = idle.values()
        idle = {"min": min(known), "mean": statistics.mean(known), "max": max(known)}
    report |= {f"idle/{name}": share for name, share in idle.items()}
    report |= {f"idle_cause/{name}": share for name, share in shares(causes, total_s).items()}
    bubbles = _bubbles([workers["model"] for workers in tracks.values()])
    return {**report, **bubbles, **(planned if bubbles else {})}


def _bubbles(tracks: Sequence[Sequence[Span]]) -> dict[str, float]:
    """`bubble/planned` and `bubble/executed` over all planned steps; none where there is no plan."""
    planned_s = planned_busy_s = executed_s = executed_busy_s = 0.0
    for step in zip(*(training_steps(track) for track in tracks), strict=True):
        spans = [span for of_rank in step for span in of_rank]
        starts, ends = (_planned(spans, name) for name in ("planned_start_s", "planned_end_s"))
        if not spans or len(starts) < len(spans):
            continue
        planned_s += max(ends) * len(tracks)
        planned_busy_s += sum(ends) - sum(starts)
        executed_s += (max(span.end_s for span in spans) - min(span.start_s for span in spans)) * len(tracks)
        executed_busy_s += sum(span.duration_s for span in spans)
    if not planned_s or not executed_s:
        return {}
    return {"bubble/planned": 1 - planned_busy_s / planned_s, "bubble/executed": 1 - executed_busy_s / executed_s}


def _planned(spans: Sequence[Span], name: str) -> list[float]:
    """This argument of those that have it."""
    return [moment for span in spans if isinstance(moment := span.arguments.get(name), float)]


def summary_line(report: Mapping[str, float]) -> str:
    """One line for people: `3.2 s (generation 1.1, ...), idle device0 12%, device1 15%, bubbles planned 8%, ...`."""
    phases = ", ".join(
        f"{name.removeprefix('time/')} {seconds:.2f}"
        for name, seconds in report.items()
        if name.startswith("time/") and name != "time/total"
    )
    idle = ", ".join(
        f"{name.removeprefix('idle/')} {share:.0%}" for name, share in report.items() if name.startswith("idle/")
    )
    bubbles = ", ".join(
        f"{name.removeprefix('bubble/')} {share:.0%}" for name, share in report.items() if name.startswith("bubble/")
    )
    gain = report.get("gain/forward_only", report.get("gain/bidirectional"))
    return (
        f"{report['time/total']:.2f} s ({phases}), idle {idle}"
        + (f", bubbles {bubbles}" if bubbles else "")
        + (f", planned {1 + gain:.2f} times as fast as plain 1F1B" if gain is not None else "")
    )
