"""`fuse bench tail`: what is saved of whole updates, idea by idea, on recorded lengths; simulated.

An update is a rollout and the training on its samples, in one optimizer step an epoch. It goes stage by stage (none);
then, each on top of those before, samples move by the adaptive policy, engines draft, and free devices train what needs
no sample that is still generated: the critic's part of the first step, or complete groups of a policy without a critic.
Beside rollouts with drafts stands what no policy could do better than, told all lengths or not. --correlations adds
what siblings tell of lengths; `siblings.py` says how groups are made of traces that have none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median

from rich.console import Console

from fuse.benchmarks.options import Row, add_json_option, add_selection, plain_options, tell
from fuse.benchmarks.tail.siblings import held_against, in_groups, rollout_seconds, told
from fuse.commands.options import add_numbers, check_counts
from fuse.commands.output import write_json
from fuse.commands.simulated_case import Case, enough_room
from fuse.commands.simulated_speculation import SPECULATION, add_speculation_arguments, speculation_of
from fuse.commands.simulated_tail import (
    TailRow,
    add_sharing_argument,
    hidden_where_long_enough,
    mean_row,
    simulate_row,
)
from fuse.commands.tables import figures_table
from fuse.interstage.costs import PROFILES, CostModel
from fuse.interstage.length_trace import LengthTrace, read_length_trace
from fuse.interstage.migration import EngineLimits
from fuse.interstage.oracle import blind_bound_s, lower_bound_s
from fuse.interstage.policies import ADAPTIVE, NONE
from fuse.interstage.simulate import simulate

_OPTIONS = (
    "lengths", "sizes", "epochs", "trains", "costs", *SPECULATION, "iterations", "group_size",
    "micro_batch", "max_batch", "correlations", "stages", "tail_sharing",
)  # fmt: skip
_IDEAS = ("none", "adaptive", "drafts", "tail")
_TITLES = (
    *("lengths", "devices", "trains", "stages", "epochs", "none, s", "adaptive", "+ drafts", "+ tail", "hidden"),
    "idle/work",
)
_DRAFT_TITLES = ("lengths", "devices", "adaptive, s", "drafts, s", "gain", "of bounds", "blind bound", "bound")
_DRAFT_GAINS = ("gain", "gain_of_bounds", "blind_bound_gain", "bound_gain")
_SIBLING_TITLES = (
    *("lengths", "devices", "correlation", "off: pooled / siblings / history", "loss: siblings", "history"),
    *("pooled, s", "gain: siblings", "history"),
)
_CAPTION = (
    "update: seconds stage by stage, and how many times as fast; hidden: the part of what may train early that did; "
    "idle/work: how long whole replicas could idle in a rollout, over what that takes, were busy devices those of as "
    "few replicas as hold them"
)
_DRAFT_CAPTION = (
    "rollout: gain of drafts under adaptive, and of bounds, if no policy could do better without and with them that "
    "cannot tell which samples will be long; and the most that one could gain over adaptive, if it cannot, or if it can"
)

_SIBLING_CAPTION = (
    "off: of coverage; loss: of quantiles, over that by what all prompts have in common; gain: of rollouts, adaptive"
)


@dataclass(frozen=True, slots=True)
class _Size:
    """DEVICESxSAMPLES."""

    num_devices: int
    batch: int

    def __str__(self) -> str:
        return f"{self.num_devices} x {self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rollouts:
    """Mean seconds of a setting's rollouts; tails: by what trains early, and the stages of its pipelines."""

    none_s: float
    adaptive_s: float
    drafts_s: float
    bound_s: float
    blind_bound_s: float
    plain_blind_bound_s: float
    tails: dict[tuple[str, int], TailRow]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench tail`."""
    parser.add_argument("--lengths", type=Path, required=True, nargs="+", metavar="FILE.csv", help="length traces")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[_Size(8, 256), _Size(32, 512)], metavar="DEVICESxSAMPLES",
        help="engines, and samples of a rollout (default: 8x256 32x512)",
    )  # fmt: skip
    add_selection(parser, "--trains", ("critic", "groups"), "what trains early (default: critic groups)")
    parser.add_argument(
        "--costs", choices=tuple(PROFILES), default="llama-33b-8xh800", help="cost model (default: llama-33b-8xh800)"
    )
    add_numbers(
        parser,
        epochs=([1, 4], "passes over the samples of an update"),
        stages=([1], "devices of a pipeline that trains"),
        iterations=(1, "batches in turn; figures are means"),
        group_size=(8, "samples of a group, consecutive rows"),
        micro_batch=(4, "most samples of a micro-batch"),
        max_batch=(256, "samples that an engine runs at most"),
    )
    add_speculation_arguments(parser)
    parser.set_defaults(speculation="int8")
    parser.add_argument(
        "--correlations", type=float, nargs="+", default=[], metavar="R",
        help="of lengths in a group, to show what siblings and earlier epochs tell of them (default: none)",
    )  # fmt: skip
    add_sharing_argument(parser)
    parser.add_argument("--markdown", action="store_true", help="print tables for documents")
    add_json_option(parser, "options and rows")


def run(arguments: argparse.Namespace) -> int:
    """Simulate every setting, print a table of updates and one of rollouts with drafts, and write both."""
    check_counts(arguments, "epochs", "stages", "iterations", "group_size", "micro_batch", "max_batch")
    for one in arguments.correlations:
        if not 0 <= one <= 1:
            raise ValueError(f"--correlations has {one}: give numbers from 0 to 1")
    draft = speculation_of(arguments, None)
    if draft is None:
        raise ValueError("--speculation is off: drafts are one of the ideas; give another kind of them")
    costs = replace(PROFILES[arguments.costs], speculation=draft)
    updates: list[Row] = []
    drafts: list[Row] = []
    siblings: list[Row] = []
    tails: list[TailRow] = []
    for path in arguments.lengths:
        rows = arguments.iterations * max(size.batch for size in arguments.sizes)
        trace = read_length_trace(path, at_least=rows, prompt_tokens=128, remedy="lower --sizes or --iterations")
        for size in arguments.sizes:
            tell(f"{path.stem}, {size} ...")
            limits = enough_room(trace, arguments.max_batch, size.batch)
            cases = [
                Case(
                    trace=trace,
                    costs=costs,
                    limits=limits,
                    num_devices=size.num_devices,
                    start=iteration * size.batch,
                    batch=size.batch,
                )
                for iteration in range(arguments.iterations)
            ]
            found = _rollouts(arguments, cases)
            tails += found.tails.values()
            setting = {"lengths": path.stem, "devices": size.num_devices, "batch": size.batch}
            updates += [setting | row for row in _updates(arguments, size, found)]
            drafts.append(setting | _draft_row(found))
            plain = replace(costs, speculation=None)
            siblings += [
                setting | _sibling_row(arguments, trace, size, correlation, plain, limits)
                for correlation in arguments.correlations
            ]
    _print(arguments, updates, drafts)
    print(hidden_where_long_enough(tails))
    if siblings:
        cells = list(map(_sibling_cells, siblings))
        _print_table(arguments, "Lengths of groups", _SIBLING_TITLES, cells, _SIBLING_CAPTION)
    if arguments.json:
        options = plain_options(arguments, _OPTIONS)
        options |= {name: getattr(draft, name) for name in SPECULATION[1:]}
        options |= {"lengths": [path.stem for path in arguments.lengths], "sizes": list(map(str, arguments.sizes))}
        write_json(arguments.json, {"options": options, "rows": updates, "drafts": drafts, "siblings": siblings})
    return 0


def _rollouts(arguments: argparse.Namespace, cases: Sequence[Case]) -> _Rollouts:
    plain = [case.without_drafts() for case in cases]
    policies = [case.policy(ADAPTIVE) for case in cases]
    drafting = [simulate(case.rollout, policy) for case, policy in zip(cases, policies, strict=True)]
    tails = {}
    for kind, stages in product(arguments.trains, arguments.stages):
        asked = argparse.Namespace(
            tail_training=kind,
            epochs=1,
            group_size=arguments.group_size,
            micro_batch=arguments.micro_batch,
            train_token_s=None,
            train_stages=stages,
            tail_sharing=arguments.tail_sharing,
        )
        of_kind = [
            simulate_row(asked, ADAPTIVE, case.rollout, policy, result)[0]
            for case, policy, result in zip(cases, policies, drafting, strict=True)
        ]
        tails[kind, stages] = mean_row(of_kind)
    return _Rollouts(
        none_s=fmean(simulate(case.rollout, case.policy(NONE)).makespan_s for case in plain),
        adaptive_s=fmean(simulate(case.rollout, case.policy(ADAPTIVE)).makespan_s for case in plain),
        drafts_s=fmean(result.makespan_s for result in drafting),
        bound_s=fmean(lower_bound_s(case.rollout) for case in cases),
        blind_bound_s=fmean(blind_bound_s(case.rollout) for case in cases),
        plain_blind_bound_s=fmean(blind_bound_s(case.rollout) for case in plain),
        tails=tails,
    )


def _updates(arguments: argparse.Namespace, size: _Size, found: _Rollouts) -> Iterator[Row]:
    """A row of each kind and number of epochs."""
    for (kind, stages), tail in found.tails.items():
        hidden_s = tail.hidden_share * tail.first_step_s / size.num_devices
        for epochs in arguments.epochs:
            training_s = epochs * tail.training_s
            seconds = dict(
                zip(
                    _IDEAS,
                    (
                        found.none_s + training_s,
                        found.adaptive_s + training_s,
                        found.drafts_s + training_s,
                        tail.rollout_s + training_s - hidden_s,
                    ),
                    strict=True,
                )
            )
            yield {
                "trains": kind,
                "stages": stages,
                "epochs": epochs,
                "training_seconds": training_s,
                "simulated_seconds": seconds,
                "gains": {name: seconds["none"] / one for name, one in seconds.items()},
                "hidden_share": tail.hidden_share,
                "spare_share": tail.spare_share,
            }


def _draft_row(found: _Rollouts) -> Row:
    seconds = {name: one for name, one in asdict(found).items() if name.endswith("_s")}
    return seconds | {
        "gain": found.adaptive_s / found.drafts_s,
        "gain_of_bounds": found.plain_blind_bound_s / found.blind_bound_s,
        "blind_bound_gain": found.adaptive_s / found.blind_bound_s,
        "bound_gain": found.adaptive_s / found.bound_s,
    }


def _sibling_row(
    arguments: argparse.Namespace,
    trace: LengthTrace,
    size: _Size,
    correlation: float,
    costs: CostModel,
    limits: EngineLimits,
) -> Row:
    """Groups of two epochs: how well lengths of half of them are told, and rollouts of batches of the second epoch."""
    group_size = arguments.group_size
    grouped = in_groups(trace, 2 * group_size, correlation)
    num_groups, num_batch = len(grouped) // (2 * group_size), size.batch // group_size
    half = told(grouped, group_size, slice(0, num_groups // 2), limits.max_new_tokens)
    batches = [
        told(grouped, group_size, slice(first, first + num_batch), limits.max_new_tokens)
        for first in range(0, min(arguments.iterations * num_batch, num_groups - num_batch + 1), num_batch)
    ]
    of_each = [rollout_seconds(batch, costs, limits, size.num_devices) for batch in batches]
    seconds = {name: fmean(one[name] for one in of_each) for name in half.by_name}
    return {
        "correlation": correlation,
        "variance": half.siblings.variance,
        "batches": len(batches),
        "told": held_against(half, group_size),
        "simulated_seconds": seconds,
        "gains": {name: seconds["pooled"] / one for name, one in seconds.items()},
    }


def _print(arguments: argparse.Namespace, updates: Sequence[Row], drafts: Sequence[Row]) -> None:
    _print_table(arguments, "Updates", _TITLES, list(map(_update_cells, updates)), _CAPTION)
    medians = [
        (
            "median",
            str(size),
            "",
            "",
            *(f"{median(one[name] for one in of_size):.2f}" for name in _DRAFT_GAINS),
        )
        for size in arguments.sizes
        if (of_size := [one for one in drafts if (one["devices"], one["batch"]) == (size.num_devices, size.batch)])
    ]
    _print_table(
        arguments, "Rollouts with drafts", _DRAFT_TITLES, [*map(_draft_cells, drafts), *medians], _DRAFT_CAPTION
    )


def _update_cells(row: Row) -> tuple[str, ...]:
    return (
        *(row["lengths"], f"{row['devices']} x {row['batch']}", row["trains"], str(row["stages"])),
        str(row["epochs"]),
        f"{row['simulated_seconds']['none']:.4g}",
        *(f"{row['gains'][name]:.2f}" for name in _IDEAS[1:]),
        f"{row['hidden_share']:.0%}",
        f"{row['spare_share']:.2f}",
    )


def _draft_cells(row: Row) -> tuple[str, ...]:
    return (
        *(row["lengths"], f"{row['devices']} x {row['batch']}", f"{row['adaptive_s']:.4g}", f"{row['drafts_s']:.4g}"),
        *(f"{row[name]:.2f}" for name in _DRAFT_GAINS),
    )


def _sibling_cells(row: Row) -> tuple[str, ...]:
    by_name = row["told"]
    return (
        *(row["lengths"], f"{row['devices']} x {row['batch']}", f"{row['correlation']:g}"),
        " / ".join(f"{by_name[name]['off']:.2f}" for name in by_name),
        *(f"{by_name[name]['loss']:.2f}" for name in ("siblings", "history")),
        f"{row['simulated_seconds']['pooled']:.4g}",
        *(f"{row['gains'][name]:.3f}" for name in ("siblings", "history")),
    )


def _print_table(
    arguments: argparse.Namespace, title: str, titles: Sequence[str], cells: Sequence[Sequence[str]], caption: str
) -> None:
    if not arguments.markdown:
        Console().print(figures_table(list(titles), list(cells), title=title, caption=caption))
        return
    for line in (titles, ["---"] * len(titles), *cells):
        print(f"| {' | '.join(line)} |")
    print()


def _size(text: str) -> _Size:
    """Type of --sizes."""
    devices, _, batch = text.partition("x")
    if not (devices.isdecimal() and batch.isdecimal() and 0 < int(devices) <= 1 << 14 and 0 < int(batch) <= 1 << 20):
        raise argparse.ArgumentTypeError(f"{text} must be DEVICESxSAMPLES, as 8x256")
    return _Size(int(devices), int(batch))
