"""Where the actor's and the critic's stages run, and the schedule in which they train."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from fuse.intrastage.profile import Profile, Shape
from schedules import Pipeline, Problem, Schedule, evaluate
from schedules.baselines.serial import serial
from schedules.fused.cache import ScheduleCache

_logger = logging.getLogger(__name__)

ModelName = Literal["actor", "critic"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model, cut into stages: stage s runs on `ranks[s]`."""

    model: ModelName
    index: int
    ranks: tuple[int, ...]


def place(model: ModelName, num_devices: int, num_stages: int, *, reverse: bool = False) -> tuple[Replica, ...]:
    """Tile the devices with replicas of `num_stages` consecutive ones; `reverse` puts stage 0 on the highest rank.

    Raises:
        ValueError: the devices are no multiple of the stages.
    """
    if num_devices % num_stages:
        raise ValueError(
            f"{model}_stages={num_stages} does not divide num_devices={num_devices}: "
            f"choose a divisor; the quotient is the number of data-parallel replicas"
        )
    order = -1 if reverse else 1
    return tuple(
        Replica(model, index, tuple(range(index * num_stages, (index + 1) * num_stages))[::order])
        for index in range(num_devices // num_stages)
    )


def replica_micro_batches(num_micro_batches: int, num_replicas: int, index: int) -> range:
    """The micro-batches that replica `index` trains on: every num_replicas-th."""
    return range(index, num_micro_batches, num_replicas)


@lru_cache(maxsize=64)
def serial_schedule(replicas: tuple[Replica, ...], num_micro_batches: int) -> Schedule:
    """1F1B of the actor, then of the critic; the problem's pipelines are `replicas`, in their order.

    Stage times are not measured here: 1F1B's order does not depend on them. A backward counts as two forwards.

    Raises:
        ValueError: a replica would have no micro-batch.
    """
    return serial(_problem(replicas, num_micro_batches))


def fused_schedule(
    profile: Profile,
    replicas: Sequence[Replica],
    num_micro_batches: int,
    shape: Shape,
    *,
    memory_limit_bytes: int | None = None,
    cache: ScheduleCache | None = None,
    time_limit_s: float = 30.0,
    num_workers: int = 2,
    seed: int = 0,
) -> Schedule:
    """All replicas' training at once in the shortest schedule found, or kept in `cache` from an earlier search.

    One process calls this and hands the result to all ranks: how far a search gets depends on the machine.

    profile: with pipelines named as `pipeline_name` does.
    shape: of the micro-batches.
    memory_limit_bytes: what activations and outstanding weight gradients of micro-batches may take on any rank.

    Raises:
        ValueError: the profile lacks a stage, a replica would have no micro-batch, or the limit is too low for one.
    """
    problem = fused_problem(profile, replicas, num_micro_batches, shape, memory_limit_bytes)
    schedule = cache.load(problem) if cache is not None else None
    found = "kept from an earlier search"
    if schedule is None:
        from schedules.fused.solve import solve  # imports OR-tools, which workers do without

        solution = solve(problem, time_limit_s=time_limit_s, num_workers=num_workers, seed=seed)
        schedule = solution.schedule
        found = f"{solution.makespan_gap:.1%} above the lower bound at most, found in {solution.seconds:.1f} s"
        if cache is not None:
            cache.store(schedule)
    fused, unfused = evaluate(schedule), evaluate(serial(problem))
    _logger.info(
        "fused schedule of %d micro-batches: %.3f s with %.1f%% bubbles (%s); serial %.3f s with %.1f%%",
        num_micro_batches,
        fused.makespan * profile.tick_s,
        100 * fused.bubble_ratio,
        found,
        unfused.makespan * profile.tick_s,
        100 * unfused.bubble_ratio,
    )
    return schedule


def fused_problem(
    profile: Profile,
    replicas: Sequence[Replica],
    num_micro_batches: int,
    shape: Shape,
    memory_limit_bytes: int | None = None,
) -> Problem:
    """The problem that `fused_schedule` solves: pipelines `replicas`, in their order, with measured costs.

    Raises:
        ValueError: the profile lacks a stage, or a replica would have no micro-batch.
    """
    bare = _problem(replicas, num_micro_batches)
    return Problem(
        num_ranks=bare.num_ranks,
        pipelines=tuple(
            _with_costs(pipeline, profile, pipeline_name(replica), shape)
            for pipeline, replica in zip(bare.pipelines, replicas, strict=True)
        ),
        memory_limit_bytes=None if memory_limit_bytes is None else (memory_limit_bytes,) * bare.num_ranks,
    )


def pipeline_name(replica: Replica) -> str:
    """What profiles call a replica's pipeline."""
    return f"{replica.model}.{replica.index}"


def _with_costs(pipeline: Pipeline, profile: Profile, name: str, shape: Shape) -> Pipeline:
    costs = [profile.stage_costs(name, stage, shape) for stage in range(pipeline.num_stages)]
    input_grads = tuple(cost.input_grad_ticks for cost in costs if cost.input_grad_ticks is not None)
    weight_grads = tuple(cost.weight_grad_ticks for cost in costs if cost.weight_grad_ticks is not None)
    can_split = len(input_grads) == len(weight_grads) == len(costs)  # the problem splits all stages or none
    return replace(
        pipeline,
        forward_ticks=tuple(cost.forward_ticks for cost in costs),
        backward_ticks=tuple(cost.backward_ticks for cost in costs),
        input_grad_ticks=input_grads if can_split else None,
        weight_grad_ticks=weight_grads if can_split else None,
        activation_bytes=tuple(cost.activation_bytes for cost in costs),
        weight_grad_bytes=tuple(cost.weight_grad_bytes for cost in costs) if can_split else (),
        transfer_ticks=profile.transfer_ticks(name, shape),
    )


def _problem(replicas: Sequence[Replica], num_micro_batches: int) -> Problem:
    num_replicas = {replica.model: sum(other.model == replica.model for other in replicas) for replica in replicas}
    most = max(num_replicas.values())
    if num_micro_batches < most:
        raise ValueError(
            f"{num_micro_batches} micro-batches per optimizer step cannot feed {most} data-parallel replicas: "
            f"lower per_device_train_batch_size or num_mini_batches, or use more pipeline stages"
        )
    pipelines = tuple(
        Pipeline(
            name=f"{replica.model}.{replica.index}" if num_replicas[replica.model] > 1 else replica.model,
            ranks=replica.ranks,
            num_micro_batches=len(replica_micro_batches(num_micro_batches, num_replicas[replica.model], replica.index)),
            forward_ticks=(1,) * len(replica.ranks),
            backward_ticks=(2,) * len(replica.ranks),
        )
        for replica in replicas
    )
    num_ranks = 1 + max(rank for replica in replicas for rank in replica.ranks)
    return Problem(num_ranks=num_ranks, pipelines=pipelines)
