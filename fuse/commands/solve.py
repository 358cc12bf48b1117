"""Find a fused pipeline schedule: the shortest one, then the one that needs least memory.

Takes a problem from a JSON file (as schedules.formats writes it), or from options: an actor over all ranks,
and copies of a critic in the opposite direction. Ctrl-C ends the search and keeps the best schedule found.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fuse.commands.options import add_numbers, option_name
from fuse.commands.output import output_file
from schedules.export.chart import number_text
from schedules.export.terminal import gantt
from schedules.formats import problem_from_json
from schedules.fused.incumbent import Improvement
from schedules.fused.solve import Objective, Solution, solution_to_json, solve
from schedules.instances import Instance, actor_and_critic, exact_units
from schedules.reading import read_json

_SHAPE = ("actor_stages", "critic_stages", "actor_microbatches", "critic_microbatches")
_NUM_TABLE_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fuse solve`."""
    parser.add_argument(
        "problem", nargs="?", type=Path, metavar="PROBLEM.json", help="the problem; or describe it below"
    )
    parser.add_argument("--actor-stages", type=int, metavar="N", help="stages of the actor, one per rank")
    parser.add_argument("--critic-stages", type=int, metavar="N", help="of each copy of the critic (default: as actor)")
    parser.add_argument("--actor-microbatches", type=int, metavar="N", help="micro-batches of the actor")
    parser.add_argument(
        "--critic-microbatches", type=int, metavar="N", help="of each copy (default: the actor's share)"
    )
    add_numbers(parser, "TICKS", actor_forward=(1, "of a stage"), critic_forward=(1, "of a stage"))
    held = "held per stage"
    add_numbers(parser, "UNITS", actor_activation=(1.0, held), critic_activation=(1.0, held))
    parser.add_argument("--split-backward", action="store_true", help="let backwards run as input and weight gradients")
    parser.add_argument(
        "--memory-limit", type=float, metavar="UNITS", help="of every rank (default: the file's, or none)"
    )
    parser.add_argument("--objective", choices=[str(o) for o in Objective], default=str(Objective.MAKESPAN_THEN_MEMORY))
    add_numbers(parser, time_limit=(30.0, "seconds"), workers=(2, "threads"), seed=(0, "of the search"))
    parser.add_argument("--out", "--json", type=output_file, metavar="FILE", help="write the solution to FILE")


def run(arguments: argparse.Namespace) -> int:
    """Solve, show the way there and the schedule found, and write it."""
    instance = _with_memory_limit(_instance(arguments), arguments.memory_limit)
    console = Console(highlight=False)
    with _stopped_by_interrupt() as stop, _ProgressTable(console, instance) as table:
        solution = solve(
            instance.problem,
            time_limit_s=arguments.time_limit,
            num_workers=arguments.workers,
            seed=arguments.seed,
            objective=Objective(arguments.objective),
            progress=table.add,
            stop=stop,
        )
    _show(console, instance, solution)
    if arguments.out:
        arguments.out.write_text(json.dumps(solution_to_json(solution)) + "\n", encoding="utf-8")
    return 0


def _instance(arguments: argparse.Namespace) -> Instance:
    described = {name: getattr(arguments, name) for name in _SHAPE if getattr(arguments, name) is not None}
    if arguments.problem is not None:
        if described:
            option = option_name(next(iter(described)))
            raise ValueError(f"{option} describes a problem and {arguments.problem} is one: give one of them")
        return Instance(problem_from_json(read_json(arguments.problem, "a problem as schedules.formats writes it")), 1)
    for name in ("actor_stages", "actor_microbatches"):
        if name not in described:
            raise ValueError(f"{option_name(name)} is missing: give it, or a PROBLEM.json")
    actor_stages, actor_microbatches = described["actor_stages"], described["actor_microbatches"]
    critic_stages = described.get("critic_stages", actor_stages)
    copies = max(1, actor_stages // critic_stages) if critic_stages > 0 else 1
    return actor_and_critic(
        actor_stages=actor_stages,
        critic_stages=critic_stages,
        actor_microbatches=actor_microbatches,
        critic_microbatches=described.get("critic_microbatches", max(1, actor_microbatches // copies)),
        actor_forward=arguments.actor_forward,
        critic_forward=arguments.critic_forward,
        actor_activation=arguments.actor_activation,
        critic_activation=arguments.critic_activation,
        split_backward=arguments.split_backward,
    )


def _with_memory_limit(instance: Instance, limit: float | None) -> Instance:
    if limit is None:
        return instance
    limit_bytes = int(exact_units("--memory-limit", limit) * instance.bytes_per_unit)
    limits = (limit_bytes,) * instance.problem.num_ranks
    return Instance(replace(instance.problem, memory_limit_bytes=limits), instance.bytes_per_unit)


class _ProgressTable:
    """The latest improvements: live on a terminal, a line each elsewhere."""

    def __init__(self, console: Console, instance: Instance) -> None:
        self._console = console
        self._instance = instance
        self._improvements: list[Improvement] = []
        self._live = Live(console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> _ProgressTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def add(self, improvement: Improvement) -> None:
        self._improvements.append(improvement)
        memory = number_text(self._instance.units(improvement.peak_bytes))
        if not self._console.is_terminal:
            row = f"{improvement.seconds:7.1f} s  makespan {improvement.makespan}  memory {memory}"
            self._console.print(f"{row}  {improvement.found_by}")
            return
        table = Table("seconds", "makespan", "memory", "found by")
        for shown in self._improvements[-_NUM_TABLE_ROWS:]:
            units = number_text(self._instance.units(shown.peak_bytes))
            table.add_row(f"{shown.seconds:.1f}", str(shown.makespan), units, shown.found_by)
        self._live.update(table)


@contextmanager
def _stopped_by_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one interrupts as usual."""
    stop = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def set_stop(signum: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, set_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(console: Console, instance: Instance, solution: Solution) -> None:
    console.print(gantt(solution.schedule, max(20, console.width - 16)), soft_wrap=True, markup=False)
    table = Table("", "found", "bound", "gap")
    makespan, memory = solution.makespan_lower_bound, instance.units(solution.memory_lower_bound)
    table.add_row("makespan", str(solution.makespan), str(makespan), f"{solution.makespan_gap:.2%}")
    table.add_row(
        "memory", number_text(instance.units(solution.peak_bytes)), number_text(memory), f"{solution.memory_gap:.2%}"
    )
    console.print(table)
    console.print(f"{solution.status}: found by {solution.found_by} after {solution.history[-1].seconds:.1f} s")
