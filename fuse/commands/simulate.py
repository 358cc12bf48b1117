"""Replay recorded response lengths under migration policies: what would each save?

Each iteration takes the next rows of the trace as a batch; policies that learn from lengths learn from all other rows.
In the table, known is the adaptive policy told all lengths beforehand, and no policy whatever beats the bound; gain is
over none, and its part of the bound's is given; moves and GB are what migrations carried.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fuse.commands.results import output_file
from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES, CostModel, costs_from_json, costs_to_json
from fuse.interstage.lengths import KnownLengths, LengthModel, Observation, learn
from fuse.interstage.migration import EngineLimits, Policy, StageByStage
from fuse.interstage.oracle import lower_bound_s
from fuse.interstage.rollout import Rollout, SimulationResult
from fuse.interstage.simulate import simulate
from fuse.interstage.timeline import chart
from fuse.interstage.tuning import LengthHistory, tune_threshold

Ints = NDArray[np.int64]

NONE, THRESHOLD, ADAPTIVE, KNOWN = "none", "threshold", "adaptive", "known"
POLICIES = (NONE, THRESHOLD, ADAPTIVE)
_OPTIONS = ("devices", "batch", "iterations", "max_tokens", "prompt_tokens", "costs", "max_batch", "kv_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse simulate`."""
    parser.add_argument(
        "--lengths", type=Path, required=True, metavar="FILE.csv",
        help="the trace: column output_tokens, and if it has them prompt_tokens and prompt_id, equal for equal prompts",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, default=64, help="engines to simulate (default: 64)")
    parser.add_argument("--batch", type=int, default=512, help="samples per iteration (default: 512)")
    parser.add_argument("--iterations", type=int, default=1, help="batches in turn; figures are means (default: 1)")
    parser.add_argument(
        "--policy", type=_policies, default=POLICIES, metavar="NAMES",
        help=f"comma-separated, of {', '.join(POLICIES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="cut responses here (default: the trace's longest)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="where the trace has none (default: 128)")
    parser.add_argument(
        "--costs", default="llama-33b-8xh800", metavar="NAME|FILE.json",
        help=f"cost model: {', '.join(PROFILES)}, or fields of one as JSON (default: llama-33b-8xh800)",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=int, default=256, help="samples that an engine runs at most (default: 256)")
    parser.add_argument("--kv-tokens", type=int, help="KV capacity of an engine (default: enough for any batch)")
    parser.add_argument("--no-transfer", action="store_true", help="engines cannot send KV: migration recomputes it")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write rows and timelines to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Simulate every policy on the same batches, print a table and timelines, and write them."""
    trace = read_trace(arguments.lengths, arguments.prompt_tokens)
    for name in ("devices", "batch", "iterations", "prompt_tokens", "max_batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it must be at least 1")
    if arguments.max_tokens is not None:
        trace = trace.cut(arguments.max_tokens)
    if len(trace) < arguments.batch * arguments.iterations:
        raise ValueError(
            f"{arguments.lengths} has {len(trace)} rows, fewer than {arguments.iterations} batches of "
            f"{arguments.batch}: lower --batch or --iterations"
        )
    costs, limits = _costs(arguments.costs), _limits(arguments, trace)
    names = tuple(dict.fromkeys((NONE, *arguments.policy, KNOWN)))
    console = Console(highlight=False)
    results: dict[str, list[SimulationResult]] = {name: [] for name in names}
    bounds_s = []
    for iteration in track(
        range(arguments.iterations), "simulating", console=console, transient=True, disable=not console.is_terminal
    ):
        case = _Case(arguments, trace, costs, limits, iteration * arguments.batch)
        bounds_s.append(lower_bound_s(case.rollout))
        for name in names:
            results[name].append(simulate(case.rollout, case.policy(name)))
    rows = [_row(arguments, name, results[name], results, fmean(bounds_s)) for name in names]
    _show(console, rows, results, fmean(bounds_s))
    if arguments.json:
        options = {name: getattr(arguments, name) for name in _OPTIONS} | {"can_transfer": not arguments.no_transfer}
        written = {"options": options, "costs": costs_to_json(costs), "rows": rows, "timelines": _timelines(results)}
        arguments.json.write_text(json.dumps(written) + "\n", encoding="utf-8")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Recorded lengths [rows], and a key per row that is equal for equal prompts, or None."""

    prompt_tokens: Ints
    response_tokens: Ints
    prompts: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.response_tokens)

    def cut(self, max_tokens: int) -> Trace:
        """With responses of at most `max_tokens`."""
        if max_tokens < 1:
            raise ValueError(f"--max-tokens is {max_tokens}: it must be at least 1")
        return Trace(self.prompt_tokens, np.minimum(self.response_tokens, max_tokens), self.prompts)


def read_trace(path: Path, prompt_tokens: int) -> Trace:
    """Read a CSV trace; rows without prompt_tokens get the ones given, and no length is below one token.

    Raises:
        ValueError: no column output_tokens, no rows, or a length that is no number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "output_tokens" not in columns:
            raise ValueError(f"{path} has no column output_tokens: its columns are {', '.join(columns) or 'none'}")
        prompts, responses, keys = [], [], []
        for row in reader:
            responses.append(_length(path, reader.line_num, "output_tokens", row["output_tokens"]))
            prompts.append(
                _length(path, reader.line_num, "prompt_tokens", row["prompt_tokens"])
                if "prompt_tokens" in columns
                else prompt_tokens
            )
            keys.append(row.get("prompt_id"))
    if not responses:
        raise ValueError(f"{path} has no rows: a trace has one per response")
    return Trace(np.array(prompts, dtype=np.int64), np.array(responses, dtype=np.int64), tuple(keys))


class _Case:
    """One batch of the trace, and what the other rows teach."""

    def __init__(
        self, arguments: argparse.Namespace, trace: Trace, costs: CostModel, limits: EngineLimits, start: int
    ) -> None:
        batch = slice(start, start + arguments.batch)
        self._costs, self._limits, self._can_transfer = costs, limits, not arguments.no_transfer
        self._others = np.delete(np.arange(len(trace)), batch)
        self._trace = trace
        self._prompts = dict(enumerate(trace.prompts[batch]))
        self.rollout = Rollout(
            prompt_tokens=trace.prompt_tokens[batch],
            response_tokens=trace.response_tokens[batch],
            num_devices=arguments.devices,
            costs=costs,
            limits=limits,
            can_transfer=self._can_transfer,
        )

    def policy(self, name: str) -> Policy:
        make: dict[str, Callable[[], Policy]] = {
            NONE: StageByStage,
            THRESHOLD: self._threshold,
            ADAPTIVE: lambda: Adaptive(self._costs, self._model().for_samples(self._prompts), self._can_transfer),
            KNOWN: lambda: Adaptive(self._costs, KnownLengths(self.rollout.response_tokens), self._can_transfer),
        }
        return make[name]()

    def _threshold(self) -> Policy:
        source = self._others if len(self._others) else np.arange(len(self._trace))
        history = LengthHistory(
            prompt_tokens=self._trace.prompt_tokens[source], response_tokens=self._trace.response_tokens[source]
        )
        return tune_threshold(
            history,
            num_samples=self.rollout.num_samples,
            num_devices=self.rollout.num_devices,
            costs=self._costs,
            limits=self._limits,
            can_transfer=self._can_transfer,
        )

    def _model(self) -> LengthModel:
        trace = self._trace
        observations = (Observation(int(trace.response_tokens[row]), prompt=trace.prompts[row]) for row in self._others)
        return learn(observations, self._limits.max_new_tokens)


def _row(
    arguments: argparse.Namespace,
    name: str,
    results: Sequence[SimulationResult],
    all_results: dict[str, list[SimulationResult]],
    bound_s: float,
) -> dict[str, object]:
    """Means over the iterations. Shares are parts of the seconds that the bound, or knowing all lengths, would save."""
    seconds, none_s, known_s = (
        fmean(result.makespan_s for result in those) for those in (results, all_results[NONE], all_results[KNOWN])
    )
    saved_s = none_s - seconds
    return {
        "lengths": arguments.lengths.stem,
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
        "known_seconds": known_s,
        "oracle_share": saved_s / (none_s - bound_s) if none_s > bound_s else None,
        "known_share": saved_s / (none_s - known_s) if none_s > known_s else None,
    }


def _show(
    console: Console, rows: Sequence[dict[str, object]], results: dict[str, list[SimulationResult]], bound_s: float
) -> None:
    table = Table("policy", "seconds", "generating", "gain", "of bound", "idle", "moves", "GB")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(str(row["policy"]), *_cells(row))
    table.add_row("bound", f"{bound_s:.4g}", "", f"{_number(rows[0]['simulated_seconds']) / bound_s:.3f}x", "100%")
    end_s = max(those[0].makespan_s for those in results.values())
    for name, those in results.items():
        console.print(f"\n{name}", markup=False)
        console.print(chart(those[0], width=max(20, console.width - 8), end_s=end_s), soft_wrap=True, markup=False)
    console.print()
    console.print(table)


def _cells(row: dict[str, object]) -> Iterator[str]:
    yield f"{row['simulated_seconds']:.4g}"
    yield f"{row['generation_seconds']:.4g}"
    yield f"{row['gain']:.3f}x"
    yield "-" if row["oracle_share"] is None else f"{row['oracle_share']:.0%}"
    yield f"{row['idle_share']:.1%}"
    yield f"{row['migrations']:.0f}"
    yield f"{_number(row['moved_bytes']) / 1e9:.3g}"


def _number(value: object) -> float:
    assert isinstance(value, float | int)
    return float(value)


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


def _length(path: Path, line: int, column: str, text: str | None) -> int:
    try:
        return max(1, int(text or ""))
    except ValueError:
        raise ValueError(f"{path} line {line}: {column} is {text!r}, not a whole number") from None


def _costs(name: str) -> CostModel:
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"--costs {name} is neither a file nor one of {', '.join(PROFILES)}")
    try:
        return costs_from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _limits(arguments: argparse.Namespace, trace: Trace) -> EngineLimits:
    """Responses may reach the longest of the trace, or --max-tokens where that cuts some."""
    max_new_tokens = int(trace.response_tokens.max())
    enough = (int(trace.prompt_tokens.max()) + max_new_tokens) * max(arguments.max_batch, arguments.batch)
    return EngineLimits(
        max_batch=arguments.max_batch,
        kv_capacity_tokens=enough if arguments.kv_tokens is None else arguments.kv_tokens,
        max_new_tokens=max_new_tokens,
    )
