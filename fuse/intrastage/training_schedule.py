"""The schedule in which placed models train: one after the other, or fused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.opposite import has_opposites, plain_profile, without_opposites
from fuse.intrastage.placement import Counts, Replica, describe, num_micro_batches, replica_micro_batches
from fuse.intrastage.program import Program, program_of
from schedules import Kind, Op, Pipeline, Problem, Schedule, Timing, evaluate
from schedules.baselines.interleaved import interleaved
from schedules.baselines.one_f_one_b import one_f_one_b
from schedules.baselines.serial import serial
from schedules.bounds import makespan_lower_bound
from schedules.fused.cache import ScheduleCache
from schedules.fused.greedy import greedy
from schedules.fused.parts import schedule_in_parts

if TYPE_CHECKING:
    from schedules.fused.solve import Solution

_logger = logging.getLogger(__name__)

_LEAST_SEARCH_S = 0.2
_MEMORY_SEARCH_S = 1.0  # the lowest peaks of small problems are found and proven in that


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What ranks are told of a `Plan`. is_watched: as there."""

    program: Program
    is_watched: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule of one optimizer step, and the profile that its times come from; None where nothing was measured.

    is_watched: ranks are to show what a later plan has to know: messages, and the memory of micro-batches.
    """

    schedule: Schedule
    profile: Profile | None = None
    is_watched: bool = False

    @property
    def for_ranks(self) -> RankPlan:
        """What they run. Raises: ValueError for an illegal schedule."""
        return RankPlan(program_of(self.schedule), self.is_watched)


@lru_cache(maxsize=64)
def serial_schedule(replicas: tuple[Replica, ...], counts: Counts) -> Schedule:
    """1F1B of one model after the other (interleaved where ranks hold several stages); pipelines are `replicas`.

    Stage times are not measured here: 1F1B's order does not depend on them. A backward counts as two forwards.

    Raises:
        ValueError: a replica would have no micro-batch.
    """
    return unfused(_problem(replicas, counts))


@lru_cache(maxsize=64)
def halved_serial_schedule(replicas: tuple[Replica, ...], counts: Counts) -> Schedule:
    """`serial_schedule` with I, then W, in place of every B, so that a run of it shows what each half costs.

    Raises:
        ValueError: a replica would have no micro-batch.
    """
    schedule = serial_schedule(replicas, counts)
    pipelines = tuple(
        one
        if one.is_forward_only
        else replace(one, input_grad_ticks=(1,) * one.num_stages, weight_grad_ticks=(1,) * one.num_stages)
        for one in schedule.problem.pipelines
    )
    ranks = tuple(
        tuple(half for op in ops for half in (_halves(op) if op.kind is Kind.B else (op,))) for ops in schedule.ranks
    )
    return Schedule(replace(schedule.problem, pipelines=pipelines), ranks)


def _halves(op: Op) -> tuple[Op, Op]:
    return op._replace(kind=Kind.I), op._replace(kind=Kind.W)


def unfused(problem: Problem) -> Schedule:
    """One pipeline after the other: 1F1B, interleaved where ranks hold several stages. Forward-only ones come first."""
    return serial(problem, _alone)


def _alone(problem: Problem) -> Schedule:
    """A single pipeline's schedule without fusion."""
    (pipeline,) = problem.pipelines
    num_ranks = len(set(pipeline.ranks))
    if num_ranks == pipeline.num_stages:
        return one_f_one_b(problem)
    return greedy(problem) if pipeline.num_micro_batches % num_ranks else interleaved(problem)


def fused_schedule(
    profile: Profile,
    replicas: Sequence[Replica],
    counts: Counts,
    shape: Shape,
    *,
    largest: Shape | None = None,
    memory_limit_bytes: int | None = None,
    cache: ScheduleCache | None = None,
    time_limit_s: float | None = 30.0,
    num_steps: int | None = None,
    num_workers: int = 2,
    stop: threading.Event | None = None,
) -> Schedule:
    """All replicas' training at once in the shortest schedule found, or kept in `cache` from an earlier search.

    One process calls this and hands the result to all ranks: how far a search gets depends on the machine.

    profile: its pipelines have the replicas' names.
    shape: of a typical micro-batch; stage times are those on it. largest: shape of the micro-batch that takes most
        memory; by default as `shape`.
    memory_limit_bytes: what activations and outstanding weight gradients of micro-batches may take on any rank.
    time_limit_s: of a search; None for none, and the greedy schedule if no better one is kept.
    num_steps: optimizer steps that the schedule will serve; the search takes no longer than it could save over them.
    stop: ends the search once it is set.

    Raises:
        ValueError: the profile lacks a stage, a replica would have no micro-batch, or the limit is too low for one.
    """
    problem = fused_problem(profile, replicas, counts, shape, memory_limit_bytes, largest)
    schedule = cache.load(problem) if cache is not None else None
    found = "kept from an earlier search"
    if schedule is None and time_limit_s is None:
        schedule, found = schedule_in_parts(problem, lambda part, _: greedy(part)), "greedy"
    elif schedule is None:
        assert time_limit_s is not None
        schedule, found = _searched(problem, profile.tick_s, time_limit_s, num_steps, num_workers, stop)
        if cache is not None:
            cache.store(schedule)
    fused = evaluate(schedule)
    _logger.info(
        "fused schedule of %s: %.3f s with %.1f%% bubbles (%s)",
        describe(counts),
        fused.makespan * profile.tick_s,
        100 * fused.bubble_ratio,
        found,
    )
    return schedule


