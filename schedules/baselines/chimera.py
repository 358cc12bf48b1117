"""Chimera: two equal models in opposite directions, whose bubbles fit into one another."""

from __future__ import annotations

from dataclasses import replace

from schedules.ir import Kind, Op, Problem, Schedule


def chimera(problem: Problem) -> Schedule:
    """Units of P / 2 micro-batches of each model, merged slot by slot; one unit after the other.

    With P equal stages (P even), M = P / 2 micro-batches of each model and equal forward and backward ticks t, the
    makespan is (3 P - 2) t: a bubble of P - 2 slots where 1F1B has 2 P - 2. Rank r holds
    min(P / 2, P - r) + min(P / 2, r + 1) activations, of both models together.

    Raises:
        ValueError: the problem does not have two equal pipelines in opposite directions, of an even number of stages on
            as many ranks, with a multiple of P / 2 micro-batches.

    Source: Li and Hoefler, Chimera, SC 2021, section 3.1; several units are concatenated directly (section 3.5).
    """
    if len(problem.pipelines) != 2:
        raise ValueError(f"chimera is for two pipelines, not {len(problem.pipelines)}")
    down, up = problem.pipelines
    num_stages = down.num_stages
    is_same = replace(up, name=down.name, ranks=down.ranks) == down and not down.is_forward_only
    if not is_same or up.ranks != down.ranks[::-1]:
        raise ValueError(f"chimera: pipelines {down.name} and {up.name} are not equal and in opposite directions")
    if num_stages % 2 or len(set(down.ranks)) != num_stages:
        raise ValueError(f"chimera: {num_stages} stages on ranks {down.ranks}; it needs an even number, one per rank")
    num_units, rest = divmod(down.num_micro_batches, num_stages // 2)
    if rest:
        raise ValueError(
            f"chimera: {down.num_micro_batches} micro-batches are not a multiple of half the {num_stages} stages"
        )
    # In slots of one tick: F_j at stage s in slot s + 2 j, B_j in slot 2 P - 1 - s + 2 j. P is even, so on a rank the
    # other model's forwards and backwards fall into the slots between, and its backwards behind this one's forwards.
    unit: list[list[tuple[int, Op]]] = [[] for _ in range(problem.num_ranks)]
    for number, pipeline in enumerate(problem.pipelines):
        for stage, rank in enumerate(pipeline.ranks):
            for micro_batch in range(num_stages // 2):
                forward, backward = stage + 2 * micro_batch, 2 * num_stages - 1 - stage + 2 * micro_batch
                unit[rank].append((forward, Op(number, stage, micro_batch, Kind.F)))
                unit[rank].append((backward, Op(number, stage, micro_batch, Kind.B)))
    return Schedule(
        problem,
        tuple(
            tuple(
                op._replace(micro_batch=op.micro_batch + repeat * (num_stages // 2))
                for repeat in range(num_units)
                for _, op in sorted(slots)
            )
            for slots in unit
        ),
    )
