"""Replay recorded response lengths under migration policies: what would each save?

Each iteration takes the next rows of the trace as a batch; policies that learn from lengths learn from all other rows.
Several traces or maxima of tokens make a table of gains, a line each; of one the columns are explained below it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track

from fuse.commands.options import check_counts
from fuse.commands.output import output_file
from fuse.commands.simulated_case import Case, enough_room
from fuse.commands.simulated_speculation import (
    SpeculationRow,
    add_speculation_arguments,
    show_drafts,
    show_speculation,
    speculation_of,
)
from fuse.commands.simulated_tail import TailRow, add_tail_arguments, mean_row, show_tail, simulate_row
from fuse.commands.simulation_tables import show_costs, show_gains, show_policies
from fuse.interstage.costs import PROFILES, CostModel, costs_from_json, costs_to_json
from fuse.interstage.drawing import picture
from fuse.interstage.length_trace import MOST_TOKENS, LengthTrace, read_length_trace
from fuse.interstage.oracle import blind_bound_s, lower_bound_s
from fuse.interstage.policies import ADAPTIVE, KNOWN, NONE, POLICIES, THRESHOLD
from fuse.interstage.rollout import SimulationResult
from fuse.interstage.simulate import simulate
from schedules.export.svg import document
from schedules.reading import read_json

_TITLES = {NONE: "none (stage by stage)", THRESHOLD: "threshold (one migration)", ADAPTIVE: "adaptive"}
_MOST = {
    "devices": 1 << 14,
    "batch": 1 << 20,
    "iterations": 1 << 20,
    "max_tokens": 1 << 40,  # the trace's own lengths are bounded
    "prompt_tokens": MOST_TOKENS,
    "max_batch": 1 << 20,
    "kv_tokens": 1 << 60,
    **dict.fromkeys(("epochs", "group_size", "micro_batch"), 1 << 20),
}
"""By option, the largest value: beyond them arrays outgrow memory, or sums 64 bits."""
_OPTIONS = ("devices", "batch", "iterations", "max_tokens", "prompt_tokens", "costs", "max_batch", "kv_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse simulate`."""
    parser.add_argument(
        "--lengths", type=Path, required=True, nargs="+", metavar="FILE.csv",
        help="traces: column output_tokens, and if it has them prompt_tokens and prompt_id, equal for equal prompts",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, default=64, help="engines to simulate (default: 64)")
    parser.add_argument("--batch", type=int, default=512, help="samples per iteration (default: 512)")
    parser.add_argument("--iterations", type=int, default=1, help="batches in turn; figures are means (default: 1)")
    parser.add_argument(
        "--policy", type=_policies, default=POLICIES, metavar="NAMES",
        help=f"comma-separated, of {', '.join(POLICIES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, nargs="+", metavar="N", help="cut responses here (default: the trace's longest)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, help="where the trace has none (default: 128)")
    parser.add_argument(
        "--costs", default="llama-33b-8xh800", metavar="NAME|FILE.json",
        help=f"cost model: {', '.join(PROFILES)}, or fields of one as JSON (default: llama-33b-8xh800)",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=int, default=256, help="samples that an engine runs at most (default: 256)")
    parser.add_argument("--kv-tokens", type=int, help="KV capacity of an engine (default: enough for any batch)")
    parser.add_argument("--no-transfer", action="store_true", help="engines cannot send KV: migration recomputes it")
    add_speculation_arguments(parser)
    add_tail_arguments(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write rows and timelines to FILE")
    parser.add_argument("--svg", type=output_file, metavar="FILE", help="draw the first iteration under each policy")


def run(arguments: argparse.Namespace) -> int:
    """Simulate every policy on the same batches, print a table and timelines, and write them."""
    check_counts(arguments, *_MOST, most=_MOST)
    costs = _costs(arguments.costs)
    costs = replace(costs, speculation=speculation_of(arguments, costs.speculation))
    settings = [
        _Setting(path.stem, max_tokens, _trace(path, max_tokens, arguments))
        for path in arguments.lengths
        for max_tokens in arguments.max_tokens or [None]
    ]
    console = Console(highlight=False)
    outcomes = [_simulate(console, arguments, setting, costs) for setting in settings]
    rows = [row for outcome in outcomes for row in outcome.rows]
    show_costs(console, arguments.costs, replace(costs, speculation=None))
    show_drafts(console, costs)
    first = outcomes[0].results
    if len(outcomes) == 1:
        show_policies(console, rows, first | outcomes[0].tail_results)
    else:
        show_gains(console, [outcome.rows for outcome in outcomes])
    tails = [(one.lengths, row) for one, outcome in zip(settings, outcomes, strict=True) for row in outcome.tails]
    drafts = [(one.lengths, row) for one, outcome in zip(settings, outcomes, strict=True) for row in outcome.drafts]
    if drafts:
        show_speculation(console, drafts)
    if tails:
        show_tail(console, tails)
    if arguments.json:
        options = {name: getattr(arguments, name) for name in _OPTIONS} | {"can_transfer": not arguments.no_transfer}
        written = {"options": options, "costs": costs_to_json(costs), "rows": rows, "timelines": _timelines(first)}
        if drafts:
            written["speculation"] = [{"lengths": name} | asdict(row) | {"gain": row.gain} for name, row in drafts]
        if tails:
            written["tail_training"] = [{"lengths": lengths} | asdict(row) for lengths, row in tails]
        arguments.json.write_text(json.dumps(written) + "\n", encoding="utf-8")
    if arguments.svg:
        drawn = {_TITLES[name]: those[0] for name, those in first.items() if name != KNOWN}
        arguments.svg.write_text(document(picture(drawn)), encoding="utf-8")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """A trace, cut at `max_tokens` if that is given."""

    lengths: str
    max_tokens: int | None
    trace: LengthTrace


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """A setting's rows, and results by policy and iteration; tail_results: of the same with tail training.

    drafts: seconds without drafts beside those of the rows, where engines draft.
    """

    rows: list[dict[str, object]]
    results: dict[str, list[SimulationResult]]
    drafts: list[SpeculationRow] = field(default_factory=list)
    tails: list[TailRow] = field(default_factory=list)
    tail_results: dict[str, list[SimulationResult]] = field(default_factory=dict)


def _trace(path: Path, max_tokens: int | None, arguments: argparse.Namespace) -> LengthTrace:
    trace = read_length_trace(
        path,
        at_least=arguments.batch * arguments.iterations,
        prompt_tokens=arguments.prompt_tokens,
        remedy="lower --batch or --iterations, or give a longer file",
    )
    return trace if max_tokens is None else trace.cut(max_tokens)


def _simulate(console: Console, arguments: argparse.Namespace, setting: _Setting, costs: CostModel) -> _Outcome:
    limits = enough_room(setting.trace, arguments.max_batch, arguments.batch, arguments.kv_tokens)
    names = tuple(dict.fromkeys((NONE, *arguments.policy)))
    results: dict[str, list[SimulationResult]] = {name: [] for name in (*names, KNOWN)}
    bounds_s, blind_bounds_s = [], []
    plain_s: dict[str, list[float]] = {name: [] for name in names if costs.speculation is not None}
    tails: dict[str, list[TailRow]] = {name: [] for name in names if arguments.tail_training}
    tail_results: dict[str, list[SimulationResult]] = {f"{name}, tail training": [] for name in tails}
    for iteration in track(
        range(arguments.iterations), "simulating", console=console, transient=True, disable=not console.is_terminal
    ):
        case = Case(
            trace=setting.trace,
            costs=costs,
            limits=limits,
            num_devices=arguments.devices,
            start=iteration * arguments.batch,
            batch=arguments.batch,
            can_transfer=not arguments.no_transfer,
        )
        bounds_s.append(lower_bound_s(case.rollout))
        blind_bounds_s.append(blind_bound_s(case.rollout))
        played = {name: simulate(case.rollout, case.policy(name)) for name in (*names, KNOWN)}
        # Who knows all lengths can simulate every policy beforehand, and take the best.
        played[KNOWN] = min(played.values(), key=lambda result: result.makespan_s)
        for name, result in played.items():
            results[name].append(result)
        if plain_s:
            plain = case.without_drafts()
            for name, seconds in plain_s.items():
                seconds.append(simulate(plain.rollout, plain.policy(name)).makespan_s)
        for name, of_name in tails.items():
            row, tail = simulate_row(arguments, name, case.rollout, case.policy(name), results[name][-1])
            of_name.append(row)
            tail_results[f"{name}, tail training"].append(tail.rollout)
    rows = [_row(arguments, setting, name, results, fmean(bounds_s), fmean(blind_bounds_s)) for name in results]
    drafts = [
        SpeculationRow(
            policy=name, plain_s=fmean(seconds), seconds=fmean(result.makespan_s for result in results[name])
        )
        for name, seconds in plain_s.items()
    ]
    return _Outcome(rows, results, drafts, [mean_row(of_name) for of_name in tails.values()], tail_results)


def _row(
    arguments: argparse.Namespace,
    setting: _Setting,
    name: str,
    all_results: dict[str, list[SimulationResult]],
    bound_s: float,
    blind_bound_s: float,
) -> dict[str, object]:
    """Means over the iterations. Shares are parts of the seconds that bounds, or knowing all lengths, would save."""
    results = all_results[name]
    seconds, none_s, known_s = (
        fmean(result.makespan_s for result in those) for those in (results, all_results[NONE], all_results[KNOWN])
    )

    def share(best_s: float) -> float | None:
        return (none_s - seconds) / (none_s - best_s) if none_s > best_s else None

    return {
        "lengths": setting.lengths,
        "max_tokens": setting.max_tokens,
        "policy": name,
        "devices": arguments.devices,
        "batch": arguments.batch,
        "simulated_seconds": seconds,
        "generation_seconds": fmean(result.generation_s for result in results),
        "idle_share": fmean(result.idle_share for result in results),
        "migrations": fmean(result.num_migrations for result in results),
        "moved_bytes": fmean(result.moved_bytes for result in results),
        "inferences": fmean(result.num_inferences for result in results),
        "gain": none_s / seconds,
        "oracle_seconds": bound_s,
        "blind_bound_seconds": blind_bound_s,
        "known_seconds": known_s,
        "oracle_share": share(bound_s),
        "blind_share": share(blind_bound_s),
        "known_share": share(known_s),
    }


def _timelines(results: dict[str, list[SimulationResult]]) -> dict[str, list[list[tuple[str, float, float]]]]:
    """Per policy and device, (kind, start, end) in seconds of the first iteration."""
    return {
        name: [[(str(span.kind), span.start_s, span.end_s) for span in spans] for spans in those[0].timeline]
        for name, those in results.items()
    }


def _policies(text: str) -> tuple[str, ...]:
    """Type of --policy."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"unknown policy {name!r}: use {', '.join(POLICIES)}")
    return names


def _costs(name: str) -> CostModel:
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"--costs {name} is neither a file nor one of {', '.join(PROFILES)}")
    return costs_from_json(read_json(path, "the fields of a cost model"))
