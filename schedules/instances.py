"""Families of problems: the RLHFuse paper's, and uneven ones as profiling real models gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from random import Random

from schedules.baselines import serial
from schedules.ir import MOST_RANKS, Pipeline, Problem
from schedules.timing import evaluate

_MOST_SCALE = 10**9


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem with memory in whole bytes; `bytes_per_unit` of them are one of the unit in which memory was given."""

    problem: Problem
    bytes_per_unit: int

    def units(self, num_bytes: int) -> float:
        """Bytes of the problem in the unit in which the instance gives memory."""
        return float(Fraction(num_bytes, self.bytes_per_unit))


def actor_and_critic(
    *,
    actor_stages: int,
    critic_stages: int,
    actor_microbatches: int,
    critic_microbatches: int,
    actor_forward: int,
    critic_forward: int,
    actor_activation: float = 0,
    critic_activation: float = 0,
    split_backward: bool = False,
) -> Instance:
    """Actor stage s runs on rank s; critic copy c covers ranks [c * critic_stages, (c + 1) * critic_stages) in reverse.

    Backward takes twice as long as forward; split, each half takes as long as forward and the weight gradient holds as
    much as the activation did. Activations may be decimal fractions: they are scaled to integers exactly. Every copy of
    the critic runs `critic_microbatches`.

    Raises:
        ValueError: the critic's stages do not divide the actor's, or a value is out of range.

    Source: Zhong et al., RLHFuse, arXiv 2409.13221; FlexFusion's instance files.
    """
    if critic_stages < 1 or actor_stages % critic_stages:
        raise ValueError(f"critic_stages {critic_stages} must divide actor_stages {actor_stages}")
    if actor_stages > MOST_RANKS:
        raise ValueError(f"actor_stages is {actor_stages}: the most is {MOST_RANKS}")
    activations = [
        exact_units("actor_activation", actor_activation),
        exact_units("critic_activation", critic_activation),
    ]
    scale = lcm(*(activation.denominator for activation in activations))

    def model(name: str, ranks: tuple[int, ...], num_micro_batches: int, ticks: int, activation: Fraction) -> Pipeline:
        stages = len(ranks)
        halves = (ticks,) * stages if split_backward else None
        return Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=num_micro_batches,
            forward_ticks=(ticks,) * stages,
            backward_ticks=(2 * ticks,) * stages,
            input_grad_ticks=halves,
            weight_grad_ticks=halves,
            activation_bytes=(int(activation * scale),) * stages,
            weight_grad_bytes=(int(activation * scale),) * stages if split_backward else (),
        )

    pipelines = [model("actor", tuple(range(actor_stages)), actor_microbatches, actor_forward, activations[0])]
    num_copies = actor_stages // critic_stages
    for copy in range(num_copies):
        ranks = tuple(reversed(range(copy * critic_stages, (copy + 1) * critic_stages)))
        name = f"critic{copy}" if num_copies > 1 else "critic"
        pipelines.append(model(name, ranks, critic_microbatches, critic_forward, activations[1]))
    return Instance(Problem(num_ranks=actor_stages, pipelines=tuple(pipelines)), scale)


def exact_units(name: str, value: float) -> Fraction:
    """The decimal fraction that was written as `value`.

    Raises:
        ValueError: it is infinite, NaN, negative, or has more than nine decimals.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}: give a finite number that is not negative")
    exact = Fraction(str(value))
    if exact.denominator > _MOST_SCALE:
        raise ValueError(f"{name} is {value}: give at most nine decimals")
    return exact


def heterogeneous(seed: int) -> Problem:
    """Two or three models on 4 or 8 ranks: stage times vary by 30 % either way, transfers take time, memory is unequal.

    Models run forwards or backwards over all ranks; a third one may be small, with a replica on each half of them.
    Limits are between what one model after the other needs and half as much again. The same seed gives the same
    problem.
    """
    random = Random(seed)
    num_ranks = random.choice((4, 8))
    micro_batches = random.choice((2, 3, 4)) * num_ranks

    def model(name: str, ranks: tuple[int, ...], mean_ticks: int, mean_bytes: int) -> Pipeline:
        forward = tuple(round(mean_ticks * random.uniform(0.7, 1.3)) for _ in ranks)
        return Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=micro_batches,
            forward_ticks=forward,
            backward_ticks=tuple(round(f * random.uniform(1.6, 2.4)) for f in forward),
            activation_bytes=tuple(round(mean_bytes * random.uniform(0.7, 1.3)) for _ in ranks),
            transfer_ticks=transfer_ticks,
        )

    transfer_ticks = random.randint(0, 10)
    along = tuple(range(num_ranks))
    pipelines = [model("actor", along, 100, 100), model("critic", along[::-1], random.randint(30, 100), 60)]
    if random.random() < 0.5:
        halves = (along[: num_ranks // 2], along[num_ranks // 2 :])
        ticks = random.randint(10, 40)
        third = [
            model(f"small{copy}", random.choice((half, half[::-1])), ticks, 30) for copy, half in enumerate(halves)
        ]
        pipelines += third if random.random() < 0.5 else [model("third", along, ticks, 30)]
    initial_bytes = tuple(random.randint(0, 200) for _ in along)
    free = Problem(num_ranks=num_ranks, pipelines=tuple(pipelines), initial_bytes=initial_bytes)
    limits = tuple(round(peak * random.uniform(1.25, 2.0)) for peak in evaluate(serial(free)).peak_bytes)
    return replace(free, memory_limit_bytes=limits)
