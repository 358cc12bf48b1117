"""Log-probabilities that losses need and nothing else does, computed within the training steps that need them.

They are columns of an actor's targets: log-probabilities of before the update, by the actor's own training stages, and
those of the reference, by the shares of it that all devices have. An algorithm says which of them its loss alone reads
(`Algorithm.late`). The estimate of advantages leaves such a column as it is, and the micro-batches of a step are scored
by forward-only pipelines in its schedule, each before its loss is computed. Which step scores what:

- the old log-probabilities of all samples are of the weights before the first optimizer step, so that step scores all;
- the reference does not change: each step scores its own samples, unless an earlier one has.

A micro-batch is scored as it is trained, on the same padding. Scored apart, samples are in other micro-batches, which
moves roundings of values, and in float32 nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fuse.algorithms.batch import Experience, Targets
from fuse.intrastage.communication import PipelineCommunicators, all_reduce_sum
from fuse.intrastage.forward_flow import ForwardPipeline
from fuse.intrastage.forward_only import ScorerStage
from fuse.intrastage.placement import Replica, replica_micro_batches
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch
from fuse.roles import GENERATING
from fuse.sample import Sample
from fuse.training.layout import Layout
from fuse.training.micro_batches import rows_of_samples
from fuse.training.rounds import Round, ScoredSamples
from fuse.training.running import Running

OLD_LOGPROBS, REFERENCE_LOGPROBS = "old_logprobs", "reference_logprobs"
SCORED_BY: Mapping[str, str] = {OLD_LOGPROBS: GENERATING, REFERENCE_LOGPROBS: "reference"}
"""Columns of targets, in the order of their pipelines, and the roles whose models compute them."""

_FIELDS: Mapping[str, str] = {OLD_LOGPROBS: "trainer_logprobs", REFERENCE_LOGPROBS: "reference_logprobs"}
"""Of a sample."""

Scorers = Mapping[str, Sequence[ForwardPipeline]]
"""By column, a pipeline for every replica of the model that trains on it."""


def with_scores(rounds: Sequence[Round], columns: Collection[str]) -> list[Round]:
    """The rounds of an update with what each scores. columns: those that are not known yet."""
    scored = {column: _micro_batches(rounds, column) for column in SCORED_BY if column in columns}
    return [
        replace(one, scored={column: of_rounds[index] for column, of_rounds in scored.items() if of_rounds[index]})
        for index, one in enumerate(rounds)
    ]


def _micro_batches(rounds: Sequence[Round], column: str) -> list[tuple[tuple[int, ...], ...]]:
    """That every round scores."""
    known: set[int] = set()
    made: list[tuple[tuple[int, ...], ...]] = []
    for one in rounds:
        micro_batches = one.parts[GENERATING].micro_batches
        samples = {sample for own in micro_batches for sample in own}
        made.append(() if samples <= known else micro_batches)
        known |= samples
    if column == OLD_LOGPROBS:
        every = dict.fromkeys(own for micro_batches in made for own in micro_batches)
        return [tuple(every), *(() for _ in made[1:])]
    return made


def fill(experience: Experience, column: str, found: Sequence[ScoredSamples]) -> None:
    """Write a column of these samples."""
    targets = experience.targets[GENERATING]
    offsets = experience.segments.offsets(targets.positions)
    for samples, values in found:
        getattr(targets, column)[rows_of_samples(offsets, samples)] = values.cpu()


def tell(experience: Experience, columns: Collection[str], samples: Sequence[Sample]) -> None:
    """Have samples of an update that is over know what was scored in it, but for those that nothing was learnt from.

    samples: those that the experience was made of, in its order.
    """
    targets = experience.targets[GENERATING]
    offsets = experience.segments.offsets(targets.positions).tolist()
    for column in columns:
        values = getattr(targets, column).numpy()
        for index, sample in enumerate(samples):
            if experience.lengths[index] == sample.length:
                setattr(sample, _FIELDS[column], values[offsets[index] : offsets[index + 1]])


@dataclass(slots=True, eq=False)
class LateScores:
    """What one rank scores within an update's steps.

    experience: becomes a copy whose columns are filled in as rounds are over. lane: of this device among those that
    share stages, of which all have the same scores.
    """

    experience: Experience
    scorers: Scorers
    layout: Layout
    device: torch.device
    lane: int
    _found: dict[str, list[ScoredSamples]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scorers:
            return
        targets: Any = self.experience.targets[GENERATING]
        copied: Targets = replace(targets, **{column: getattr(targets, column).clone() for column in self.scorers})
        self.experience = replace(self.experience, targets={**self.experience.targets, GENERATING: copied})

    def beside(
        self, one: Round, running: Running, per_pipeline: Sequence[Sequence[MicroBatch]]
    ) -> tuple[Running, dict[tuple[int, int], Stage], list[list[MicroBatch]]]:
        """What runs in a round with what is scored in it: the pipelines, this rank's scoring stages, micro-batches."""
        replicas, communicators = list(running.replicas), list(running.communicators)
        made = [list(own) for own in per_pipeline]
        stages: dict[tuple[int, int], Stage] = {}
        for column, micro_batches in one.scored.items():
            trained = [number for number, replica in enumerate(running.replicas) if replica.model == GENERATING]
            for index, (number, pipeline) in enumerate(zip(trained, self.scorers[column], strict=True)):
                own = [micro_batches[i] for i in replica_micro_batches(len(micro_batches), len(trained), index)]
                learned = made[number]
                keep = partial(self._keep, column, own, learned)
                for stage, held in pipeline.stages.items():
                    is_last = stage == len(pipeline.ranks) - 1
                    stages[len(replicas), stage] = ScorerStage(held, pipeline.read, keep if is_last else None)
                replicas.append(Replica(column, index, pipeline.ranks, scores=GENERATING))
                communicators.append(PipelineCommunicators(pipeline.communicator, pipeline.communicator))
                rest = [self._micro_batch(samples) for samples in own[len(learned) :]]
                made.append([_to_score(each) for each in (*learned[: len(own)], *rest)])
        return Running(tuple(replicas), running.stages, communicators), stages, made

    def _micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        return self.layout.micro_batches(self.experience, samples, 1.0)[GENERATING].to(self.device)

    def _keep(
        self, column: str, own: Sequence[tuple[int, ...]], learned: Sequence[MicroBatch], index: int, values: Tensor
    ) -> None:
        """Have the loss of the micro-batch see its values."""
        if index < len(learned):
            getattr(learned[index].targets, column).copy_(values)
        self._found.setdefault(column, []).append((own[index], values))

    def finish(self, one: Round) -> dict[str, list[ScoredSamples]]:
        """After a round: what was scored here. Where there are several replicas, all ranks then have all of it."""
        found = {
            column: [(samples, values.float().cpu()) for samples, values in self._found.pop(column, [])]
            for column in one.scored
        }
        for column, micro_batches in one.scored.items():
            known = found[column]
            if len(self.scorers[column]) > 1:
                known = self._shared(column, micro_batches, known)
            fill(self.experience, column, known)
        return found

    def _shared(
        self, column: str, micro_batches: Sequence[tuple[int, ...]], found: Sequence[ScoredSamples]
    ) -> list[ScoredSamples]:
        """Every sample's values, added up over all devices: they are of one lane of one rank, and nothing elsewhere."""
        offsets = self.experience.segments.offsets(self.experience.targets[GENERATING].positions)
        sizes = [len(rows_of_samples(offsets, samples)) for samples in micro_batches]
        values = torch.zeros(sum(sizes), device=self.device)
        own = dict(found) if self.lane == 0 else {}
        for samples, place in zip(micro_batches, values.split(sizes), strict=True):
            if samples in own:
                place.copy_(own[samples])
        all_reduce_sum(values, None, f"{column} of all replicas")
        return list(zip(micro_batches, values.cpu().split(sizes), strict=True))


def _to_score(micro_batch: MicroBatch) -> MicroBatch:
    """The same sequences and positions, for a readout of log-probabilities."""
    return replace(micro_batch, targets=micro_batch.targets.token_ids, row_weights=None, weight=1.0)