def _searched(
    problem: Problem,
    tick_s: float,
    time_limit_s: float,
    num_steps: int | None,
    num_workers: int,
    stop: threading.Event | None,
) -> tuple[Schedule, str]:
    """The shortest schedule found, and how good it is, for people."""
    solutions: list[Solution] = []

    def search(part: Problem, share: float) -> Schedule:
        limit_s = time_limit_s
        if num_steps is not None:
            saved_ticks = evaluate(greedy(part)).makespan - makespan_lower_bound(part)
            limit_s = min(limit_s, max(_LEAST_SEARCH_S, num_steps * saved_ticks * tick_s))
        solutions.append(solved(part, share * limit_s, num_workers, memory_time_s=_MEMORY_SEARCH_S, stop=stop))
        return solutions[-1].schedule

    schedule = schedule_in_parts(problem, search)
    longest = max(solutions, key=lambda one: one.makespan)
    seconds = sum(one.seconds for one in solutions)
    return schedule, f"{longest.makespan_gap:.1%} above the lower bound at most, found in {seconds:.1f} s"


def solved(
    problem: Problem,
    time_limit_s: float,
    num_workers: int,
    memory_time_s: float = 0.0,
    stop: threading.Event | None = None,
) -> Solution:
    """The shortest schedule found in so long, or until `stop`; `memory_time_s` of it may go into lower peaks.

    Raises:
        ValueError: a memory limit is too low for one micro-batch.
    """
    from schedules.fused.solve import Objective, solve  # imports OR-tools, which workers do without

    objective = Objective.MAKESPAN_THEN_MEMORY if memory_time_s else Objective.MAKESPAN
    return solve(
        problem,
        time_limit_s=time_limit_s,
        num_workers=num_workers,
        objective=objective,
        memory_time_s=memory_time_s,
        stop=stop,
    )


def serial_step_s(profile: Profile, replicas: Sequence[Replica], counts: Counts, shape: Shape) -> float:
    """Seconds of a step on micro-batches of this shape if one rank worked at a time."""
    ticks = 0
    for replica in replicas:
        of_stages = [profile.stage_costs(replica.name, stage, shape) for stage in range(len(replica.ranks))]
        of_micro_batch = sum(one.forward_ticks + one.backward_ticks for one in of_stages)
        ticks += num_micro_batches(counts, replica.model) * of_micro_batch
    return ticks * profile.tick_s


def unfused_timing(
    profile: Profile,
    replicas: Sequence[Replica],
    counts: Counts,
    shape: Shape,
    *,
    unfused_replicas: Sequence[Replica] | None = None,
    unfused_profile: Profile | None = None,
) -> Timing:
    """Of a step if the models trained one after the other, in the stages that suit that best.

    Opposite replicas are not used then: one of the two has all micro-batches. What is forward-only ends before training
    begins.

    profile, replicas, shape: as of `fused_schedule`. unfused_replicas, unfused_profile: those stages and what they
    would cost, messages left out; None where they are the same.
    """
    profile, replicas = plain_profile(profile, replicas), without_opposites(replicas)
    problem = fused_problem(profile, replicas, counts, shape)
    if unfused_replicas is not None and unfused_profile is not None:
        in_own_stages = fused_problem(unfused_profile, unfused_replicas, counts, shape)
        tick = profile.tick_s / unfused_profile.tick_s
        pipelines = tuple(
            replace(own, transfer_ticks=round(tick * fused.transfer_ticks))
            for own, fused in zip(in_own_stages.pipelines, problem.pipelines, strict=True)
        )
        problem = replace(in_own_stages, pipelines=pipelines)
    return _apart(problem)


