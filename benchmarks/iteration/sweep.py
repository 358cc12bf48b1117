"""Several settings of `fuse bench iteration` in one run, and a picture of what fusion brings in each.

matplotlib and plotly are imported only to draw.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fuse.benchmarks.iteration.rows import SERIAL
from fuse.benchmarks.options import Row
from fuse.commands.options import option_name
from fuse.commands.simulated_speculation import KINDS
from schedules.export.extras import require
from schedules.export.html import FONT
from schedules.export.palette import INK

SWEPT: Mapping[str, type] = MappingProxyType(
    {
        "algorithm": str,
        "num_generations": int,
        "model": str,
        "lengths": str,
        "devices": int,
        "batch": int,
        "mini_batches": int,
        "micro_batch": int,
        "epochs": int,
        "max_new_tokens": int,
        "emulate": int,
        "costs": str,
        "speculation": str,
        "time_scale": float,
    }
)
"""Options that take several values, with their types."""
_NUMBERS: Mapping[type, str] = MappingProxyType({int: "whole numbers", float: "numbers"})
_CHOICES: Mapping[str, Sequence[str]] = MappingProxyType({"algorithm": ("ppo", "grpo"), "speculation": KINDS})


@dataclass(frozen=True, slots=True)
class Swept:
    """An option and its values."""

    name: str
    values: tuple[Any, ...]


def swept(text: str) -> Swept:
    """Type of an option: KEY=V1,V2,... with a key of `SWEPT`, spelt as the option is, with or without dashes before."""
    key, _, values = text.partition("=")
    name = key.lstrip("-").replace("-", "_")
    if name not in SWEPT:
        known = ", ".join(option_name(one).removeprefix("--") for one in SWEPT)
        raise argparse.ArgumentTypeError(f"{text} must be KEY=V1,V2 with one of the keys {known}")
    try:
        converted = tuple(SWEPT[name](value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: {key} takes {_NUMBERS[SWEPT[name]]} with commas between") from None
    if unknown := [value for value in converted if value not in _CHOICES.get(name, converted)]:
        raise argparse.ArgumentTypeError(f"{text}: {key} is one of {', '.join(_CHOICES[name])}, not {unknown[0]}")
    if "" in converted or len(set(converted)) < len(converted):
        raise argparse.ArgumentTypeError(f"{text} must name values that differ, with commas between")
    return Swept(name, converted)


def points(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], argparse.Namespace]]:
    """Every combination of values, the last option's changing fastest, and the arguments with them.

    Raises:
        ValueError: an option is there twice.
    """
    names = [one.name for one in arguments.sweep]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--sweep has {name} twice: give its values once, with commas between")
    for values in itertools.product(*(one.values for one in arguments.sweep)):
        settings = dict(zip(names, values, strict=True))
        yield settings, argparse.Namespace(**(vars(arguments) | settings))


def picture_files(json_file: Path | None) -> tuple[Path, Path]:
    """Where a still picture and a page go: beside the results, under their name."""
    stem = json_file or Path("sweep.json")
    return stem.with_suffix(".png"), stem.with_suffix(".html")


@dataclass(frozen=True, slots=True)
class _Axes:
    """What is drawn over what. has_numbers: between which there is something, so that a line may join them."""

    option: str
    has_numbers: bool
    ratio: str


@dataclass(frozen=True, slots=True)
class _Line:
    """How many times as fast as `off`: a median and a range for each value of the first option."""

    name: str
    values: list[str]
    ratios: list[float]
    ranges: list[tuple[float, float]]

    @property
    def below(self) -> list[float]:
        return [ratio - low for ratio, (low, _) in zip(self.ratios, self.ranges, strict=True)]

    @property
    def above(self) -> list[float]:
        return [high - ratio for ratio, (_, high) in zip(self.ratios, self.ranges, strict=True)]


def draw(measured: Sequence[Mapping[str, Any]], png: Path, html: Path) -> None:
    """Draw speed over `off` by the first option that was swept: a line for each variant and setting of the others.

    Points alone, where values are names.

    measured: points as JSON has them.

    Raises:
        ValueError: matplotlib or plotly is not installed.
    """
    require("matplotlib")
    require("plotly")
    key = next(iter(measured[0]["settings"]))
    is_emulated = any(row.get("emulated") for point in measured for row in point["rows"])
    axes = _Axes(
        option=option_name(key).removeprefix("--"),
        has_numbers=SWEPT[key] is not str,
        ratio=f"times as fast as {SERIAL}{', on emulated devices' if is_emulated else ''}",
    )
    lines = _lines(key, measured)
    _draw_png(axes, lines, png)
    _draw_page(axes, lines, html)


def _lines(key: str, measured: Sequence[Mapping[str, Any]]) -> list[_Line]:
    lines: dict[str, _Line] = {}
    for point in measured:
        others = [f"{name} {short(value)}" for name, value in point["settings"].items() if name != key]
        for row in _compared(point["rows"]):
            name = ", ".join([row["variant"], *others])
            line = lines.setdefault(name, _Line(name, [], [], []))
            line.values.append(short(point["settings"][key]))
            line.ratios.append(row["ratio_to_serial"])
            line.ranges.append(row["ratio_to_serial_range"])
    return list(lines.values())


def short(value: Any) -> str:
    """Of a file its name alone."""
    path = Path(str(value))
    return path.stem if path.suffix in (".csv", ".json") else str(value)


def _compared(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["variant"] != SERIAL]


def _draw_png(axes: _Axes, lines: Sequence[_Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 if axes.has_numbers else 5), layout="constrained")
    plot = figure.add_subplot()
    for line in lines:
        plot.errorbar(
            line.values,
            line.ratios,
            [line.below, line.above],
            label=line.name,
            marker="o",
            capsize=3,
            linestyle="-" if axes.has_numbers else "",
        )
    plot.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    if not axes.has_numbers:
        for name in plot.get_xticklabels():  # of files, which lie over one another if level
            name.set(rotation=20, rotation_mode="anchor", horizontalalignment="right")
    plot.set_xlabel(axes.option)
    plot.set_ylabel(axes.ratio)
    plot.legend()
    figure.savefig(path, dpi=150)


def _draw_page(axes: _Axes, lines: Sequence[_Line], path: Path) -> None:
    from plotly.graph_objects import Figure, Scatter

    page = Figure(
        [
            Scatter(
                name=line.name,
                mode="lines+markers" if axes.has_numbers else "markers",
                x=line.values,
                y=line.ratios,
                error_y={"type": "data", "symmetric": False, "array": line.above, "arrayminus": line.below},
            )
            for line in lines
        ]
    )
    page.add_hline(1, line={"color": INK, "width": 1, "dash": "dot"})
    page.update_layout(font={"family": FONT, "color": INK, "size": 13}, plot_bgcolor="white", showlegend=True)
    page.update_xaxes(title=axes.option, type="category")
    page.update_yaxes(title=axes.ratio)
    page.write_html(path, include_plotlyjs=True)
