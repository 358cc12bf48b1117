"""The micro-batches of a round on a device: of samples as its parts have them, then of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fuse.algorithms.batch import Experience
from fuse.intrastage.placement import Replica, replica_micro_batches
from fuse.micro_batch import MicroBatch
from fuse.training.layout import Layout
from fuse.training.regrouping import row_weights
from fuse.training.rounds import Round, StepPart


@dataclass(frozen=True, slots=True)
class RoundMicroBatches:
    """Of the samples of an experience; of the same samples, roles share what they have in common."""

    experience: Experience
    layout: Layout
    device: torch.device
    _made: dict[tuple[int, ...], dict[str, MicroBatch]] = field(default_factory=dict)

    def by_role(self, samples: Sequence[int]) -> dict[str, MicroBatch]:
        """These samples, of weight 1."""
        if (key := tuple(samples)) not in self._made:
            made = self.layout.micro_batches(self.experience, samples, 1.0)
            self._made[key] = {role: micro_batch.to(self.device) for role, micro_batch in made.items()}
        return self._made[key]

    def per_pipeline(self, one: Round, replicas: Sequence[Replica]) -> list[list[MicroBatch]]:
        """A round's micro-batches, by replica."""
        num_replicas = Counter(replica.model for replica in replicas)
        made = []
        for replica in replicas:
            role, part = replica.model, one.parts[replica.model]
            own = replica_micro_batches(part.num_micro_batches, num_replicas[role], replica.index)
            made.append([self._micro_batch(role, part, index) for index in own])
        return made

    def _micro_batch(self, role: str, part: StepPart, index: int) -> MicroBatch:
        if index >= len(part.micro_batches):
            text = part.auxiliary[index - len(part.micro_batches)]
            return text.micro_batch(packs=self.layout.packs).to(self.device)
        samples = part.micro_batches[index]
        micro_batch = replace(self.by_role(samples)[role], weight=part.weights[index])
        if not part.shares:
            return micro_batch
        weights = row_weights(self.experience, role, samples, part.shares[index])
        return replace(micro_batch, row_weights=weights).to(self.device)
