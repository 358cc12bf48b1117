"""What `fuse simulate` prints: timelines and a table of one setting, or a line of gains for each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from fuse.commands.tables import cell
from fuse.interstage.costs import CostModel
from fuse.interstage.rollout import SimulationResult
from fuse.interstage.timeline import chart
from fuse.printable import printable

_BOUNDS = {"blind": "blind_bound_seconds", "bound": "oracle_seconds"}
"""By title, the field of a row with the seconds of a bound."""
_TOKENS, _BATCH = 1000, 64
_COLUMNS = (
    "seconds: of the iteration's rollout; decoding: of these, until the last token",
    "gain: how many times as fast as none; of known, of blind: the part of their gain that this is",
    "idle: of all devices' time; moves, GB: what migrations carried",
    "known: the best of these policies, and of the adaptive one told all lengths beforehand",
    "bound: no policy is faster; blind: on average none that cannot tell which samples will be long",
)
"""What the table's words mean, a line each."""


def show_policies(
    console: Console, rows: Sequence[dict[str, object]], results: dict[str, list[SimulationResult]]
) -> None:
    """Timelines and a table of one setting."""
    titles = ("policy", "seconds", "decoding", "gain", "of known", "of blind", "idle", "moves", "GB")
    table = Table(*titles, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(str(row["policy"]), *_cells(row))
    none_s = _number(rows[0]["simulated_seconds"])
    for name, field in _BOUNDS.items():
        bound_s = _number(rows[0][field])
        table.add_row(name, f"{bound_s:.4g}", "", f"{none_s / bound_s:.3f}x")
    end_s = max(those[0].makespan_s for those in results.values())
    for name, those in results.items():
        console.print(f"\n{name}", markup=False)
        console.print(chart(those[0], width=max(20, console.width - 8), end_s=end_s), soft_wrap=True, markup=False)
    console.print()
    console.print(table)
    for line in _COLUMNS:
        console.print(line, soft_wrap=True, markup=False)


def show_costs(console: Console, name: str, costs: CostModel) -> None:
    """Which cost model is assumed, and what it says of a few operations."""
    one_s, many_s = costs.decode_step(1, _TOKENS), costs.decode_step(_BATCH, _BATCH * _TOKENS)
    scored_s = costs.inference_s + costs.inference_token_s * _TOKENS
    text = (
        f"costs {name}: a decode step of one sample with {_TOKENS:,} tokens of context takes {1e3 * one_s:.3g} ms, of "
        f"{_BATCH} {1e3 * many_s:.3g} ms; scoring {_TOKENS:,} tokens {1e3 * scored_s:.3g} ms; the KV of a token has "
        f"{costs.kv_bytes_per_token:,} bytes"
    )
    console.print(printable(text), soft_wrap=True, markup=False)


def show_gains(console: Console, settings: Sequence[Sequence[dict[str, object]]]) -> None:
    """A line per setting: seconds of none, and the others' gains over it."""
    policies = [str(row["policy"]) for row in settings[0][1:]]
    table = Table(Column("lengths", overflow="fold"), "max tokens", str(settings[0][0]["policy"]), *policies, *_BOUNDS)
    for column in table.columns[1:]:
        column.justify = "right"
    for rows in settings:
        none_s = _number(rows[0]["simulated_seconds"])
        bounds_s = (_number(rows[0][field]) for field in _BOUNDS.values())
        gains = (*(_number(row["gain"]) for row in rows[1:]), *(none_s / bound_s for bound_s in bounds_s))
        table.add_row(
            cell(str(rows[0]["lengths"])),
            str(rows[0]["max_tokens"] or "-"),
            f"{none_s:.4g} s",
            *(f"{gain:.3f}x" for gain in gains),
        )
    console.print(table)


def _cells(row: dict[str, object]) -> Iterator[str]:
    yield f"{row['simulated_seconds']:.4g}"
    yield f"{row['generation_seconds']:.4g}"
    yield f"{row['gain']:.3f}x"
    for name in ("known_share", "blind_share"):
        yield "-" if row[name] is None else f"{row[name]:.0%}"
    yield f"{row['idle_share']:.1%}"
    yield f"{row['migrations']:.0f}"
    yield f"{_number(row['moved_bytes']) / 1e9:.3g}"


def _number(value: object) -> float:
    assert isinstance(value, float | int)
    return float(value)
