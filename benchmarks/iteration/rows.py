"""Rows of `fuse bench iteration`: what the turns of each variant come to, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table

from fuse.benchmarks.iteration.rates import Scale, rates
from fuse.benchmarks.iteration.spread import medians, spread
from fuse.benchmarks.iteration.turn import Turn
from fuse.benchmarks.options import Row
from fuse.commands.tables import figures_table

SERIAL, TRL = "off", "trl"
FUSION: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {
        SERIAL: {"inter_stage_fusion": False, "intra_stage_fusion": False},
        "inter": {"inter_stage_fusion": True, "intra_stage_fusion": False},
        "intra": {"inter_stage_fusion": False, "intra_stage_fusion": True},
        "both": {"inter_stage_fusion": True, "intra_stage_fusion": True},
    }
)
"""What each variant of this project's trainer is."""
TAIL = "tail"
"""`both`, and training before all samples are there: of emulated devices."""
NATURAL, SYNTHETIC = "natural", "synthetic"
"""Lengths that no file has."""
SMOKE_NOTE = "A smoke run of a tiny model: it shows that everything runs, and proves nothing about speed."
_COMPARED_METRICS = ("objective/entropy", "objective/scores", "entropy", "reward", "kl", "tail/first_step_share")


def row_of(name: str, turns: Mapping[str, Sequence[Turn]], scale: Scale) -> Row:
    """What one variant's turns come to. turns: by variant, one per repeat.

    Figures are medians over repeats; NAME_range: the smallest and the largest. Beside those of `rates`:
    seconds; samples_per_s; tokens_per_s: of responses, that is.
    ratio_to_serial, ratio_to_trl: how many times as fast as `off` and TRL's trainer, in the same repeat; None without.
    phases: seconds. idle_share: by device, on which nothing ran.
    outside_share: of the iteration, in which no device took an engine step, inferred, trained or stepped an optimizer;
        None for TRL.
    bubbles: idle shares of the devices while they train, as planned, as executed, and as they would be serially; {}
        where there is no plan.
    peak_bytes: resident memory of the largest process, by role. metrics: of those compared. repeats: seconds of each.
    """
    own = turns[name]
    seconds = [turn.seconds for turn in own]

    def ratios(other: str) -> list[float]:
        if other not in turns:
            return []
        return [theirs.seconds / mine for mine, theirs in zip(seconds, turns[other], strict=True)]

    outside = [turn.outside_share for turn in own if turn.outside_share is not None]
    return {
        "variant": name,
        **spread("seconds", seconds),
        **spread("samples_per_s", [len(turn.responses) / turn.seconds for turn in own]),
        **spread("tokens_per_s", [_num_tokens(turn) / turn.seconds for turn in own]),
        **spread("ratio_to_serial", ratios(SERIAL)),
        **spread("ratio_to_trl", ratios(TRL)),
        "phases": medians([turn.phases for turn in own]),
        **rates(own, scale),
        "idle_share": medians([turn.idle_share for turn in own]),
        "outside_share": statistics.median(outside) if outside else None,
        "bubbles": medians([turn.bubbles for turn in own]),
        "peak_bytes": {role: max(turn.peak_bytes[role] for turn in own) for role in own[0].peak_bytes},
        "metrics": medians(
            [{metric: turn.metrics[metric] for metric in _COMPARED_METRICS if metric in turn.metrics} for turn in own]
        ),
        "repeats": seconds,
    }


def _num_tokens(turn: Turn) -> int:
    return sum(len(one.response_ids) for one in turn.responses)


def tables(rows: Sequence[Row]) -> list[Table]:
    """How fast, and where the time goes."""
    speed = [
        (
            *_speed_cells(row),
            " ".join(f"{share:.0%}" for share in row["idle_share"].values()) or "-",
            "-" if row["outside_share"] is None else f"{row['outside_share']:.1%}",
        )
        for row in rows
    ]
    details = [
        (
            row["variant"],
            f"{row['seconds']:.2f}",
            "\n".join(f"{name} {seconds:.2f}" for name, seconds in row["phases"].items()),
            "\n".join(f"{name} {share:.0%}" for name, share in row["bubbles"].items()) or "-",
            "\n".join(f"{role} {size / 1e6:.0f}" for role, size in row["peak_bytes"].items()),
        )
        for row in rows
    ]
    return [
        figures_table(
            [*_speed_titles(rows), "idle", "outside"],
            speed,
            title="PPO iterations",
            caption="ranges over repeats; idle: device by device; outside: of the time, in which no device generated, "
            "inferred, trained or stepped an optimizer",
        ),
        figures_table(
            ["variant", "seconds", "of which", "bubbles", "memory, MB"],
            details,
            title="",
            caption="bubbles: idle while training, as planned, executed, and without fusion; memory: largest process",
        ),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """The table for a README, with machine and date, from what `--json` wrote."""
    rows, machine, options = results["rows"], results["machine"], results["options"]
    titles = _speed_titles(rows)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *(_speed_cells(row) for row in rows)]
    packages = machine["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "trl") if name in packages)
    model = options["model"] or "Llama of 4 layers x 256"
    mix = Path(options["lengths"]).stem if options["lengths"] else "synthetic"
    setting = (
        f"{options['devices']} cores of {machine['cpu']}, {results['date']}; {versions}; {model}, {options['batch']} "
        f"prompts an iteration, epochs: {options['epochs']}, each of {options['mini_batches']} mini-batches of "
        f"micro-batches of {options['micro_batch']}, at most {options['max_new_tokens']} tokens, lengths: {mix}; "
        f"medians (ranges) of {options['repeats']} iterations each, in turn, all on the same tokens. {bound(rows)}"
        + (f" {SMOKE_NOTE}" if options.get("smoke") else "")
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", setting])


def bound(rows: Sequence[Row]) -> str:
    """What fusion could bring if it filled all idle time, in a sentence."""
    (serial,) = (row for row in rows if row["variant"] == SERIAL)
    idle = statistics.mean(serial["idle_share"].values())
    return (
        f"Without fusion the devices are idle {idle:.0%} of the time: filled completely, that would be "
        f"{1 / (1 - idle):.2f} times as fast."
    )


def _speed_titles(rows: Sequence[Row]) -> list[str]:
    has_trl = any(row["ratio_to_trl"] is not None for row in rows)
    return ["variant", "samples/s", "tokens/s", f"x {SERIAL}", *(["x TRL"] if has_trl else [])]


def _speed_cells(row: Row) -> list[str]:
    cells = [
        row["variant"],
        _with_range(row, "samples_per_s", 1 if row["samples_per_s"] >= 1 else 2),
        f"{row['tokens_per_s']:.0f}",
        _with_range(row, "ratio_to_serial", 2),
    ]
    return cells if row["ratio_to_trl"] is None else [*cells, _with_range(row, "ratio_to_trl", 2)]


def _with_range(row: Row, name: str, digits: int) -> str:
    low, high = row[f"{name}_range"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
