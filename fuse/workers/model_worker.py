"""The model worker: a device's training stages, and its copies of the models that score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fuse.algorithms.batch import Experience
from fuse.intrastage import communication
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.placement import Counts, Replica
from fuse.intrastage.training_schedule import Plan
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.roles import ROLES, ScoreKind
from fuse.state_dict import adopt_state_dict
from fuse.trace import Span, SpanRecorder
from fuse.training import scoring
from fuse.training.layer_costs import TypicalBatch, measure_layer_costs
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.rounds import RankRound, Round
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict


class ModelWorker:
    """Runs on one device, as rank `rank` of the model workers' world.

    trained, scoring: by role; a model that does both scores by a copy, which follows its training stages.

    Call `serve_store` on rank 0, then `connect` and `place` on all ranks at once, then `load_training_weights`.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        trained: Mapping[str, ModelSpec],
        scoring: Mapping[str, ModelSpec],
        settings: TrainingSettings,
        scoring_settings: scoring.ScoringSettings,
    ) -> None:
        self._rank, self._device = rank, torch.device(device)
        self._trained, self._scoring_specs = trained, scoring
        self._settings, self._scoring_settings = settings, scoring_settings
        self._recorder = SpanRecorder()
        self._num_inferences = 0

    # The world

    def serve_store(self, host: str) -> int:
        """Open the store at which the ranks meet; returns its port."""
        self._store = communication.serve_store(host, self._settings.timeout_s)
        return self._store.port

    def connect(self, host: str, port: int, world_size: int) -> None:
        """Join the world."""
        settings = self._settings
        communication.connect(self._rank, world_size, host, port, self._device, settings.timeout_s)
        self._tensor_group = communication.open_tensor_group(settings.tensor_parallel_size, settings.timeout_s)

    def measure_layer_costs(self, batch: TypicalBatch, tick_s: float) -> Profile:
        """What layers of the trained models cost here; all ranks call this at once."""
        rank = self._rank // self._settings.tensor_parallel_size
        return measure_layer_costs(rank, self._device, self._tensor_group, self._trained, self._settings, batch, tick_s)

    def place(self, placement: tuple[Replica, ...]) -> None:
        """Build the stages and the scoring models that belong here; all ranks call this at once."""
        self._training = TrainingRank(
            self._rank, self._device, self._trained, placement, self._settings, self._recorder, self._tensor_group
        )
        self._scoring: dict[str, PreTrainedModel] = {
            role: self._trained_here(role) or spec.build(self._device, self._scoring_dtype(role))
            for role, spec in self._scoring_specs.items()
        }

    def _scoring_dtype(self, role: str) -> torch.dtype:
        """What a copy holds: a type to compute in rounds float32 anew, and what was rounded before may stay so."""
        is_rounded = self._settings.autocast is not None and role not in self._trained
        return self._scoring_specs[role].dtype if is_rounded else torch.float32

    def _trained_here(self, role: str) -> PreTrainedModel | None:
        """The model itself, where this rank trains all of it in one stage: then it needs no copy to score with."""
        stages = list(self._training.stages_of(role).values())
        stage = stages[0] if len(stages) == 1 else None
        return stage.model if isinstance(stage, TransformersStage) and stage.num_stages == 1 else None

    # Training

    def train(
        self,
        experience: Experience,
        rounds: Sequence[Round],
        learning_rates: Sequence[Mapping[str, float]],
        plans: Mapping[Counts, Plan],
    ) -> list[RankRound]:
        """Take all optimizer steps of an update; all ranks call this at once. See `TrainingRank.train`."""
        return self._training.train(experience, rounds, learning_rates, plans)

    def free_bytes(self) -> int | None:
        """Memory that training could still take on this device; None on a CPU, whose memory has other users."""
        if self._device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + cached

    # Inference

    def infer(self, sequences: Sequence[scoring.TokenSequence]) -> list[scoring.Inference]:
        """Score sequences by every model that scores."""
        self._num_inferences += 1
        sizes = {"samples": len(sequences), "tokens": sum(map(len, sequences)), "call": self._num_inferences}
        results: dict[ScoreKind, Sequence[Any]] = {}
        for role, model in self._scoring.items():
            kind = ROLES[role].scores
            assert kind is not None
            with self._recorder.span(role, "infer", **sizes):
                results[kind] = scoring.score(kind, model, sequences, self._scoring_settings)
        return [
            scoring.Inference(**dict(zip(results, of_one, strict=True)))
            for of_one in zip(*results.values(), strict=True)
        ]

    # Weights and checkpoints

    def load_training_weights(self, model: str, weights: Sequence[WeightsRef]) -> None:
        """Copy a model's initial weights into the stages held here."""
        self._training.load_weights(model, get_state_dict(weights))

    def load_scoring_weights(self, role: str, weights: Sequence[WeightsRef]) -> None:
        """Have a scoring model compute with these weights; names that tied parameters share may be left out."""
        if self._trained_here(role) is not None:
            return
        with self._recorder.span(f"load {role}", "weights"):
            adopt_state_dict(self._scoring[role], get_state_dict(weights))

    def export_weights(self, model: str) -> WeightsRef | None:
        """Put this rank's part of a model into the object store; None where another replica's does."""
        with self._recorder.span(f"export {model}", "weights"):
            state_dict = self._training.export_weights(model)
            return put_state_dict(state_dict) if state_dict else None

    def save(self, directory: Path) -> dict[str, int]:
        """Write this rank's part of the training state; all ranks call this at once. See `save_state`."""
        return self._training.save(directory)

    def load(self, directory: Path) -> None:
        """Read this rank's part of a training state, whatever ranks wrote it."""
        self._training.load(directory)

    # Observability

    def drain_spans(self) -> list[Span]:
        """Spans since the last call."""
        return self._recorder.drain()
