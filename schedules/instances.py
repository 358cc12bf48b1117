"""The problem family of the RLHFuse paper: an actor over all ranks, copies of a critic in the opposite direction."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from schedules.ir import Pipeline, Problem


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
    activations = [Fraction(str(actor_activation)), Fraction(str(critic_activation))]
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
