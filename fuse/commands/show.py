"""Print a problem, a schedule, a solution, a run or one of its traces; draw it, or export it.

Reads what schedules.formats writes (text or JSON), what `fuse solve --out` writes, the output directory of a run, and
its traces (`traces/iteration-*.json` there), which it lays over their plan. A problem is shown with the schedule that a
simple greedy rule gives it.

  fuse show ppo_run --html run.html                                   a run on one page
  fuse show ppo_run/traces/iteration-00003.json --html update.html    one update: its rollout, and all its steps
  fuse show --demo --html demo.html                                   a page without a run
  fuse show --playground page.html                                    schedules under sliders
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fuse.commands.output import output_file
from fuse.commands.show_run import demo_page, run_page, show_run, trace_page
from fuse.commands.show_trace import MOST_CHARTS, print_rollout, print_steps
from fuse.commands.tables import cell
from fuse.printable import printable
from fuse.run_page.data import details
from schedules.bounds import makespan_lower_bound
from schedules.critical_path import critical_path
from schedules.export import chrome, html, playground, svg
from schedules.export.chart import MICROSECONDS, TICKS, Units
from schedules.export.pipelining import pipelining_csv
from schedules.export.terminal import MARGIN, legend, rank_lines
from schedules.formats import problem_from_json, problem_from_text, schedule_from_json, schedule_from_text
from schedules.fused.greedy import greedy
from schedules.ir import Problem, Schedule
from schedules.reading import NotReadableError, parse_json, read_text
from schedules.recorded import busy_seconds, is_trace, recorded_steps
from schedules.timing import Timing, evaluate
from schedules.validate import check

_LEAST_COLUMNS = 20
_PLAYGROUND_S = 1.0
"""Of the search for each schedule of the page with sliders."""
_CONTENTS = "a problem, schedule, solution or trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse show`."""
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE",
        help="a problem, schedule, solution or trace, or the output directory of a run",
    )  # fmt: skip
    parser.add_argument("--demo", action="store_true", help="in place of FILE, a run that is made up")
    parser.add_argument(
        "--html", type=output_file, metavar="OUT", help="write an interactive page, which works offline"
    )
    parser.add_argument("--svg", type=output_file, metavar="OUT", help="write a picture")
    parser.add_argument(
        "--chrome", type=output_file, metavar="OUT", help="write a trace for ui.perfetto.dev, with arrows and memory"
    )
    parser.add_argument(
        "--csv", type=output_file, metavar="OUT",
        help='write what torch.distributed.pipelining loads with format="compute_comms"',
    )  # fmt: skip
    parser.add_argument(
        "--playground", type=output_file, metavar="OUT",
        help="without FILE: write a page with sliders that compares schedules of two models, which takes half a minute",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=int, metavar="N",
        help="of a trace, this optimizer step alone (default: all of them; 1 for exports of one)",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What there is to draw. `executed`, `planned`: of a trace. `bounds`: of a solution, by figure.

    `heading`: over it, where there are several. `page`: makes that of the whole file, where this is a part of it.
    """

    title: str
    schedule: Schedule
    executed: Timing | None = None
    planned: Timing | None = None
    units: Units = TICKS
    bounds: Mapping[str, object]
    heading: str = ""
    page: Callable[[], str] | None = None


def run(arguments: argparse.Namespace) -> int:
    """Print the file's contents and write what was asked for."""
    console = Console(highlight=False)
    outputs: dict[str, Path] = {
        name: path for name in ("html", "svg", "chrome", "csv") if (path := getattr(arguments, name)) is not None
    }
    if arguments.playground is not None:
        if arguments.file is not None or arguments.demo or outputs:
            raise ValueError("--playground is of no FILE: give it alone")
        with console.status("solving") as status:
            text = playground.page(_PLAYGROUND_S, num_workers=2, tell=status.update)
        _write(arguments.playground, text, console)
        return 0
    if arguments.demo or (arguments.file is not None and arguments.file.is_dir()):
        return _show_run(arguments.file, outputs, console)
    if arguments.file is None:
        raise ValueError(f"no FILE: give {_CONTENTS}, the output directory of a run, or --demo")
    shown = _read(arguments.file, arguments.step, console)
    if not shown:
        if outputs:
            raise ValueError(f"{arguments.file} holds no training step, so there is no --{next(iter(outputs))} of it")
        return 0
    for one in shown[:MOST_CHARTS]:
        if one.heading:
            console.print(one.heading)
        _print_schedule(console, one)
    for name, path in outputs.items():
        _write(path, _export(name, shown[0]), console)
    return 0


def _show_run(directory: Path | None, outputs: dict[str, Path], console: Console) -> int:
    if directory is not None and len(outputs) == 0:
        show_run(console, directory)
    for name, path in outputs.items():
        if name != "html":
            raise ValueError(f"--{name} is of one schedule or trace: a run has --html")
        _write(path, demo_page() if directory is None else run_page(directory), console)
    if directory is None and not outputs:
        raise ValueError("--demo has nothing to print: give --html FILE")
    return 0


def _write(path: Path, text: str, console: Console) -> None:
    path.write_text(text, encoding="utf-8", newline="")
    console.print(printable(f"wrote {path}"), soft_wrap=True, markup=False)


def _read(path: Path, step: int | None, console: Console) -> list[Shown]:
    """Find out what the file is, print what only that kind has, and take from it what is drawn."""
    text = read_text(path, _CONTENTS)
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    if word == "problem":
        return [_of_problem(problem_from_text(text), console)]
    if word == "schedule":
        return [_of_schedule(schedule_from_text(text))]
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither JSON ({error}) nor text that starts with problem or schedule") from None
    except NotReadableError as error:
        raise ValueError(f"{path} {error}: give {_CONTENTS}") from None
    if isinstance(value, dict) and "problem" in value:
        return [_of_problem(problem_from_json(value), console)]
    if isinstance(value, dict) and isinstance(value.get("schedule"), dict):
        return [_of_solution(value, console)]
    if isinstance(value, dict) and "schedule" in value:
        return [_of_schedule(schedule_from_json(value))]
    if isinstance(value, dict) and is_trace(value):
        return _of_trace(path, value, step, console)
    raise ValueError(f"{path} is JSON, but none of a problem, a schedule, a solution of fuse solve, or a trace")


def _of_problem(problem: Problem, console: Console) -> Shown:
    table = Table("model", "ranks of its stages", "micro-batches", "forward", "backward", "held")
    for pipeline in problem.pipelines:
        per_stage = (pipeline.forward_ticks, pipeline.backward_ticks, pipeline.activation_bytes)
        table.add_row(
            pipeline.name,
            _ranks(pipeline.ranks),
            str(pipeline.num_micro_batches),
            *(_span(values) if values else "none" for values in per_stage),
        )
    console.print(table)
    if problem.memory_limit_bytes is not None:
        console.print(f"memory limit: {_span(problem.memory_limit_bytes)}")
    console.print("a problem has no order; this is a greedy one: fuse solve finds better ones")
    return Shown(title="Greedy schedule", schedule=greedy(problem), bounds={})


def _of_schedule(schedule: Schedule) -> Shown:
    check(schedule)
    return Shown(title="Schedule", schedule=schedule, bounds={})


def _of_solution(value: Mapping[str, Any], console: Console) -> Shown:
    schedule = schedule_from_json(value["schedule"])
    check(schedule)
    status, found_by = value.get("status", "of unknown status"), value.get("found_by", "an unknown part")
    for name in ("makespan_lower_bound", "memory_lower_bound"):
        bound = value.get(name)
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise ValueError(f"solution: {name} is {bound!r}, not an integer: take the file from fuse solve")
    console.print(printable(f"solution: {status}, found by {found_by}"), soft_wrap=True, markup=False)
    return Shown(title="Solved schedule", schedule=schedule, bounds=value)


def _of_trace(path: Path, value: Mapping[str, Any], step: int | None, console: Console) -> list[Shown]:
    """Every step, or the one that is asked for."""
    steps = recorded_steps(value)
    _print_devices(console, busy_seconds(value))
    if step is not None and not 1 <= step <= len(steps):
        raise ValueError(f"--step is {step}, but {path} holds steps 1 to {len(steps)}")
    if step is None:
        print_rollout(console, value)
        print_steps(console, steps)
    return [
        Shown(
            title=f"{path.stem}, step {number}",
            schedule=one.schedule,
            executed=one.executed,
            planned=one.planned,
            units=MICROSECONDS,
            bounds={},
            heading=f"training, step {number} of {len(steps)}",
            page=(lambda: trace_page(path.stem, value, details(value))) if step is None else None,
        )
        for number, one in enumerate(steps, start=1)
        if step in (None, number)
    ]


def _print_devices(console: Console, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """What each device spent its time on."""
    categories = sorted({category for of_device in seconds.values() for category in of_device})
    if not categories:
        return
    table = Table("seconds", *(Column(cell(category)) for category in categories))
    for device, of_device in seconds.items():
        table.add_row(cell(device), *(f"{of_device.get(category, 0.0):.3g}" for category in categories))
    console.print(table)


def _print_schedule(console: Console, shown: Shown) -> None:
    width = max(_LEAST_COLUMNS, console.width - MARGIN)
    timing = shown.planned or evaluate(shown.schedule)
    makespans = [timing.makespan] + ([shown.executed.makespan] if shown.executed else [])
    charts = {"planned": shown.planned, "executed": shown.executed} if shown.executed else {"": timing}
    for name, each in charts.items():
        if each is None:
            continue
        if name:
            console.print(name)
        rows = rank_lines(shown.schedule, width, timing=each, end=max(makespans))
        console.print(rows, soft_wrap=True, markup=False)
    console.print(legend(shown.schedule, width + MARGIN), soft_wrap=True, markup=False)
    console.print(_figures(shown, timing))
    console.print(_path_line(shown), soft_wrap=True, markup=False)


def _figures(shown: Shown, timing: Timing) -> Table:
    units = shown.units
    if shown.executed is not None:
        table = Table("", *(["planned"] if shown.planned else []), "executed")
        timings = [*([timing] if shown.planned else []), shown.executed]
        table.add_row("makespan", *(units.time_text(each.makespan) for each in timings))
        table.add_row("idle", *(f"{each.bubble_ratio:.1%}" for each in timings))
        return table
    table = Table("", "value", "bound")
    bound = shown.bounds.get("makespan_lower_bound")
    bound = makespan_lower_bound(shown.schedule.problem) if bound is None else bound
    table.add_row("makespan", units.time_text(timing.makespan), str(bound))
    table.add_row("idle", f"{timing.bubble_ratio:.1%}", "")
    if any(timing.peak_bytes):
        peak = units.memory_text(max(timing.peak_bytes))
        least = shown.bounds.get("memory_lower_bound")
        table.add_row("peak memory", peak, units.memory_text(least) if isinstance(least, int) else "")
    return table


def _path_line(shown: Shown) -> str:
    """What the makespan consists of."""
    problem = shown.schedule.problem
    timing = shown.executed or shown.planned or evaluate(shown.schedule)
    ticks: defaultdict[str, int] = defaultdict(int)
    length = {
        op: end - start
        for order, starts, ends in zip(shown.schedule.ranks, timing.start, timing.end, strict=True)
        for op, start, end in zip(order, starts, ends, strict=True)
    }
    for op in critical_path(shown.schedule, timing):
        ticks[problem.pipelines[op.pipeline].name] += length[op]
    ticks["waiting"] = timing.makespan - sum(ticks.values())
    parts = [f"{name} {shown.units.time_text(spent)}" for name, spent in ticks.items() if spent]
    return f"critical path: {', '.join(parts)}"


def _export(name: str, shown: Shown) -> str:
    drawing = {"title": shown.title, "executed": shown.executed, "planned": shown.planned, "units": shown.units}
    if name == "html" and shown.page is not None:
        return shown.page()
    if name == "html":
        return html.page(html.figure(shown.schedule, overview=True, **drawing))  # type: ignore[arg-type]
    if name == "svg":
        return svg.document(svg.figure(shown.schedule, **drawing))  # type: ignore[arg-type]
    if name == "csv":
        return pipelining_csv(shown.schedule)
    microseconds = 1.0 if shown.executed else chrome.MICROSECONDS_PER_TICK
    return json.dumps(chrome.trace_events(shown.schedule, timing=shown.executed, microseconds_per_tick=microseconds))


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} .. {ranks[-1]} ({len(ranks)})"


def _span(values: tuple[int, ...]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"
