"""`fuse bench solver`: how short, how lean and how soon the schedules are that the solver finds.

Published instances come from a file; --heterogeneous adds uneven random problems, --scale two large ones, and
--split-backward solves each published instance a second time with backwards that may be split.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fuse.benchmarks.measure import describe_machine, write_json
from schedules import Problem, _native, evaluate
from schedules.baselines import serial
from schedules.fused.compiled import compile_problem
from schedules.fused.greedy import greedy
from schedules.fused.solve import Solution, solve
from schedules.instances import Instance, actor_and_critic, heterogeneous

_SHAPE = (
    "actor_stages",
    "critic_stages",
    "actor_microbatches",
    "critic_microbatches",
    "actor_forward",
    "critic_forward",
    "actor_activation",
    "critic_activation",
)
_SCALES = {
    "32 ranks, 128 micro-batches": (32, 32, 128, 128, 2, 1, 1.64, 1),
    "64 ranks, 256 micro-batches": (64, 64, 256, 256, 2, 1, 1.64, 1),
}
_NUM_EVALUATIONS = 50


@dataclass(frozen=True, slots=True)
class Case:
    """A problem to solve, and what others made of it: (makespan, memory) pairs in the instance's units."""

    name: str
    instance: Instance
    published: tuple[float, float] | None = None
    target: tuple[float, float] | None = None


class Row(TypedDict):
    """One solved case. Memory is in the instance's units, `seconds` is when the best schedule was found."""

    name: str
    seed: int
    makespan: int
    peak_memory: float
    makespan_lower_bound: int
    memory_lower_bound: float
    seconds: float
    seconds_to_published: float | None
    status: str
    found_by: str
    makespan_gap: float
    target_met: bool | None
    greedy_makespan: int
    serial_makespan: int
    peak_process_bytes: int
    history: list[tuple[float, int, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse bench solver`."""
    parser.add_argument("--instances", type=Path, metavar="FILE", help="published instances, as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this instance; may be repeated")
    parser.add_argument("--split-backward", action="store_true", help="solve each instance with split backwards too")
    parser.add_argument("--heterogeneous", type=int, default=0, metavar="N", help="uneven random problems (default: 0)")
    parser.add_argument("--scale", action="store_true", help="32 ranks x 128, and 64 ranks x 256 in twice the time")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds per problem (default: 60)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default: 2)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="solve each problem with N seeds (default: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write machine, options and rows to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Solve every case with every seed, print a line each, and write them to `arguments.json`."""
    if arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}: it must be at least 1")
    cases = list(_cases(arguments))
    if not cases:
        raise ValueError("nothing to solve: give --instances FILE, --heterogeneous N or --scale")
    rows = []
    for case, time_limit_s in cases:
        for seed in range(arguments.seeds):
            solution = solve(case.instance.problem, time_limit_s=time_limit_s, num_workers=arguments.workers, seed=seed)
            rows.append(_row(case, seed, solution))
            print(_line(rows[-1]), flush=True)
    gaps = [row["makespan_gap"] for row in rows]
    print(f"makespan gap: median {statistics.median(gaps):.2%}, worst {max(gaps):.2%} over {len(rows)} runs")
    evaluation_us = evaluation_microseconds()
    print(f"native evaluation of 4096 operations: {evaluation_us:.0f} us")
    if arguments.json:
        results = {"evaluation_us": evaluation_us, "rows": rows}
        write_json(arguments.json, {"machine": describe_machine(), "options": _plain(arguments), **results})
    return 0


def evaluation_microseconds() -> float:
    """Median time of one native evaluation of a schedule with 4,096 operations."""
    instance = _instance((16, 16, 64, 64, 2, 1, 1.64, 1))
    compiled = compile_problem(instance.problem, split=False)
    assert len(compiled.ops) == 4096
    orders = compiled.orders(greedy(instance.problem))
    start, peak_bytes = np.zeros(len(compiled.ops), np.int32), np.zeros(instance.problem.num_ranks, np.int64)
    seconds = []
    for _ in range(_NUM_EVALUATIONS):
        begin_s = time.perf_counter()
        _native.evaluate(compiled.graph, *orders, start, peak_bytes)
        seconds.append(time.perf_counter() - begin_s)
    return 1e6 * statistics.median(seconds)


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[Case, float]]:
    if arguments.instances is not None:
        entries = json.loads(arguments.instances.read_text(encoding="utf-8"))["instances"]
        names = [entry["name"] for entry in entries]
        for name in arguments.only:
            if name not in names:
                raise ValueError(f"{arguments.instances} has no instance {name!r}: it has {', '.join(names)}")
        for entry in entries:
            if arguments.only and entry["name"] not in arguments.only:
                continue
            shape = {field: entry[field] for field in _SHAPE}
            published, target = (_pair(entry.get(key)) for key in ("published", "target"))
            yield Case(entry["name"], actor_and_critic(**shape), published, target), arguments.time_limit
            if arguments.split_backward:
                split = actor_and_critic(**shape, split_backward=True)
                yield Case(f"{entry['name']} split", split), arguments.time_limit
    for seed in range(arguments.heterogeneous):
        yield Case(f"heterogeneous{seed}", Instance(heterogeneous(seed), 1)), arguments.time_limit
    if arguments.scale:
        for index, (name, values) in enumerate(_SCALES.items()):
            yield Case(name, _instance(values)), arguments.time_limit * (1 + index)


def _instance(values: tuple[float, ...]) -> Instance:
    shape: dict[str, Any] = dict(zip(_SHAPE, values, strict=True))
    return actor_and_critic(**shape)


def _pair(value: dict[str, float] | None) -> tuple[float, float] | None:
    return None if value is None else (value["makespan"], value["peak_memory"])


def _row(case: Case, seed: int, solution: Solution) -> Row:
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
        "seconds_to_published": reached,
        "status": str(solution.status),
        "found_by": solution.found_by,
        "makespan_gap": solution.makespan_gap,
        "target_met": met,
        "greedy_makespan": evaluate(greedy(case.instance.problem)).makespan,
        "serial_makespan": _serial_makespan(case.instance.problem),
        "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "history": history,
    }


def _serial_makespan(problem: Problem) -> int:
    return evaluate(serial(problem)).makespan


def _line(row: Row) -> str:
    published = row["seconds_to_published"]
    reached = "" if published is None else f", published quality after {published:.1f} s"
    target = {None: "", True: ", target met", False: ", target missed"}[row["target_met"]]
    return (
        f"{row['name']} (seed {row['seed']}): makespan {row['makespan']} (bound {row['makespan_lower_bound']}), "
        f"memory {row['peak_memory']:g} (bound {row['memory_lower_bound']:g}), {row['status']} after "
        f"{row['seconds']:.1f} s by {row['found_by']}{reached}{target}"
    )


def _plain(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
