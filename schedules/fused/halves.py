"""Schedules with backwards whole or in halves, and from one form to the other."""

from __future__ import annotations

from schedules.fused.compiled import Compiled
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.timing import evaluate


def splitting_is_free(problem: Problem) -> bool:
    """Whether no backward takes longer in halves than whole, so that only their order is left to choose."""
    return all(
        i + w <= b
        for p in problem.pipelines
        if p.input_grad_ticks is not None and p.weight_grad_ticks is not None
        for i, w, b in zip(p.input_grad_ticks, p.weight_grad_ticks, p.backward_ticks, strict=True)
    )


def halves_lose_nothing(problem: Problem) -> bool:
    """Whether some best schedule has the form that the solver searches: every backward that can be split is split.

    True where nothing can be split. Also true where halves take no longer than the whole and hold no more than the
    activation did: then I followed by W can stand for any B.
    """
    splittable = [p for p in problem.pipelines if p.can_split]
    holds_no_more = all(
        w <= a for p in splittable for w, a in zip(p.weight_grad_bytes, p.activation_bytes, strict=True)
    )
    return not splittable or (splitting_is_free(problem) and holds_no_more)


def in_form_of(compiled: Compiled, schedule: Schedule) -> Schedule:
    """The same order with each backward whole or in halves as the native graph has it."""

    def parts(op: Op) -> tuple[Op, ...]:
        if op in compiled.node_of:
            return (op,)
        if op.kind is Kind.B:
            return op._replace(kind=Kind.I), op._replace(kind=Kind.W)
        assert op.kind is Kind.I, f"{op} is not of the compiled problem"
        return (op._replace(kind=Kind.B),)

    whole = {op for op in compiled.ops if op.kind is Kind.B}
    return Schedule(
        schedule.problem,
        tuple(
            tuple(
                part
                for op in order
                if not (op.kind is Kind.W and op._replace(kind=Kind.B) in whole)
                for part in parts(op)
            )
            for order in schedule.ranks
        ),
    )


def join_halves(schedule: Schedule) -> Schedule:
    """Replace all neighbours I, W of one micro-batch by B, if the schedule does not get worse by it."""
    orders = []
    for order in schedule.ranks:
        joined: list[Op] = []
        for op in order:
            if op.kind is Kind.W and joined and joined[-1] == op._replace(kind=Kind.I):
                joined[-1] = op._replace(kind=Kind.B)
            else:
                joined.append(op)
        orders.append(tuple(joined))
    candidate = Schedule(schedule.problem, tuple(orders))
    if candidate == schedule:
        return schedule
    old, new = evaluate(schedule), evaluate(candidate)
    is_better = (new.makespan, max(new.peak_bytes)) <= (old.makespan, max(old.peak_bytes))
    return candidate if is_better else schedule
