"""What of a rank runs in a round, when not all models train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.intrastage.communication import PipelineCommunicators
from fuse.intrastage.placement import Replica
from fuse.intrastage.stage import TrainedStage
from fuse.micro_batch import Metric, Metrics
from fuse.training.auxiliary import is_of_text
from fuse.training.regrouping import said
from fuse.training.rounds import RankRound, Round


@dataclass(frozen=True, slots=True)
class Running:
    """The pipelines of a round's roles, as its schedule counts them.

    replicas, communicators: by pipeline. stages: this rank's by (pipeline, stage).
    """

    replicas: tuple[Replica, ...]
    stages: Mapping[tuple[int, int], TrainedStage]
    communicators: Sequence[PipelineCommunicators]

    @classmethod
    def of(
        cls,
        one: Round,
        placement: Sequence[Replica],
        stages: Mapping[tuple[int, int], TrainedStage],
        communicators: Sequence[PipelineCommunicators],
    ) -> Running:
        """stages, communicators: by pipeline of the whole placement."""
        numbers = [number for number, replica in enumerate(placement) if replica.model in one.parts]
        replicas = tuple(placement[number] for number in numbers)
        return cls(
            replicas,
            {
                (numbers.index(pipeline), stage): held
                for (pipeline, stage), held in stages.items()
                if pipeline in numbers
            },
            [communicators[number] for number in numbers],
        )

    @property
    def pipelines(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and ranks of each."""
        return [(replica.name, replica.ranks) for replica in self.replicas]

    def told(self, num_micro_batches: Sequence[int], gradient_norms: Mapping[str, float]) -> RankRound:
        """What the losses computed here gave of the round's micro-batches. num_micro_batches: by pipeline."""
        metrics, heads_said, of_text = {}, {}, {}
        for (pipeline, stage), held in self.stages.items():
            replica = self.replicas[pipeline]
            if stage == len(replica.ranks) - 1:
                of_all = [held.metrics[index] for index in range(num_micro_batches[pipeline])]
                kept = [tensor for one in of_all if (tensor := said(one)) is not None]
                if kept:
                    heads_said[replica.model] = _on_host(kept)
                else:
                    metrics[replica.model] = _numbers([one for one in of_all if not is_of_text(one)])
                if texts := [one for one in of_all if is_of_text(one)]:
                    of_text[replica.model] = _numbers(texts)
        return RankRound(metrics=metrics, gradient_norms=gradient_norms, said=heads_said, auxiliary=of_text)


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """By one wait for the device."""
    return [one.clone() for one in torch.cat(list(tensors)).cpu().split([len(one) for one in tensors])]


def _numbers(metrics: Sequence[Metrics]) -> list[dict[Metric, float]]:
    """On the host, by one wait for the device."""
    rows = torch.stack([torch.stack([value.float() for value in row.values()]) for row in metrics]).tolist()
    return [dict(zip(of_one, row, strict=True)) for of_one, row in zip(metrics, rows, strict=True)]
