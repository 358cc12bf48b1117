"""`fuse bench solver`: how short, how lean and how soon the schedules are that the solver finds.

Published instances come from a file and are solved with every seed; --split-backward solves each once more with
backwards that may be split, in the memory it took before; --heterogeneous adds uneven random problems, --scale two
large ones, with one seed each. Results are written after every row, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fuse.benchmarks.instances import read_instances, read_json
from fuse.benchmarks.measure import describe_machine, interleave, median_ms
from fuse.benchmarks.options import Row, add_json_option, write_rows
from fuse.benchmarks.schedule_calls import ScheduleCalls, large_actor
from fuse.benchmarks.solver.figure import draw
from fuse.commands.options import add_numbers, check_counts
from schedules import evaluate
from schedules.baselines import serial
from schedules.files import write_whole
from schedules.formats import schedule_to_text
from schedules.fused.greedy import greedy
from schedules.fused.solve import Solution, solve
from schedules.instances import Instance, actor_and_critic, heterogeneous

_SHAPE = (
    "actor_stages", "critic_stages", "actor_microbatches", "critic_microbatches", "actor_forward", "critic_forward",
    "actor_activation", "critic_activation",
)  # fmt: skip
_SCALES = ((32, 128), (64, 256))
"""Ranks and micro-batches."""
_NUM_EVALUATIONS = 50


@dataclass(frozen=True, slots=True)
class Case:
    """A problem to solve, for how long, and what others made of it: (makespan, memory) pairs in its units."""

    name: str
    instance: Instance
    time_limit_s: float
    published: tuple[float, float] | None = None
    target: tuple[float, float] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench solver`."""
    parser.add_argument("--instances", type=Path, metavar="FILE", help="published instances, as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this instance; may be repeated")
    parser.add_argument("--split-backward", action="store_true", help="solve each instance with split backwards too")
    parser.add_argument("--scale", action="store_true", help="32 ranks x 128, and 64 ranks x 256 in twice the time")
    add_numbers(
        parser,
        heterogeneous=(0, "uneven random problems"),
        time_limit=(60.0, "seconds per problem"),
        split_time_limit=(20.0, "for split backwards"),
        heterogeneous_time_limit=(25.0, "for uneven problems"),
        workers=(2, "threads"),
        seeds=(1, "solve each instance of the file with so many seeds"),
    )
    add_json_option(parser)
    parser.add_argument("--schedules", type=Path, metavar="DIR", help="keep each instance's best schedule in DIR")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw quality over time (SVG, PNG or PDF)")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="solve nothing: draw the rows of an earlier run")


def run(arguments: argparse.Namespace) -> int:
    """Solve every case with every seed, print a line each, write rows and best schedules, draw the figure."""
    check_counts(arguments, "seeds")
    if arguments.from_json is not None:
        if arguments.figure is None:
            raise ValueError("--from-json only draws: give --figure FILE too")
        draw(read_json(arguments.from_json, ["rows"], "results of this benchmark")["rows"], arguments.figure)
        return 0
    machine, evaluation_us = describe_machine(), evaluation_microseconds()
    rows: list[Row] = []
    for row in _rows(arguments):
        rows.append(row)
        print(_line(row), flush=True)
        write_rows(arguments, machine, vars(arguments), rows=rows, evaluation_us=evaluation_us)
    if not rows:
        raise ValueError("nothing to solve: give --instances FILE, --heterogeneous N or --scale")
    gaps = [row["makespan_gap"] for row in rows]
    print(f"makespan gap: median {statistics.median(gaps):.2%}, worst {max(gaps):.2%} over {len(rows)} runs")
    print(f"native evaluation of 4096 operations: {evaluation_us:.0f} us")
    if arguments.figure is not None:
        draw(rows, arguments.figure)
    return 0


