"""A problem's operations as the arrays that native code works on, and schedules to and from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from schedules import _native
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.walk import Channel, channel_from, channel_into

MAX_TICKS = 2**30

_KIND_CODE = {Kind.F: 0, Kind.B: 1, Kind.I: 1, Kind.W: 2}


@dataclass(frozen=True, slots=True)
class Compiled:
    """`ops[x]` is node x of the native graph: chain after chain, in micro-batch order within a chain."""

    problem: Problem
    ops: tuple[Op, ...]
    node_of: dict[Op, int]
    graph: _native.Graph

    def orders(self, schedule: Schedule) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Nodes rank after rank, and each rank's offset into them. The schedule has exactly these operations."""
        nodes = np.array([self.node_of[op] for _, op in schedule.ops()], dtype=np.int32)
        assert len(nodes) == len(self.ops), "schedule and compiled problem have other operations"
        offsets = np.array([0, *accumulate(map(len, schedule.ranks))], dtype=np.int32)
        return nodes, offsets

    def schedule(self, orders: Sequence[Sequence[int]]) -> Schedule:
        """The schedule that native code returned."""
        return Schedule(self.problem, tuple(tuple(self.ops[node] for node in order) for order in orders))

    def evaluate(self, schedule: Schedule) -> tuple[int, NDArray[np.int32], NDArray[np.int64]]:
        """Makespan, start of every node (ticks) and peak of every rank (bytes): what `schedules.evaluate` says, faster.

        Raises:
            ValueError: the schedule deadlocks.
        """
        start = np.zeros(len(self.ops), np.int32)
        peak_bytes = np.zeros(self.problem.num_ranks, np.int64)
        makespan = _native.evaluate(self.graph, *self.orders(schedule), start, peak_bytes)
        return makespan, start, peak_bytes


def compile_problem(problem: Problem, *, split: bool) -> Compiled:
    """All operations, with backwards as I and W in the pipelines that can split if `split`, else as B.

    Raises:
        ValueError: the durations add up to more than native code counts.
    """
    return compile_operations(
        problem,
        {
            Op(number, stage, micro_batch, kind)
            for number, pipeline in enumerate(problem.pipelines)
            for stage in range(pipeline.num_stages)
            for micro_batch in range(pipeline.num_micro_batches)
            for kind in problem.kinds(number, split=split)
        },
    )


def compile_operations(problem: Problem, ops: set[Op]) -> Compiled:
    """These operations; each backward either whole or split.

    Raises:
        ValueError: the durations add up to more than native code counts.
    """
    total_ticks = sum(problem.ticks(op) + problem.pipelines[op.pipeline].transfer_ticks for op in ops)
    if total_ticks > MAX_TICKS:
        raise ValueError(f"durations add up to {total_ticks} ticks; use a coarser tick, the most is {MAX_TICKS}")
    channels: dict[Channel, int] = {}
    ordered: list[Op] = []
    rows: list[tuple[int, ...]] = []
    last_forwards: dict[int, int] = {}  # by pipeline, the chain
    for number, pipeline in enumerate(problem.pipelines):
        for stage, rank in enumerate(pipeline.ranks):
            for kinds in ((Kind.F,), (Kind.B, Kind.I), (Kind.W,)):
                chain = [
                    op
                    for micro_batch in range(pipeline.num_micro_batches)
                    for op in (Op(number, stage, micro_batch, kind) for kind in kinds)
                    if op in ops
                ]
                if chain:
                    ends = (channel_into(problem, chain[0]), channel_from(problem, chain[0]))
                    codes = [-1 if c is None else channels.setdefault(c, len(channels)) for c in ends]
                    kind_code = _KIND_CODE[kinds[0]]
                    if kinds == (Kind.F,):
                        last_forwards[number] = len(rows)
                    rows.append((len(ordered), len(chain), rank, number, stage, pipeline.num_stages, kind_code, *codes))
                    ordered.extend(chain)
    assert len(ordered) == len(ops), "an operation is not of the problem"
    befores = [-1] * len(rows)
    for number, pipeline in enumerate(problem.pipelines):
        if pipeline.before is not None:
            befores[last_forwards[number]] = last_forwards[pipeline.before]
    node_of = {op: node for node, op in enumerate(ordered)}
    sources = [_source(op, node_of, problem.pipelines[op.pipeline].num_stages) for op in ordered]
    graph = _native.Graph(
        problem.num_ranks,
        np.array([(*row, before) for row, before in zip(rows, befores, strict=True)], dtype=np.int32),
        np.array([problem.ticks(op) for op in ordered], dtype=np.int32),
        np.array([len(ordered) if s is None else node_of[s] for s in sources], dtype=np.int32),
        np.array([problem.transfer_ticks(s, op) if s else 0 for s, op in zip(sources, ordered, strict=True)], np.int32),
        np.array([problem.bytes_taken(op) for op in ordered], dtype=np.int64),
        np.array(problem.initial_bytes, dtype=np.int64),
    )
    return Compiled(problem, tuple(ordered), node_of, graph)


def _source(op: Op, known: dict[Op, int], num_stages: int) -> Op | None:
    """What an operation waits for last: in a backward it is the gradient, which comes after its own forward."""
    if op.kind is Kind.W:
        return op._replace(kind=Kind.I)
    if op.kind is Kind.F:
        return op._replace(stage=op.stage - 1) if op.stage else None
    if op.stage == num_stages - 1:
        return op._replace(kind=Kind.F)
    split = op._replace(stage=op.stage + 1, kind=Kind.I)
    return split if split in known else split._replace(kind=Kind.B)
