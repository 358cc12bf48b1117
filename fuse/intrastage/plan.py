"""Where the actor's and the critic's stages run, and the schedule in which they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from schedules import Pipeline, Problem, Schedule
from schedules.baselines.serial import serial

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
