"""The model worker: a device's training stages of actor and critic, and its copies of the models that score."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fuse.experience import Experience
from fuse.intrastage import communication
from fuse.intrastage.executor import execute
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.plan import ModelName, Replica, pipeline_name, replica_micro_batches, serial_schedule
from fuse.intrastage.stage import MicroBatch
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.state_dict import load_state_dict
from fuse.steps import OptimizerStep
from fuse.trace import Span, SpanRecorder
from fuse.workers import inference, state
from fuse.workers.losses import ActorLoss, CriticLoss
from fuse.workers.micro_batches import padded, ragged
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

Role = Literal["reference", "reward", "critic"]
"""The models that score: the critic's inference copy follows its training stages."""
MODELS: tuple[ModelName, ...] = ("actor", "critic")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """How to build a model without its weights."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSpec:
        return cls(model_class=type(model), config=model.config, dtype=model.dtype)

    def build(self, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in evaluation mode, its parameters yet to be loaded; `dtype` in place of its own."""
        with no_init_weights():
            model: Any = self.model_class(copy.deepcopy(self.config))
        built: PreTrainedModel = model.to(device=device, dtype=dtype or self.dtype).eval().requires_grad_(False)
        return built


@dataclass(frozen=True, slots=True)
class Inference:
    """What the scoring models say of a sequence of n response tokens.

    reference_logprobs: [n]. values: [n + 1], before each token and after the last. score: None without a reward model.
    """

    reference_logprobs: NDArray[np.float32]
    values: NDArray[np.float32]
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How to train, the same on every worker.

    placement: every replica of actor and critic, in the order of the schedule's pipelines.
    autocast: the type to compute in; None for float32.
    pad_token_id: lays micro-batches out padded, as TRL does; None for ragged ones.
    timeout_s: a peer that does not answer for so long counts as lost.
    """

    placement: tuple[Replica, ...]
    temperature: float
    cliprange: float
    vf_coef: float
    cliprange_value: float
    adamw: AdamWConfig
    autocast: torch.dtype | None
    gradient_checkpointing: bool
    pad_token_id: int | None
    timeout_s: float

    def check(self, num_micro_batches: int) -> None:
        """Raises: ValueError when that many micro-batches per optimizer step cannot be scheduled."""
        serial_schedule(self.placement, num_micro_batches)

    def replicas(self, model: ModelName) -> list[Replica]:
        return [replica for replica in self.placement if replica.model == model]


class ModelWorker:
    """Runs on one device, as rank `rank` of the model workers' world.

    Call `serve_store` on rank 0, then `connect` on all ranks at once, then `load_training_weights`.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        trained: Mapping[ModelName, ModelSpec],
        scoring: Mapping[Role, ModelSpec],
        settings: TrainingSettings,
        limit: inference.MicroBatchLimit,
    ) -> None:
        self._rank = rank
        self._device = torch.device(device)
        self._settings = settings
        self._recorder = SpanRecorder()
        self._losses: dict[ModelName, ActorLoss | CriticLoss] = {
            "actor": ActorLoss(temperature=settings.temperature, cliprange=settings.cliprange),
            "critic": CriticLoss(vf_coef=settings.vf_coef, cliprange_value=settings.cliprange_value),
        }
        self._stages: dict[tuple[int, int], TransformersStage] = {
            (pipeline, stage): TransformersStage(
                trained[replica.model].model_class,
                trained[replica.model].config,
                stage=stage,
                num_stages=len(replica.ranks),
                loss=self._losses[replica.model],
                device=self._device,
                autocast=settings.autocast,
                gradient_checkpointing=settings.gradient_checkpointing,
            )
            for pipeline, replica in enumerate(settings.placement)
            for stage, owner in enumerate(replica.ranks)
            if owner == rank
        }
        self._limit = limit
        self._scoring: dict[Role, PreTrainedModel] = {
            role: self._whole_stage("critic") or spec.build(self._device, torch.float32)
            if role == "critic"
            else spec.build(self._device)
            for role, spec in scoring.items()
        }

    def _whole_stage(self, model: ModelName) -> PreTrainedModel | None:
        """The model itself, where this rank trains all of it: then it needs no copy to score with."""
        (stage,) = self._stages_of(model).values()
        return stage.model if stage.num_stages == 1 else None

    # The world

    def serve_store(self, host: str) -> int:
        """Open the store at which the ranks meet; returns its port."""
        self._store = communication.serve_store(host, self._settings.timeout_s)
        return self._store.port

    def connect(self, host: str, port: int, world_size: int) -> None:
        """Join the world, and open what actor and critic communicate through."""
        settings = self._settings
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        communication.connect(self._rank, world_size, host, port, backend, settings.timeout_s)
        self._communicators = communication.open_pipelines(
            [(pipeline_name(replica), replica.ranks) for replica in settings.placement],
            settings.timeout_s,
        )
        self._optimizers: dict[str, ModelOptimizer] = {
            model: ModelOptimizer(
                model,
                self._stages_of(model),
                communication.open_model([replica.ranks for replica in settings.replicas(model)], settings.timeout_s),
                settings.adamw,
            )
            for model in MODELS
        }

    def _stages_of(self, model: ModelName) -> dict[tuple[int, int], TransformersStage]:
        """This rank's stages of a model by (replica, stage)."""
        placement = self._settings.placement
        return {
            (placement[pipeline].index, stage): held
            for (pipeline, stage), held in self._stages.items()
            if placement[pipeline].model == model
        }

    # Training

    def train(
        self, experience: Experience, steps: Sequence[OptimizerStep], learning_rate: float
    ) -> list[dict[ModelName, list[dict[str, float]]]]:
        """Take all optimizer steps of an update.

        Returns, per step, the statistics of the micro-batches whose loss was computed here, in the order of the
        replica's micro-batches; all ranks call this at once.
        """
        return [self._step(experience, step, learning_rate) for step in steps]

    def _step(
        self, experience: Experience, step: OptimizerStep, learning_rate: float
    ) -> dict[ModelName, list[dict[str, float]]]:
        for loss in self._losses.values():
            loss.accumulation = step.accumulation
        pairs = [self._micro_batches(experience, samples) for samples in step.micro_batches]
        per_pipeline = [
            [
                pairs[index][MODELS.index(replica.model)]
                for index in replica_micro_batches(
                    len(pairs), len(self._settings.replicas(replica.model)), replica.index
                )
            ]
            for replica in self._settings.placement
        ]
        schedule = serial_schedule(self._settings.placement, len(pairs))
        execute(schedule, self._rank, self._stages, per_pipeline, self._communicators, self._recorder)
        for model in MODELS:
            with self._recorder.span(f"step {model}", "optimizer"):
                self._optimizers[model].step(learning_rate)
        return {model: self._losses[model].statistics.drain() for model in MODELS}

    def _micro_batches(self, experience: Experience, samples: Sequence[int]) -> tuple[MicroBatch, MicroBatch]:
        pad_token_id = self._settings.pad_token_id
        pair = ragged(experience, samples) if pad_token_id is None else padded(experience, samples, pad_token_id)
        return pair[0].to(self._device), pair[1].to(self._device)

    # Inference

    def infer(self, sequences: Sequence[inference.TokenSequence]) -> list[Inference]:
        """Score sequences by every model that scores."""
        limit, autocast = self._limit, self._settings.autocast
        recorder, scoring = self._recorder, self._scoring
        num_tokens = sum(len(sequence) for sequence in sequences)
        with recorder.span("reference", "infer", samples=len(sequences), tokens=num_tokens):
            logprobs = inference.reference_logprobs(
                scoring["reference"], sequences, self._settings.temperature, limit=limit, autocast=autocast
            )
        with recorder.span("critic", "infer", samples=len(sequences), tokens=num_tokens):
            values = inference.values(scoring["critic"], sequences, sys.maxsize, limit=limit, autocast=autocast)
        scores: Sequence[float | None] = [None] * len(sequences)
        if "reward" in scoring:
            with recorder.span("reward", "infer", samples=len(sequences), tokens=num_tokens):
                scores = inference.scores(scoring["reward"], sequences, limit=limit, autocast=autocast)
        return [Inference(*results) for results in zip(logprobs, values, scores, strict=True)]

    # Weights and checkpoints

    def load_training_weights(self, model: ModelName, weights: Sequence[WeightsRef]) -> None:
        """Copy a model's initial weights into the stages held here."""
        state_dict = get_state_dict(weights)
        for stage in self._stages_of(model).values():
            stage.load_state_dict(state_dict)

    def load_scoring_weights(self, role: Role, weights: Sequence[WeightsRef]) -> None:
        """Copy weights into a scoring model; names that tied parameters share may be left out."""
        if role == "critic" and self._whole_stage("critic") is not None:
            return
        with self._recorder.span(f"load {role}", "weights"):
            load_state_dict(self._scoring[role], get_state_dict(weights))

    def export_weights(self, model: ModelName) -> WeightsRef | None:
        """Put this rank's stage of a model into the object store; None from all replicas but the first."""
        stages = [stage for (replica, _), stage in self._stages_of(model).items() if replica == 0]
        if not stages:
            return None
        with self._recorder.span(f"export {model}", "weights"):
            (stage,) = stages
            repeated = frozenset() if stage.is_first else stage.tied_names
            return put_state_dict(
                {name: parameter for name, parameter in stage.named_parameters() if name not in repeated}
            )

    def save(self, directory: Path) -> None:
        """Write this rank's part of the training state; all ranks call this at once."""
        state.save_state(directory, self._optimizers)

    def load(self, directory: Path) -> None:
        """Read this rank's part of a training state, whatever ranks wrote it."""
        state.load_state(directory, self._optimizers)

    # Observability

    def drain_spans(self) -> list[Span]:
        """Spans since the last call."""
        return self._recorder.drain()
