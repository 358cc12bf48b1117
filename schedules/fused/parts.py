"""Problems of several parts, pipelines that share no rank with those of another part: each is a problem of its own.

The makespan is that of the part which takes longest. Data-parallel replicas are parts of one form, which differ in
measured costs alone: what is found for the one that has most to do is an order for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from schedules.ir import Op, Pipeline, Problem, Schedule
from schedules.validate import violations


@dataclass(frozen=True, slots=True)
class Part:
    """A part as a problem. ranks, pipelines: numbers in the whole problem of its ranks and pipelines."""

    problem: Problem
    ranks: tuple[int, ...]
    pipelines: tuple[int, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What parts that take the same orders have in common."""
        limits = self.problem.memory_limit_bytes is None
        shapes = (
            (one.ranks, one.num_micro_batches, one.can_split, one.is_forward_only, one.before)
            for one in self.problem.pipelines
        )
        return limits, self.problem.num_ranks, *shapes


def busiest_ticks(problem: Problem) -> int:
    """What the rank that has most to do computes, backwards whole: no schedule with whole ones is shorter."""
    ticks = [0] * problem.num_ranks
    for one in problem.pipelines:
        for each in (one.forward_ticks, one.backward_ticks):  # of a forward-only one, none
            for rank, taken in zip(one.ranks, each, strict=bool(each)):
                ticks[rank] += one.num_micro_batches * taken
    return max(ticks)


def parts_of(problem: Problem) -> list[Part]:
    """The parts, in the order of their first pipelines; ranks without operations are in none."""
    groups: list[tuple[set[int], list[int]]] = []
    for number, pipeline in enumerate(problem.pipelines):
        meeting = [group for group in groups if not group[0].isdisjoint(pipeline.ranks)]
        ranks = set(pipeline.ranks).union(*(own for own, _ in meeting))
        members = sorted([*(one for _, own in meeting for one in own), number])
        groups = [group for group in groups if group not in meeting] + [(ranks, members)]
    return [_part(problem, sorted(ranks), members) for ranks, members in sorted(groups, key=lambda group: group[1])]


def _part(problem: Problem, ranks: list[int], members: list[int]) -> Part:
    place = {rank: index for index, rank in enumerate(ranks)}

    def moved(pipeline: Pipeline) -> Pipeline:
        before = None if pipeline.before is None else members.index(pipeline.before)  # which ends on its last rank
        return replace(pipeline, ranks=tuple(place[rank] for rank in pipeline.ranks), before=before)

    limits = problem.memory_limit_bytes
    own = Problem(
        num_ranks=len(ranks),
        pipelines=tuple(moved(problem.pipelines[number]) for number in members),
        memory_limit_bytes=None if limits is None else tuple(limits[rank] for rank in ranks),
        initial_bytes=tuple(problem.initial_bytes[rank] for rank in ranks),
    )
    return Part(own, tuple(ranks), tuple(members))


def schedule_in_parts(problem: Problem, schedule: Callable[[Problem, float], Schedule]) -> Schedule:
    """A schedule of every part, side by side.

    schedule: of a part, with the share of the time that it may take. Of parts of one form it is asked for the busiest;
    the others have its order, where that is legal for them.
    """
    parts = parts_of(problem)
    by_form: dict[tuple[object, ...], list[Part]] = {}
    for part in sorted(parts, key=lambda one: -busiest_ticks(one.problem)):
        by_form.setdefault(part.form, []).append(part)
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for first, *others in by_form.values():
        found = schedule(first.problem, 1 / len(by_form))
        _insert(orders, first, found)
        for other in others:
            same = Schedule(other.problem, found.ranks)
            _insert(orders, other, schedule(other.problem, 1 / len(parts)) if violations(same) else same)
    return Schedule(problem, tuple(orders))


def _insert(orders: list[tuple[Op, ...]], part: Part, found: Schedule) -> None:
    for rank, order in zip(part.ranks, found.ranks, strict=True):
        orders[rank] = tuple(op._replace(pipeline=part.pipelines[op.pipeline]) for op in order)
