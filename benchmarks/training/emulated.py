"""Schedules executed on more ranks than this machine has cores: operations are waits of calibrated length.

Messages, their order and the executor are real; computing and the size of messages are not. Every figure is labelled
emulated. Imports little, as each rank is a process of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fuse.benchmarks.instances import read_instances
from fuse.benchmarks.options import Row
from fuse.benchmarks.peer_process import PeerProcess
from fuse.benchmarks.training.comparison import Comparison, compare
from fuse.benchmarks.training.emulated_stage import EmulatedStage, measure_oversleep
from fuse.intrastage.communication import PipelineCommunicators, connect, open_pipelines, serve_store
from fuse.intrastage.executor import execute
from fuse.intrastage.planned_times import times_of
from fuse.intrastage.program import program_of
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch
from fuse.trace import SpanRecorder
from schedules import Kind, Pipeline, Problem, Schedule, evaluate
from schedules.baselines.serial import serial
from schedules.instances import actor_and_critic

_SHAPE = (
    "actor_stages", "critic_stages", "actor_microbatches", "critic_microbatches", "actor_forward", "critic_forward",
)  # fmt: skip
_SHARES = ("bubble_planned", "bubble_executed", "slowdown", "overhead_share", "transfer_share")
_HOST = "127.0.0.1"
_TIMEOUT_S = 120.0


def emulate_instances(
    path: Path | None, num_ranks: int, *, operation_s: float, repeats: int, solve_s: float
) -> Iterator[Row]:
    """Solve and execute the instances of `num_ranks` ranks in a file, or one of the same kind.

    operation_s: what the shortest operation takes. executed_ms and the shares are of the run with the median makespan,
    see `Comparison`.

    Raises:
        ValueError: the file has no instance of so many ranks.
    """
    from schedules.fused.solve import Objective, solve  # imports OR-tools, which ranks do without

    problems = _problems(path, num_ranks)
    with EmulatedWorld.start(num_ranks) as world:
        for name, problem in problems:
            solution = solve(problem, time_limit_s=solve_s, objective=Objective.MAKESPAN)
            tick_s = operation_s / min(problem.ticks(op) for _, op in solution.schedule.ops())
            run = _middle([world.execute(solution.schedule, tick_s) for _ in range(repeats)])
            yield {
                "setting": f"emulated {name}",
                "emulated": True,
                "num_ranks": num_ranks,
                "num_micro_batches": sum(pipeline.num_micro_batches for pipeline in problem.pipelines),
                "tick_ms": 1e3 * tick_s,
                "makespan_ticks": solution.makespan,
                "makespan_lower_bound_ticks": solution.makespan_lower_bound,
                "serial_planned_ms": 1e3 * tick_s * evaluate(serial(problem)).makespan,
                "planned_ms": 1e3 * run.makespan_planned_s,
                "executed_ms": 1e3 * run.makespan_executed_s,
                "beyond_plan": run.makespan_executed_s / run.makespan_planned_s - 1,
                **{name: getattr(run, name) for name in _SHARES},
            }


def _middle(runs: Sequence[Comparison]) -> Comparison:
    """The run whose executed makespan is the median one; the shorter of the middle two."""
    return sorted(runs, key=lambda run: run.makespan_executed_s)[(len(runs) - 1) // 2]


def _problems(path: Path | None, num_ranks: int) -> list[tuple[str, Problem]]:
    if path is None:
        sizes = (num_ranks, num_ranks, num_ranks, num_ranks, 2, 1)
        entries: list[dict[str, Any]] = [{"name": f"{num_ranks} ranks", **dict(zip(_SHAPE, sizes, strict=True))}]
    else:
        entries = read_instances(path, _SHAPE)
    fitting = [entry for entry in entries if entry["actor_stages"] == num_ranks]
    if not fitting:
        raise ValueError(
            f"{path} has no instance of {num_ranks} ranks: choose --emulate from "
            f"{sorted({entry['actor_stages'] for entry in entries})}"
        )
    return [(entry["name"], actor_and_critic(**{field: entry[field] for field in _SHAPE}).problem) for entry in fitting]


class EmulatedWorld:
    """One process per rank, which execute schedules together."""

    def __init__(self, ranks: Sequence[PeerProcess]) -> None:
        self._ranks = ranks

    @classmethod
    @contextmanager
    def start(cls, num_ranks: int) -> Iterator[EmulatedWorld]:
        """The processes are gone on exit, whatever happened."""
        store = serve_store(_HOST, _TIMEOUT_S)
        # Forked from a process of one thread, which has imported this module once for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ExitStack() as stack:
            ranks = []
            for rank in range(num_ranks):
                name, arguments = f"emulated rank {rank}", (rank, num_ranks, store.port)
                peer = PeerProcess(name, _serve, *arguments, context=context, closing_s=0)
                ranks.append(stack.enter_context(peer))
            yield cls(ranks)

    def execute(self, schedule: Schedule, tick_s: float) -> Comparison:
        """Execute a schedule with operations of `tick_s` seconds per tick, and compare that with its plan.

        Raises:
            CommunicationError: a rank heard nothing of another for long.
            RunError: a rank's process has ended.
        """
        seconds = {op: tick_s * schedule.problem.ticks(op) for _, op in schedule.ops()}
        transfer_s = tuple(tick_s * pipeline.transfer_ticks for pipeline in schedule.problem.pipelines)
        program = program_of(schedule)
        for rank in self._ranks:
            rank.send((program, tick_s))
        spans = [rank.answer() for rank in self._ranks]
        return compare(schedule, times_of(schedule, seconds, transfer_s), spans)


def _serve(connection: Connection, rank: int, num_ranks: int, port: int) -> None:
    """A rank's process: answers programs with spans until it is killed."""
    torch.set_num_threads(1)
    connect(rank, num_ranks, _HOST, port, torch.device("cpu"), _TIMEOUT_S)
    oversleep_s = measure_oversleep()
    opened: dict[tuple[str, tuple[int, ...]], PipelineCommunicators] = {}
    recorder = SpanRecorder()
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    micro_batch = MicroBatch(input_ids=nothing, head_index=nothing[0], targets=None)
    while True:
        program, tick_s = connection.recv()
        pipelines = program.problem.pipelines
        for pipeline in pipelines:
            key = pipeline.name, pipeline.ranks
            if key not in opened:
                (opened[key],) = open_pipelines([key], _TIMEOUT_S)
        stages: dict[tuple[int, int], Stage] = {
            (number, stage): EmulatedStage(
                _seconds(pipeline, stage, tick_s),
                is_first=stage == 0,
                is_last=stage == pipeline.num_stages - 1,
                oversleep_s=oversleep_s,
            )
            for number, pipeline in enumerate(pipelines)
            for stage, owner in enumerate(pipeline.ranks)
            if owner == rank
        }
        micro_batches = [[micro_batch] * pipeline.num_micro_batches for pipeline in pipelines]
        communicators = [opened[pipeline.name, pipeline.ranks] for pipeline in pipelines]
        dist.barrier()
        execute(program, rank, stages, micro_batches, communicators, recorder)
        connection.send(recorder.drain())


def _seconds(pipeline: Pipeline, stage: int, tick_s: float) -> dict[Kind, float]:
    kinds = list(Kind) if pipeline.can_split else [Kind.F, Kind.B]
    return {kind: tick_s * pipeline.ticks(kind, stage) for kind in kinds}
