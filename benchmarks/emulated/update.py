"""An update by sizes, as emulated ranks train it, and what real ranks would tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from fuse.algorithms.batch import Experience
from fuse.benchmarks.emulated.training import EmulatedRound
from fuse.intrastage.placement import Counts, Replica, replica_micro_batches, replicas_of
from fuse.intrastage.training_schedule import Plan, RankPlan, serial_schedule
from fuse.roles import GENERATING
from fuse.training.rank import TrainingSettings
from fuse.training.rounds import RankRound, Round, StepPart


class EmulatedUpdate:
    """The rounds of an update. sizes: of each round, all that ranks need to wait as long as they should."""

    def __init__(
        self,
        placement: Sequence[Replica],
        settings: TrainingSettings,
        experience: Experience,
        rounds: Sequence[Round],
        plans: Mapping[Counts, RankPlan],
    ) -> None:
        self._placement, self._settings, self._experience = placement, settings, experience
        self._rounds, self._plans = rounds, [plans[one.counts] for one in rounds]
        self.sizes = [self._sizes(one, plan) for one, plan in zip(rounds, self._plans, strict=True)]

    def _sizes(self, one: Round, plan: RankPlan) -> EmulatedRound:
        replicas = replicas_of(self._placement, one.counts)
        models = [replica.model for replica in replicas]
        shapes = tuple(
            tuple(
                self._settings.layout.shape(self._experience, part.micro_batches[index])
                for index in replica_micro_batches(len(part.micro_batches), models.count(replica.model), replica.index)
            )
            for replica in replicas
            for part in (one.parts[replica.model],)
        )
        return EmulatedRound(
            program=plan.program,
            roles=tuple(models),
            shapes=shapes,
            is_observed=plan.is_watched and self._settings.split_backward,
            stepping=tuple(role for role, part in one.parts.items() if part.is_last),
        )

    @classmethod
    def early(
        cls, replica: Replica, settings: TrainingSettings, experience: Experience, part: StepPart
    ) -> EmulatedUpdate:
        """What a replica trains before the update, by 1F1B; see `TrainingRank.accumulate`."""
        alone, one = replace(replica, index=0), Round({replica.model: part})
        plan = Plan(serial_schedule((alone,), one.counts)).for_ranks
        update = cls((alone,), settings, experience, [one], {one.counts: plan})
        update.sizes = [replace(sizes, is_observed=False) for sizes in update.sizes]
        return update

    def results(self, rank: int) -> list[RankRound]:
        """What a rank tells: heads say nothing but zeros, of which losses make metrics, and gradients are 1."""
        return [
            RankRound(
                metrics={},
                gradient_norms={role: 1.0 for role, part in one.parts.items() if part.is_last},
                said={role: self._said(one, role, rank) for role in one.parts if self._is_last_of(role, rank)},
            )
            for one in self._rounds
        ]

    def _is_last_of(self, role: str, rank: int) -> bool:
        return any(replica.model == role and replica.ranks[-1] == rank for replica in self._placement)

    def _said(self, one: Round, role: str, rank: int) -> list[torch.Tensor]:
        """Of the micro-batches of each replica that ends on the rank."""
        part = one.parts[role]
        assert part.shares, "micro-batches are regrouped"
        width = 2 if role == GENERATING else 1  # log-probability and entropy; value
        counts = self._num_positions[role]
        replicas = [replica for replica in self._placement if replica.model == role]
        return [
            torch.zeros(sum(counts[sample] for sample in part.micro_batches[index]), width)
            for replica in replicas
            if replica.ranks[-1] == rank
            for index in replica_micro_batches(len(part.micro_batches), len(replicas), replica.index)
        ]

    @cached_property
    def _num_positions(self) -> dict[str, list[int]]:
        """By role, of every sample."""
        segments, targets = self._experience.segments, self._experience.targets
        return {role: segments.offsets(of.positions).diff().tolist() for role, of in targets.items()}
