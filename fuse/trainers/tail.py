"""What an update of a run may train before all of its samples are scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from fuse.algorithms.algorithm import Algorithm
from fuse.config.run import RunConfig
from fuse.driver.tail import TailPlan
from fuse.sample import Sample
from fuse.trainers.rollouts import Rewards
from fuse.training.rounds import Round
from fuse.training.tail import FirstStep


def tail_plan(
    args: RunConfig,
    algorithm: Algorithm,
    rewards: Rewards,
    rounds: Callable[[], Sequence[Round]],
    samples: Sequence[Sample],
) -> TailPlan | None:
    """Of these samples, which are all of the update, and its rounds; None for nothing."""
    if algorithm.early is None or not args.trains_early:
        return None
    groups: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.id if sample.group is None else sample.group.number].append(index)
    members = [groups[sample.id if sample.group is None else sample.group.number] for sample in samples]
    step = FirstStep.of(algorithm.early, rounds(), members)
    return None if step is None else TailPlan(step=step, known=rewards.rewarded)
