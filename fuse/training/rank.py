"""One rank of training: its stages of the models that train, what they communicate through, their optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuse.algorithms.algorithm import LossNormalization
from fuse.algorithms.batch import Experience, Targets
from fuse.intrastage import communication
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.executor import execute
from fuse.intrastage.measure import measure
from fuse.intrastage.memory_probe import MemoryProbe
from fuse.intrastage.observed import MEMORY
from fuse.intrastage.optimizer import AVERAGE, AdamWConfig, ModelOptimizer
from fuse.intrastage.placement import Counts, Replica
from fuse.intrastage.program import program_of
from fuse.intrastage.stage import Exported, TrainedStage
from fuse.intrastage.training_schedule import RankPlan, serial_schedule
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Loss
from fuse.trace import SpanRecorder
from fuse.training import state
from fuse.training.auxiliary import WithText
from fuse.training.frozen_tensors import FrozenTensors, release_frozen
from fuse.training.late_scores import LateScores, Scorers
from fuse.training.layout import Layout
from fuse.training.micro_batches import index_of_largest
from fuse.training.model_spec import ModelSpec
from fuse.training.observing import record_messages, record_observed
from fuse.training.offload import Offload
from fuse.training.regrouping import Remembering
from fuse.training.round_micro_batches import RoundMicroBatches
from fuse.training.rounds import RankRound, Round, StepPart
from fuse.training.running import Running

TAIL = "tail"
"""The category of operations of `TrainingRank.accumulate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How to train, the same on every rank.

    backend: what stages are made of. split_backward: whether they can defer weight gradients.
    tensor_parallel_size: devices that share each stage: rank r of the schedules is devices r * size and those after it.
    losses, targets: by role that trains. layout: what micro-batches are made like.
    autocast: the type to compute in; None for float32. average_decays: by role of which an average is kept.
    timeout_s: a peer that does not answer for so long counts as lost. loss_normalization: as of `Algorithm`.
    units: of the roles whose micro-batches are regrouped, into at least `least_micro_batches` of a step.
    """

    backend: Literal["transformers", "megatron"]
    split_backward: bool
    losses: Mapping[str, Loss]
    targets: Mapping[str, type[Targets]]
    layout: Layout
    adamw: AdamWConfig
    autocast: torch.dtype | None
    gradient_checkpointing: bool
    timeout_s: float
    tensor_parallel_size: int = 1
    average_decays: Mapping[str, float] = field(default_factory=dict)
    loss_normalization: LossNormalization = "micro_batch"
    units: Mapping[str, int] = field(default_factory=dict)
    least_micro_batches: int = 1

    def build_stage(
        self,
        role: str,
        spec: ModelSpec,
        *,
        stage: int,
        num_stages: int,
        layer_range: tuple[int, int] | None,
        device: torch.device,
        tensor_group: dist.ProcessGroup | None,
    ) -> TrainedStage:
        """A stage of this role's model, whose parameters are yet to be loaded."""
        stage_class: Any = partial(TransformersStage, **spec.stage_options(self.autocast))
        if self.backend == "megatron":
            from fuse.intrastage.megatron_stage import MegatronStage  # imports megatron-core

            stage_class = partial(MegatronStage, tensor_group=tensor_group)
        made: TrainedStage = stage_class(
            spec.model_class,
            spec.config,
            stage=stage,
            num_stages=num_stages,
            layer_range=layer_range,
            loss=Remembering(WithText(self.losses[role])),
            device=device,
            autocast=self.autocast,
            gradient_checkpointing=self.gradient_checkpointing,
            split_backward=self.split_backward,
        )
        made.freeze(spec.frozen)
        return made


class TrainingRank:
    """What one device trains; all devices of the world build it at once, and call its methods at once.

    device_index: of the world. tensor_group: the devices that share this one's stages; None for itself alone.
    placement: every replica of the models that train, in the order of the schedules' pipelines.
    frozen: those of the process.
    offload: puts weights and moments away until another method needs them.
    """

    def __init__(
        self,
        device_index: int,
        device: torch.device,
        specs: Mapping[str, ModelSpec],
        placement: tuple[Replica, ...],
        settings: TrainingSettings,
        recorder: SpanRecorder,
        tensor_group: dist.ProcessGroup | None = None,
        *,
        frozen: FrozenTensors | None = None,
    ) -> None:
        self._rank, self._lane = divmod(device_index, settings.tensor_parallel_size)
        self.is_first_of_group = self._lane == 0
        self._device, self._recorder = device, recorder
        self._placement, self._settings = placement, settings
        self._specs, self._frozen = specs, frozen or FrozenTensors()
        self._observed_models: set[str] = set()
        self._stages: dict[tuple[int, int], TrainedStage] = {
            (pipeline, stage): settings.build_stage(
                replica.model,
                specs[replica.model],
                stage=stage,
                num_stages=len(replica.ranks),
                layer_range=None if replica.layer_ranges is None else replica.layer_ranges[stage],
                device=device,
                tensor_group=tensor_group,
            )
            for pipeline, replica in enumerate(placement)
            for stage, owner in enumerate(replica.ranks)
            if owner == self._rank
        }
        for (pipeline, _), held in self._stages.items():
            release_frozen(held.named_parameters(), specs[placement[pipeline].model].origins)
        self._pipelines = [(replica.name, replica.ranks) for replica in placement]
        self._communicators = communication.open_pipelines(
            self._pipelines, settings.timeout_s, settings.tensor_parallel_size
        )
        self._optimizers: dict[str, ModelOptimizer] = {
            model: ModelOptimizer(
                model,
                self.stages_of(model),
                communication.open_model(
                    [replica.ranks for replica in placement if replica.model == model],
                    settings.timeout_s,
                    settings.tensor_parallel_size,
                ),
                settings.adamw,
                frozen=spec.frozen,
                average_decay=settings.average_decays.get(model),
            )
            for model, spec in specs.items()
        }
        self.offload = Offload(self._optimizers, device, recorder)

    def stages_of(self, model: str) -> dict[tuple[int, int], TrainedStage]:
        """This rank's stages of a model by (replica, stage)."""
        return {
            (self._placement[pipeline].index, stage): held
            for (pipeline, stage), held in self._stages.items()
            if self._placement[pipeline].model == model
        }

    def forward_pipelines(
        self,
    ) -> list[tuple[Replica, tuple[int, ...], dict[int, TrainedStage], communication.Communicator]]:
        """Of each replica: the devices of its stages in this lane, the stages held here, and what messages go through.

        Messages of training and of others may not be under way at once.
        """
        size = self._settings.tensor_parallel_size
        return [
            (
                replica,
                tuple(rank * size + self._lane for rank in replica.ranks),
                {stage: held for (number, stage), held in self._stages.items() if number == pipeline},
                self._communicators[pipeline].forward,
            )
            for pipeline, replica in enumerate(self._placement)
        ]

    def train(
        self,
        experience: Experience,
        rounds: Sequence[Round],
        learning_rates: Sequence[Mapping[str, float]],
        plans: Mapping[Counts, RankPlan],
        scorers: Scorers = MappingProxyType({}),
    ) -> list[RankRound]:
        """Take all optimizer steps of an update, a round of them by the plan for its micro-batches.

        learning_rates: by round, of the roles in it. scorers: of what the rounds score.
        """
        self.offload.bring_all()
        late = LateScores(experience, scorers, self._settings.layout, self._device, self._lane)
        told = [
            self._round(late, one, rates, plans[one.counts]) for one, rates in zip(rounds, learning_rates, strict=True)
        ]
        for optimizer in self._optimizers.values():
            optimizer.gradients.close()
        return told

    def _round(self, late: LateScores, one: Round, learning_rates: Mapping[str, float], plan: RankPlan) -> RankRound:
        trained = Running.of(one, self._placement, self._stages, self._communicators)
        of_trained = self._made_of(late.experience).per_pipeline(one, trained.replicas)
        running, scoring, per_pipeline = late.beside(one, trained, of_trained)
        for model in one.parts.keys() & self._optimizers.keys():
            self._optimizers[model].gradients.open()
        problem, probes = plan.program.problem, dict[tuple[int, int], MemoryProbe]()
        if plan.is_watched and not self._observed_models >= one.parts.keys():
            self._observed_models |= one.parts.keys()
            record_messages(self._recorder, self._rank, problem, trained, of_trained)
            largest = [index_of_largest(own) for own in per_pipeline]
            probes = {key: MemoryProbe(stage, largest[key[0]]) for key, stage in running.stages.items()}
        execute(
            plan.program,
            self._rank,
            {**running.stages, **probes, **scoring},
            per_pipeline,
            running.communicators,
            self._recorder,
        )
        scored = late.finish(one)
        for (pipeline, stage), probe in probes.items():
            shown = per_pipeline[pipeline][index_of_largest(per_pipeline[pipeline])]
            sizes = {"activation_bytes": probe.activation_bytes, "weight_grad_bytes": probe.weight_grad_bytes}
            record_observed(self._recorder, MEMORY, problem, pipeline, stage, shown, 0.0, sizes)
        norms = self._step(one, learning_rates)
        return replace(trained.told([len(own) for own in of_trained], norms), scored=scored)

    def _step(self, one: Round, learning_rates: Mapping[str, float]) -> dict[str, float]:
        """Step the models whose steps the round ends. Returns the norms of their gradients."""
        stepping = {
            model: optimizer
            for model, optimizer in self._optimizers.items()
            if model in one.parts and one.parts[model].is_last
        }
        # A rank waits for others within sums and shares, and for the slowest once if all models come to them together.
        norms = {
            model: optimizer.reduce(partial(self._recorder.span, f"norm {model}", "optimizer"))
            for model, optimizer in stepping.items()
        }
        for model, optimizer in stepping.items():
            with self._recorder.span(f"step {model}", "optimizer"):
                optimizer.apply(norms[model], learning_rates[model])
        for optimizer in stepping.values():
            optimizer.share()
        return norms

    def accumulate(self, model: str, replica: int, experience: Experience, part: StepPart) -> RankRound:
        """Add to a replica's gradients those of micro-batches of its coming optimizer step, by 1F1B.

        All ranks of the replica call this at once, and no others; one that has none of its stages does nothing.
        """
        self.offload.bring_all()
        pipelines = [(one.model, one.index) for one in self._placement]
        number = pipelines.index((model, replica))
        alone = replace(self._placement[number], index=0)
        held = {(0, stage): one for (pipeline, stage), one in self._stages.items() if pipeline == number}
        running = Running((alone,), held, [self._communicators[number]])
        program = program_of(serial_schedule((alone,), ((model, len(part.micro_batches)),)))
        per_pipeline = self._made_of(experience).per_pipeline(Round({model: part}), (alone,))
        args = program, self._rank, held, per_pipeline, running.communicators, self._recorder
        execute(*args, category=TAIL)
        return running.told([len(part.micro_batches)], {})

    def scale_gradients(self, model: str, factor: float) -> None:
        """Multiply what has been added up of a model's gradients here since its last optimizer step."""
        for stage in self.stages_of(model).values():
            for _, parameter in stage.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def profile(self, experience: Experience, micro_batches: Sequence[Sequence[int]], in_turn: bool = False) -> Profile:
        """Measure this rank's operations and messages on micro-batches of these samples; in_turn: others then idle."""
        self.offload.bring_all()
        of_samples = self._made_of(experience)
        made = [of_samples.by_role(samples) for samples in micro_batches]
        per_pipeline = [[by_role[replica.model] for by_role in made] for replica in self._placement]
        with self._recorder.span("profile", "train"):
            args = self._rank, self._pipelines, self._stages, per_pipeline, self._communicators
            return measure(*args, in_turn=in_turn)

    def _made_of(self, experience: Experience) -> RoundMicroBatches:
        return RoundMicroBatches(experience, self._settings.layout, self._device)

    def load_weights(self, model: str, state_dict: Mapping[str, Tensor]) -> None:
        """Have the stages held here begin with a whole model's weights: copies, but of those that have an origin."""
        self.offload.bring_all()
        for stage in self.stages_of(model).values():
            kept = self._frozen.adopt(stage.named_parameters(), self._specs[model].origins, state_dict)
            stage.load_state_dict(state_dict, kept=kept)

    def exported_shapes(self, model: str, part: Exported) -> dict[str, torch.Size]:
        """Of what this device and those that share its stages tell of a model, by Hugging Face name, in that order."""
        return {name: shape for stage in self._told(model) for name, shape in stage.exported_shapes(part).items()}

    def stream_weights(self, model: str, dtype: torch.dtype, part: Exported) -> Iterator[tuple[str, Tensor]]:
        """What has `exported_shapes`, one tensor at a time; devices that share stages ask in step.

        Each weight is told by the first of one such group alone.
        """
        self.offload.bring_weights(model)
        for stage in self._told(model):
            yield from stage.export_weights(dtype, part)

    def export_weights(self, model: str, part: Exported = "whole") -> dict[str, Tensor]:
        """What this device tells of a model, at once."""
        state_dict = dict(self.stream_weights(model, torch.float32, part))
        return state_dict if self.is_first_of_group else {}

    def export_average(self, model: str) -> dict[str, Tensor]:
        """What this device has of a model's average."""
        self.offload.bring_all()
        return self._optimizers[model].export_state(AVERAGE)

    def _told(self, model: str) -> list[TrainedStage]:
        return [stage for (replica, _), stage in self.stages_of(model).items() if replica == 0]

    def save(self, directory: Path, models: Mapping[str, nn.Module]) -> dict[str, int]:
        """Write this rank's part of the training state; returns the bytes of the files it sees there, by name.

        models: whole ones that are part of it without being trained, by role.
        """
        self.offload.bring_all()
        return state.save_state(directory, self._optimizers, models)

    def load(self, directory: Path, models: Mapping[str, nn.Module]) -> None:
        """Read this rank's part of a training state, whatever ranks wrote it. models: as of `save`."""
        self.offload.bring_all()
        state.load_state(directory, self._optimizers, models)