def _rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Solve the published instances, the same with split backwards, uneven and large problems, in this order."""

    def solved(case: Case, seed: int = 0) -> Solution:
        return solve(case.instance.problem, time_limit_s=case.time_limit_s, num_workers=arguments.workers, seed=seed)

    others = []
    for entry in _entries(arguments):
        case = _published_case(entry, arguments.time_limit)
        solutions = []
        for seed in range(arguments.seeds):
            solutions.append(solved(case, seed))
            best = min(solutions, key=lambda solution: (solution.makespan, solution.peak_bytes))
            if arguments.schedules is not None:
                write_whole(arguments.schedules / f"{case.name}.schedule", schedule_to_text(best.schedule))
            yield _row(case, seed, solutions[-1])
        if arguments.split_backward:
            others.append(_split_case(entry, best.peak_bytes, arguments.split_time_limit))
    others += [
        Case(f"heterogeneous{seed}", Instance(heterogeneous(seed), 1), arguments.heterogeneous_time_limit)
        for seed in range(arguments.heterogeneous)
    ]
    if arguments.scale:
        others += [
            Case(f"{ranks} ranks, {count} micro-batches", large_actor(ranks, count), arguments.time_limit * (1 + index))
            for index, (ranks, count) in enumerate(_SCALES)
        ]
    for case in others:
        yield _row(case, 0, solved(case))


def evaluation_microseconds() -> float:
    """Median time of one native evaluation of a schedule with 4,096 operations."""
    calls = ScheduleCalls(16, 64)
    assert calls.num_ops == 4096
    return 1e3 * median_ms(interleave({"": partial(calls.evaluate, 1)}, _NUM_EVALUATIONS)[""])


def _entries(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.instances is None:
        return []
    entries = read_instances(arguments.instances, _SHAPE)
    names = [entry["name"] for entry in entries]
    for name in arguments.only:
        if name not in names:
            raise ValueError(f"{arguments.instances} has no instance {name!r}: it has {', '.join(names)}")
    return [entry for entry in entries if not arguments.only or entry["name"] in arguments.only]


def _published_case(entry: dict[str, Any], time_limit_s: float) -> Case:
    published, target = (
        (pair["makespan"], pair["peak_memory"]) if (pair := entry.get(key)) else None for key in ("published", "target")
    )
    return Case(entry["name"], _instance(entry), time_limit_s, published, target)


def _split_case(entry: dict[str, Any], limit_bytes: int, time_limit_s: float) -> Case:
    """The same instance with backwards that may be split, in the memory that whole ones took."""
    split = _instance(entry, split_backward=True)
    problem = replace(split.problem, memory_limit_bytes=(limit_bytes,) * split.problem.num_ranks)
    return Case(f"{entry['name']} split", Instance(problem, split.bytes_per_unit), time_limit_s)


def _instance(entry: dict[str, Any], split_backward: bool = False) -> Instance:
    return actor_and_critic(**{field: entry[field] for field in _SHAPE}, split_backward=split_backward)


def _row(case: Case, seed: int, solution: Solution) -> Row:
    """Memory is in the instance's units, `seconds` is when the best schedule was found."""
    units = case.instance.units
    history = [(step.seconds, step.makespan, units(step.peak_bytes)) for step in solution.history]
    reached = None
    if case.published is not None:
        makespan, memory = case.published
        reached = next((seconds for seconds, m, b in history if m <= makespan and b <= memory), None)
    met = None
    if case.target is not None:
        met = solution.makespan <= case.target[0] and units(solution.peak_bytes) <= case.target[1]
    return {
        "name": case.name,
        "seed": seed,
        "makespan": solution.makespan,
        "peak_memory": units(solution.peak_bytes),
        "makespan_lower_bound": solution.makespan_lower_bound,
        "memory_lower_bound": units(solution.memory_lower_bound),
        "seconds": history[-1][0],
        "published": case.published,
        "target": case.target,
        "seconds_to_published": reached,
        "status": str(solution.status),
        "found_by": solution.found_by,
        "makespan_gap": solution.makespan_gap,
        "target_met": met,
        "greedy_makespan": evaluate(greedy(case.instance.problem)).makespan,
        "serial_makespan": evaluate(serial(case.instance.problem)).makespan,
        "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "history": history,
    }


def _line(row: Row) -> str:
    line = (
        "{name} (seed {seed}): makespan {makespan} (bound {makespan_lower_bound}), memory {peak_memory:g} (bound "
        "{memory_lower_bound:g}), {status} after {seconds:.1f} s by {found_by}"
    )
    if row["seconds_to_published"] is not None:
        line += ", published quality after {seconds_to_published:.1f} s"
    target = {None: "", True: ", target met", False: ", target missed"}[row["target_met"]]
    return line.format_map(row) + target
