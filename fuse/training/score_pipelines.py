"""Scoring through pipelines: each device has a share of every model that scores, and samples flow through all of them.

A model that trains is scored through its training stages, whatever their layout; of others each device has a stage of
its own, with an even share of the layers, and no one has a copy. Sequences come in pieces, which every device gets in
the same order. A piece is cut into the same micro-batches as a whole copy would make of it, so that in float32 every
score has the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fuse.intrastage.adapters import SwitchedStage
from fuse.intrastage.communication import Communicator
from fuse.intrastage.forward_flow import ForwardFlow, ForwardPipeline, Passage
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics
from fuse.roles import ScoreKind, role_of
from fuse.trace import SpanRecorder
from fuse.training.late_scores import SCORED_BY, Scorers
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank
from fuse.training.reading import Reading, TokenSequence
from fuse.training.scoring import (
    ScoringSettings,
    laid_out,
    micro_batches,
    reading_of,
    results,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Sequences that are scored together. number: of this piece among those under way. roles: the models that score."""

    number: int
    roles: tuple[str, ...]
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says of some of a piece's sequences. indices: which; results: of each, [its rows]."""

    piece: int
    role: str
    indices: tuple[int, ...]
    results: tuple[Any, ...]


def kind_of(role: str) -> ScoreKind:
    """What a role's model says: where it does not score, the log-probabilities of what was sampled."""
    return role_of(role).scores or "reference_logprobs"


class ScorePipelines:
    """One device's part of scoring; all devices of the world build it at once, and call `advance` in the same order.

    specs: by role, models of which each device has a share, and their parameters' types. They do not train.
    variants: by role, models that are scored through the stages of those that train, by other adapters or by none.
    """

    def __init__(
        self,
        device_index: int,
        num_devices: int,
        device: torch.device,
        specs: Mapping[str, tuple[ModelSpec, torch.dtype]],
        training: TrainingRank,
        settings: ScoringSettings,
        recorder: SpanRecorder,
        timeout_s: float,
        *,
        variants: Mapping[str, ModelSpec] = MappingProxyType({}),
    ) -> None:
        self._settings, self._device = settings, device
        self.shares = {
            role: TransformersStage(
                spec.model_class,
                spec.config,
                stage=device_index,
                num_stages=num_devices,
                loss=_no_loss,
                device=device,
                autocast=settings.autocast,
                dtype=dtype,
                adapters=spec.adapters,
            )
            for role, (spec, dtype) in specs.items()
        }
        for share in self.shares.values():
            share.model.requires_grad_(False)
        self._pipelines = pipelines = list[ForwardPipeline]()
        self._numbers: dict[str, list[int]] = {}
        self._readings: dict[str, Reading] = {}

        def add(role: str, ranks: Sequence[int], stages: Mapping[int, Any], communicator: Any) -> None:
            config = specs[role][0].config if role in specs else None
            self._readings[role] = reading_of(kind_of(role), settings, config)
            self._numbers.setdefault(role, []).append(len(pipelines))
            pipelines.append(
                ForwardPipeline(
                    name=role,
                    ranks=tuple(ranks),
                    stages=stages,
                    communicator=communicator,
                    read=self._readings[role].read,
                    category="infer" if role_of(role).scores else "logprobs",
                )
            )

        for replica, devices, stages, communicator in training.forward_pipelines():
            add(replica.model, devices, stages, communicator)
            for role, spec in variants.items():
                if spec.variant_of == replica.model:
                    switched = {number: SwitchedStage(stage, spec.adapters) for number, stage in stages.items()}
                    add(role, devices, switched, communicator)
        if specs:
            every = range(num_devices)
            shared = Communicator("scoring", every, step=1, timeout_s=timeout_s)
            for role, share in self.shares.items():
                add(role, every, {device_index: share}, shared)
        self._flow = ForwardFlow(device_index, pipelines, recorder)
        self._num_entered = Counter[str]()
        self._num_waves = 0

    @property
    def scorers(self) -> Scorers:
        """What can score within training, for every replica of the actor or for the only one."""
        return {
            column: [self._pipelines[number] for number in self._numbers[role]]
            for column, role in SCORED_BY.items()
            if role in self._numbers
        }

    def advance(self, piece: Piece | None) -> list[Scored]:
        """Have a piece enter, or, with None, let all that is under way come to its end.

        Returns what last stages here have said meanwhile.
        """
        found: list[Scored] = []
        for wave in [] if piece is None else self._waves(piece):
            found += map(self._scored, self._flow.tick(wave))
        while piece is None and not self._flow.is_empty:
            found += map(self._scored, self._flow.tick())
        return found

    def _waves(self, piece: Piece) -> Iterator[list[Passage]]:
        """What enters at each tick: a micro-batch for each model, as long as it has some."""
        cuts = {role: self._cut(role, piece.sequences) for role in piece.roles}
        for wave in range(max((len(cut) for cut in cuts.values()), default=0)):
            entering = {role: cut[wave] for role, cut in cuts.items() if wave < len(cut)}
            self._num_waves += 1
            counts = [(len(own), sum(map(len, own))) for _, own in entering.values()]
            samples, tokens = max(counts, key=lambda count: count[1])
            sizes: dict[str, object] = {"samples": samples, "tokens": tokens, "call": self._num_waves}
            yield [self._enter(piece.number, role, *one, sizes) for role, one in entering.items()]

    def _cut(self, role: str, sequences: Sequence[TokenSequence]) -> list[tuple[list[int], list[TokenSequence]]]:
        """Micro-batches: the sequences' indices, and what the model reads of them."""
        seen = [one.read_by(role) for one in sequences]
        cut = micro_batches([len(one) for one in seen], self._settings.limit)
        return [(indices, [seen[index] for index in indices]) for indices in cut]

    def _enter(
        self, piece: int, role: str, indices: list[int], sequences: list[TokenSequence], sizes: Mapping[str, object]
    ) -> Passage:
        """By the replicas of the model in turn; its spans tell whose samples they are about."""
        numbers = self._numbers[role]
        number = numbers[self._num_entered[role] % len(numbers)]
        self._num_entered[role] += 1
        return Passage(
            pipeline=number,
            key=_Key(piece, role, tuple(indices), tuple(sequences)),
            micro_batch=laid_out(sequences, self._readings[role]).to(self._device),
            sizes={**sizes, "sample_ids": [one.sample_id for one in sequences]},
        )

    def _scored(self, result: tuple[Any, Tensor]) -> Scored:
        key, flat = result
        said = results(flat, key.sequences, self._readings[key.role])
        return Scored(key.piece, key.role, key.indices, tuple(said))


@dataclass(frozen=True, slots=True, eq=False)
class _Key:
    """What a passage is of."""

    piece: int
    role: str
    indices: tuple[int, ...]
    sequences: tuple[TokenSequence, ...]


def _no_loss(*_: object) -> tuple[Tensor, Metrics]:
    raise AssertionError("a share of a model that scores does not train")
