"""Rows of `fuse bench iteration`: what the turns of each variant come to, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich.box import SIMPLE
from rich.table import Table

from fuse.benchmarks.iteration_turns import Response, Turn

SERIAL, TRL = "off", "trl"
_COMPARED_METRICS = ("objective/entropy", "objective/scores")


class Row(TypedDict):
    """One variant. Figures are medians over repeats; ranges are the smallest and the largest.

    tokens_per_s counts tokens of responses. ratio_to_serial, ratio_to_trl: how many times as fast as `off` and as TRL's
    trainer, in the same repeat. phases: seconds. idle_share: by device, on which nothing ran. outside_share: of the
    iteration, in which no device took an engine step, inferred, trained or stepped an optimizer; None for TRL.
    peak_bytes: resident memory of the largest process, by role. bubbles: idle shares of the devices while they train,
    as planned, as executed, and as they would be serially; {} where there is no plan.
    """

    variant: str
    seconds: float
    seconds_range: tuple[float, float]
    samples_per_s: float
    samples_per_s_range: tuple[float, float]
    tokens_per_s: float
    tokens_per_s_range: tuple[float, float]
    ratio_to_serial: float
    ratio_to_serial_range: tuple[float, float]
    ratio_to_trl: float | None
    ratio_to_trl_range: tuple[float, float] | None
    phases: dict[str, float]
    idle_share: dict[str, float]
    outside_share: float | None
    bubbles: dict[str, float]
    peak_bytes: dict[str, int]
    metrics: dict[str, float]
    repeats: list[float]


def check_same_tokens(name: str, responses: Sequence[Response], expected: Sequence[Response]) -> None:
    """Raises: AssertionError where a variant generated anything else than the first one did."""
    for index, (got, wanted) in enumerate(zip(responses, expected, strict=True)):
        if got != wanted:
            same = [one == other for one, other in zip(got.response_ids, wanted.response_ids, strict=False)]
            position = same.index(False) if False in same else len(same)
            raise AssertionError(
                f"{name} generated other tokens than {SERIAL}: response {index} of a round, from position {position} "
                f"({len(got.response_ids)} tokens, {len(wanted.response_ids)} there)"
            )


def row_of(name: str, turns: Mapping[str, Sequence[Turn]]) -> Row:
    """The row of one variant. turns: by variant, one per repeat."""
    own = turns[name]

    def ratios(other: str) -> list[float]:
        return [theirs.seconds / ours.seconds for ours, theirs in zip(own, turns[other], strict=True)]

    def rates(amount: Callable[[Turn], int]) -> list[float]:
        return [amount(turn) / turn.seconds for turn in own]

    seconds = [turn.seconds for turn in own]
    samples = rates(lambda turn: len(turn.responses))
    tokens = rates(lambda turn: sum(len(one.response_ids) for one in turn.responses))
    outside = [turn.outside_share for turn in own if turn.outside_share is not None]
    to_trl = ratios(TRL) if TRL in turns else None
    return {
        "variant": name,
        "seconds": statistics.median(seconds),
        "seconds_range": _range(seconds),
        "samples_per_s": statistics.median(samples),
        "samples_per_s_range": _range(samples),
        "tokens_per_s": statistics.median(tokens),
        "tokens_per_s_range": _range(tokens),
        "ratio_to_serial": statistics.median(ratios(SERIAL)),
        "ratio_to_serial_range": _range(ratios(SERIAL)),
        "ratio_to_trl": None if to_trl is None else statistics.median(to_trl),
        "ratio_to_trl_range": None if to_trl is None else _range(to_trl),
        "phases": _medians([turn.phases for turn in own]),
        "idle_share": _medians([turn.idle_share for turn in own]),
        "outside_share": statistics.median(outside) if outside else None,
        "bubbles": _medians([turn.bubbles for turn in own]),
        "peak_bytes": {role: max(turn.peak_bytes[role] for turn in own) for role in own[0].peak_bytes},
        "metrics": _medians([{metric: turn.metrics[metric] for metric in _COMPARED_METRICS} for turn in own]),
        "repeats": seconds,
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _medians(mappings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name, over the mappings that have it."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return {name: statistics.median(mapping[name] for mapping in mappings if name in mapping) for name in names}


def tables(rows: Sequence[Row]) -> list[Table]:
    """How fast, and where the time goes."""
    speed = _table("PPO iterations", [*_speed_titles(rows), "idle", "outside"])
    speed.caption = (
        "ranges over repeats; idle: device by device; outside: of the time, in which no device generated, inferred, "
        "trained or stepped an optimizer"
    )
    details = _table("", ["variant", "seconds", "of which", "bubbles", "memory, MB"])
    details.caption = "bubbles: idle while training, as planned, executed, and without fusion; memory: largest process"
    for row in rows:
        idle = " ".join(f"{share:.0%}" for share in row["idle_share"].values()) or "-"
        outside = "-" if row["outside_share"] is None else f"{row['outside_share']:.1%}"
        speed.add_row(*_speed_cells(row), idle, outside)
        details.add_row(
            row["variant"],
            f"{row['seconds']:.2f}",
            "\n".join(f"{name} {seconds:.2f}" for name, seconds in row["phases"].items()),
            "\n".join(f"{name} {share:.0%}" for name, share in row["bubbles"].items()) or "-",
            "\n".join(f"{role} {size / 1e6:.0f}" for role, size in row["peak_bytes"].items()),
        )
    return [speed, details]


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
        _with_range(row["samples_per_s"], row["samples_per_s_range"], 1 if row["samples_per_s"] >= 1 else 2),
        f"{row['tokens_per_s']:.0f}",
        _with_range(row["ratio_to_serial"], row["ratio_to_serial_range"], 2),
    ]
    if row["ratio_to_trl"] is not None and row["ratio_to_trl_range"] is not None:
        cells.append(_with_range(row["ratio_to_trl"], row["ratio_to_trl_range"], 2))
    return cells


def _with_range(value: float, extremes: Sequence[float], digits: int) -> str:
    low, high = extremes
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _table(title: str, titles: Sequence[str]) -> Table:
    table = Table(*titles, title=title, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
