"""The model worker: a device's training stages, and its copies or shares of the models that score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fuse.algorithms.batch import Experience
from fuse.device_clock import clock_of
from fuse.intrastage import communication
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.opposite import UpdateCosts
from fuse.intrastage.packing import use_packing
from fuse.intrastage.placement import Replica
from fuse.intrastage.stage import Exported
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.memory_use import usage_spans
from fuse.state_dict import WeightLayout, WeightStream, adopt_tensors, mix_tensors
from fuse.trace import Span, SpanRecorder
from fuse.training import scoring
from fuse.training.frozen_tensors import FrozenTensors, release_frozen
from fuse.training.layer_costs import TypicalBatch, measure_layer_costs
from fuse.training.lent_stages import LentStages
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.reading import TokenSequence
from fuse.training.rounds import RankRound, StepPart
from fuse.training.score_pipelines import Piece, Scored, ScorePipelines, kind_of
from fuse.training.update_costs import measure_update_costs
from fuse.training.update_piece import UpdatePiece
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.host_memory import give_back_if_scarce
from fuse.workers.weight_port import Membership, WeightPort, WeightSender
from fuse.workers.weights import WeightsRef, get_state_dict, get_weights, put_state_dict


class ModelWorker:
    """Runs on one device, as rank `rank` of the model workers' world.

    trained, scoring: by role; a model that does both scores by a copy, which follows its training stages. Where scoring
        is sharded, it scores through these stages themselves, and of others there is a share here in place of a copy.

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
        self._recorder = SpanRecorder(clock_of(self._device))
        self._num_inferences = 0
        self._port, self._senders = WeightPort(), dict[str, WeightSender]()
        self._frozen = FrozenTensors()

    # The world

    def serve_store(self, host: str) -> int:
        """Open the store at which the ranks meet; returns its port."""
        self._store = communication.serve_store(host, self._settings.timeout_s)
        return self._store.port

    def connect(self, host: str, port: int, world_size: int) -> None:
        """Join the world."""
        settings, self._world_size = self._settings, world_size
        communication.connect(self._rank, world_size, host, port, self._device, settings.timeout_s)
        self._tensor_group = communication.open_tensor_group(settings.tensor_parallel_size, settings.timeout_s)

    def measure_layer_costs(self, batch: TypicalBatch, tick_s: float) -> Profile:
        """What layers of the trained models cost here; all ranks call this at once."""
        rank = self._rank // self._settings.tensor_parallel_size
        return measure_layer_costs(rank, self._device, self._tensor_group, self._trained, self._settings, batch, tick_s)

    def measure_update_costs(self) -> UpdateCosts:
        """What sums of gradients and the optimizer cost here; all ranks call this at once."""
        return measure_update_costs(self._world_size, self._device)

    def place(self, placement: tuple[Replica, ...]) -> None:
        """Build the stages and the scoring models that belong here; all ranks call this at once."""
        self._training = TrainingRank(
            self._rank,
            self._device,
            self._trained,
            placement,
            self._settings,
            self._recorder,
            self._tensor_group,
            frozen=self._frozen,
        )
        is_sharded = self._scoring_settings.is_sharded
        self._scoring: dict[str, PreTrainedModel] = {
            role: self._scored_in_place(role) or self._copy_of(role, spec)
            for role, spec in self._scoring_specs.items()
            if not is_sharded
        }
        self._pipelines = ScorePipelines(
            self._rank,
            self._world_size,
            self._device,
            {
                role: (spec, self._scoring_dtype(role))
                for role, spec in self._scoring_specs.items()
                if is_sharded and self._source(role) not in self._trained
            },
            self._training,
            self._scoring_settings,
            self._recorder,
            self._settings.timeout_s,
            variants={
                role: spec for role, spec in self._scoring_specs.items() if is_sharded and spec.variant_of is not None
            },
        )

    def _copy_of(self, role: str, spec: ModelSpec) -> PreTrainedModel:
        """Without weights yet."""
        model = spec.build(self._device, self._scoring_dtype(role))
        use_packing(model, self._device.type)
        release_frozen(model.named_parameters(), spec.origins)
        return model

    def _scoring_dtype(self, role: str) -> torch.dtype:
        """What a copy holds: a type to compute in rounds float32 anew, and what was rounded before may stay so."""
        is_rounded = self._settings.autocast is not None and role not in self._trained
        return self._scoring_specs[role].dtype if is_rounded else torch.float32

    def _source(self, role: str) -> str:
        """Whose weights a role has: another's, of whose model it is a variant, or its own."""
        spec = self._scoring_specs.get(role)
        return role if spec is None or spec.variant_of is None else spec.variant_of

    def _scored_in_place(self, role: str) -> PreTrainedModel | None:
        """The model itself, where this rank trains all of it in one stage: then it needs no copy to score with."""
        stages = list(self._training.stages_of(self._source(role)).values())
        stage = stages[0] if len(stages) == 1 else None
        return stage.model if isinstance(stage, TransformersStage) and stage.num_stages == 1 else None

    # Training

    def train(self, piece: UpdatePiece) -> list[RankRound]:
        """Take all optimizer steps of a piece of an update; all ranks call this at once. See `TrainingRank.train`."""
        columns = {column for one in piece.rounds for column in one.scored}
        scorers = {column: own for column, own in self._pipelines.scorers.items() if column in columns}
        self._give_back()  # what scoring has freed lies between what stays
        trained = self._training.train(piece.experience, piece.rounds, piece.learning_rates, piece.plans, scorers)
        self._give_back()  # gradients and activations: engines and scoring come next
        return trained

    def accumulate(self, model: str, replica: int, experience: Experience, part: StepPart) -> RankRound:
        """Train micro-batches of the coming optimizer step now; all ranks of the replica call this at once.

        See `TrainingRank.accumulate`.
        """
        return self._training.accumulate(model, replica, experience, part)

    def scale_gradients(self, model: str, factor: float) -> None:
        """Multiply what has been accumulated of a model's gradients here."""
        self._training.scale_gradients(model, factor)

    def offload_training(self, kept: Sequence[str] = ()) -> None:
        """Move what trains to host memory until it is needed, but for weights that score where they train, and `kept`.

        kept: models whose weights are about to be sent.
        """
        is_sharded = self._scoring_settings.is_sharded
        scoring = [role for role in self._scoring_specs if is_sharded or self._scored_in_place(role) is not None]
        scores = map(self._source, scoring)
        copies = [self._scoring[role] for role in self._scoring if self.has_copy(role)]
        shares = [share.model for share in self._pipelines.shares.values()]
        staying = [parameter for model in (*copies, *shares) for parameter in model.parameters()]
        self._training.offload.put_away([*scores, *kept], staying)

    def free_bytes(self) -> int | None:
        """Memory that training could still take on this device; None on a CPU, whose memory has other users.

        Gradients of what was trained early count as free: they are there in every step, and no part of what is left.
        """
        if self._device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        stages = [stage for model in self._trained for stage in self._training.stages_of(model).values()]
        parameters = [parameter for stage in stages for _, parameter in stage.named_parameters()]
        return free + cached + sum(one.grad.nbytes for one in parameters if one.grad is not None)

    # Inference

    def infer(self, sequences: Sequence[TokenSequence]) -> list[scoring.Inference]:
        """Score sequences by every model that scores."""
        self._num_inferences += 1
        sizes: dict[str, object] = {"samples": len(sequences), "tokens": sum(map(len, sequences))}
        sizes |= {"call": self._num_inferences, "sample_ids": [sequence.sample_id for sequence in sequences]}
        said: dict[str, Sequence[Any]] = {}
        for role, model in self._scoring.items():
            with self._recorder.span(role, "infer", **sizes), self._scoring_specs[role].adapters.activated(model):
                read = [sequence.read_by(role) for sequence in sequences]
                said[role] = scoring.score(kind_of(role), model, read, self._scoring_settings)
        return scoring.inferences(said)

    def advance(self, piece: Piece | None) -> list[Scored]:
        """Have a piece enter the pipelines, or all come to its end; all ranks are called in one same order."""
        for role in () if piece is None else map(self._source, piece.roles):
            if role in self._trained:
                self._training.offload.bring_weights(role)
        return self._pipelines.advance(piece)

    # Weights and checkpoints

    def load_training_weights(self, model: str, weights: Mapping[str, WeightsRef]) -> None:
        """Have the stages held here begin with these weights. weights: as of `get_weights`."""
        self._training.load_weights(model, get_weights(model, weights, self._trained[model].origins))

    def load_scoring_weights(self, role: str, weights: Mapping[str, WeightsRef]) -> None:
        """Have a scoring model compute with these weights, as of `get_weights`."""
        share, origins = self._pipelines.shares.get(role), self._scoring_specs[role].origins
        if share is None and not self.has_copy(role):
            return
        with self._recorder.span(f"load {role}", "weights"):
            given = get_weights(role, weights, origins)
            if share is None:
                self._frozen.adopt_whole(self._scoring[role], origins, given)
            else:
                share.load_state_dict(given, kept=self._frozen.adopt(share.named_parameters(), origins, given))

    def lend_stages(self, model: str, weights: Sequence[WeightsRef]) -> None:
        """Have a model's stages hold these weights until `take_back_stages`; nothing may train meanwhile."""
        self._training.offload.bring_weights(model)
        self._lent = LentStages(self._training.stages_of(model).values(), get_state_dict(weights))

    def take_back_stages(self, model: str) -> None:
        """Have them hold their own again."""
        self._training.offload.bring_weights(model)
        self._lent.take_back()
        del self._lent

    def export_scoring_weights(self, role: str) -> WeightsRef:
        """Put a model that only scores into the object store."""
        return put_state_dict(self._scoring[role].state_dict())

    # Weights of an update, a bucket at a time

    def begin_export(
        self, model: str, to: str, dtype: torch.dtype, most_bytes: int, part: Exported
    ) -> dict[str, torch.Size]:
        """Prepare to send what this rank has of this part of a model in this type, in buckets of at most so many bytes.

        Returns the shapes of what it will send, by name. See `WeightSender`.
        """
        shapes = self._training.exported_shapes(model, part)
        tensors = self._training.stream_weights(model, dtype, part)
        device, is_silent = self._device, not self._training.is_first_of_group
        sender = WeightSender(shapes, tensors, dtype, device, most_bytes=most_bytes, is_silent=is_silent)
        self._senders[to] = sender
        return {} if is_silent else shapes

    def export_next(self, to: str, group: str | None) -> Parcel | None:
        """The next bucket of it, broadcast to that group as well; None after the last one, and of a silent sender.

        Ranks that share stages are called in step. Pre: whoever got the one before has done with it.
        """
        with self._recorder.span("export", "weights"):
            return self._senders[to].next(self._port.group(group))

    def end_export(self, to: str) -> None:
        """Send no more of it, and free what the last bucket takes."""
        self._senders.pop(to).close()

    def has_copy(self, role: str) -> bool:
        """Whether this rank scores by a model's copy, which must be given its weights."""
        return role in self._scoring and self._scored_in_place(role) is None

    def begin_copy(self, role: str, shapes: Mapping[str, torch.Size]) -> None:
        """Raises: ValueError when weights of these shapes do not fit the copy, which keeps what is frozen."""
        WeightLayout.of(self._scoring[role]).check(WeightStream(shapes, ()), kept=self._scoring_specs[role].frozen)

    def copy(self, role: str, parcels: Sequence[Parcel], alpha: float | None) -> None:
        """Have a copy compute with these of its weights; or let it move towards them, as of `mix_tensors`."""
        tensors = self._port.receive(parcels)
        if alpha is None:
            with self._recorder.span(f"load {role}", "weights"):
                adopt_tensors(self._scoring[role], tensors)
        else:
            with self._recorder.span(f"mix {role}", "weights"):
                mix_tensors(self._scoring[role], tensors, alpha)

    def serve_group(self, host: str) -> int:
        """Open a store at which the members of a broadcast group meet; returns its port."""
        self._group_store = communication.serve_store(host, self._settings.timeout_s)
        return self._group_store.port

    def join(self, own: Membership) -> None:
        """Become a member of a group to which weights are broadcast; all members do at once."""
        self._port.join(own)

    def leave(self, group: str) -> None:
        """Leave a group that has lost a member."""
        self._port.leave(group)

    def export_weights(self, model: str, part: Exported) -> WeightsRef | None:
        """Put what this rank has of this part of a model into the object store; None where another replica's does."""
        with self._recorder.span(f"export {model}", "weights"):
            state_dict = self._training.export_weights(model, part)
            return put_state_dict(state_dict) if state_dict else None

    def export_average(self, model: str) -> WeightsRef:
        """Put what this rank has of a model's average into the object store."""
        with self._recorder.span(f"export {model}", "weights"):
            return put_state_dict(self._training.export_average(model))

    def save(self, directory: Path, mixed: Sequence[str] = ()) -> dict[str, int]:
        """Write this rank's part of the training state; all ranks call this at once. See `save_state`.

        mixed: models that only score and are part of it; every rank has all of them, and the first writes them.
        """
        seen = self._training.save(directory, self._scoring_models(mixed) if self._rank == 0 else {})
        self._give_back()  # files as they were made
        return seen

    def _give_back(self) -> None:
        if self._device.type == "cpu":
            give_back_if_scarce()

    def load(self, directory: Path, mixed: Sequence[str] = ()) -> None:
        """Read this rank's part of a training state, whatever ranks wrote it. mixed: as of `save`."""
        self._training.load(directory, self._scoring_models(mixed))

    def _scoring_models(self, roles: Sequence[str]) -> dict[str, PreTrainedModel]:
        return {role: self._scoring[role] for role in roles}

    # Observability

    def drain_spans(self) -> list[Span]:
        """Spans since the last call; the last one tells memory."""
        return [*self._recorder.drain(), *usage_spans()]