def _apart(problem: Problem) -> Timing:
    """Of `unfused` with a barrier between what is forward-only and the rest."""
    of_both = [
        tuple(replace(one, before=None) for one in problem.pipelines if one.is_forward_only is is_first)
        for is_first in (True, False)
    ]
    scoring, training = (evaluate(unfused(replace(problem, pipelines=one))) if one else None for one in of_both)
    if scoring is None or training is None:
        return evaluate(unfused(problem))
    begin = scoring.makespan
    return Timing(
        start=tuple((*a, *(begin + t for t in b)) for a, b in zip(scoring.start, training.start, strict=True)),
        end=tuple((*a, *(begin + t for t in b)) for a, b in zip(scoring.end, training.end, strict=True)),
        makespan=begin + training.makespan,
        busy_ticks=tuple(a + b for a, b in zip(scoring.busy_ticks, training.busy_ticks, strict=True)),
        peak_bytes=training.peak_bytes,
    )


def fused_problem(
    profile: Profile,
    replicas: Sequence[Replica],
    counts: Counts,
    shape: Shape,
    memory_limit_bytes: int | None = None,
    largest: Shape | None = None,
) -> Problem:
    """The problem that `fused_schedule` solves: pipelines `replicas`, in their order, with measured costs.

    Raises:
        ValueError: the profile lacks a stage, or a replica would have no micro-batch.
    """
    bare = _problem(replicas, counts)
    return Problem(
        num_ranks=bare.num_ranks,
        pipelines=tuple(
            _with_costs(pipeline, profile, replica.name, shape, largest or shape)
            for pipeline, replica in zip(bare.pipelines, replicas, strict=True)
        ),
        memory_limit_bytes=None if memory_limit_bytes is None else (memory_limit_bytes,) * bare.num_ranks,
    )


def _with_costs(pipeline: Pipeline, profile: Profile, name: str, shape: Shape, largest: Shape) -> Pipeline:
    costs = [profile.stage_costs(name, stage, shape) for stage in range(pipeline.num_stages)]
    memory = [profile.stage_costs(name, stage, largest) for stage in range(pipeline.num_stages)]
    input_grads = tuple(cost.input_grad_ticks for cost in costs if cost.input_grad_ticks is not None)
    weight_grads = tuple(cost.weight_grad_ticks for cost in costs if cost.weight_grad_ticks is not None)
    can_split = len(input_grads) == len(weight_grads) == len(costs)  # the problem splits all stages or none
    if pipeline.is_forward_only:
        forward = tuple(cost.forward_ticks for cost in costs)
        return replace(pipeline, forward_ticks=forward, transfer_ticks=profile.transfer_ticks(name, shape))
    return replace(
        pipeline,
        forward_ticks=tuple(cost.forward_ticks for cost in costs),
        backward_ticks=tuple(cost.backward_ticks for cost in costs),
        input_grad_ticks=input_grads if can_split else None,
        weight_grad_ticks=weight_grads if can_split else None,
        activation_bytes=tuple(_grown(cost.activation_bytes, cost, largest) for cost in memory),
        weight_grad_bytes=tuple(_grown(cost.weight_grad_bytes, cost, largest) for cost in memory) if can_split else (),
        transfer_ticks=profile.transfer_ticks(name, shape),
    )


def _grown(num_bytes: int, costs: StageCosts, shape: Shape) -> int:
    """Bytes on a shape that may be larger than the one they were measured on: in proportion to tokens."""
    return max(num_bytes, -(-num_bytes * shape.size // costs.shape.size))


def _problem(replicas: Sequence[Replica], counts: Counts) -> Problem:
    num_replicas = {replica.model: sum(other.model == replica.model for other in replicas) for replica in replicas}
    remedy = "train without opposite replicas" if has_opposites(replicas) else "use more pipeline stages"
    for model, most in num_replicas.items():
        if (count := num_micro_batches(counts, model)) < most:
            raise ValueError(
                f"{count} micro-batches per optimizer step cannot feed {most} data-parallel replicas of the {model}: "
                f"lower per_device_train_batch_size or the number of mini-batches, or {remedy}"
            )
    pipelines = tuple(
        Pipeline(
            name=f"{replica.model}.{replica.index}" if num_replicas[replica.model] > 1 else replica.model,
            ranks=replica.ranks,
            num_micro_batches=len(
                replica_micro_batches(
                    num_micro_batches(counts, replica.model), num_replicas[replica.model], replica.index
                )
            ),
            forward_ticks=(1,) * len(replica.ranks),
            backward_ticks=(2,) * len(replica.ranks) if replica.scores is None else (),
            before=None if replica.scores is None else _scored(replicas, replica),
        )
        for replica in replicas
    )
    num_ranks = 1 + max(rank for replica in replicas for rank in replica.ranks)
    return Problem(num_ranks=num_ranks, pipelines=pipelines)


def _scored(replicas: Sequence[Replica], scorer: Replica) -> int:
    """The number of the pipeline that needs what this one makes."""
    keys = [(replica.model, replica.index) for replica in replicas]
    assert scorer.scores is not None
    return keys.index((scorer.scores, scorer.index))
