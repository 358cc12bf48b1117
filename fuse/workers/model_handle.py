"""What the driver holds of a model worker: the worker's methods, each of which returns at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fuse.algorithms.batch import Experience
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.opposite import UpdateCosts
from fuse.intrastage.placement import Replica
from fuse.intrastage.stage import Exported
from fuse.trace import Span
from fuse.training.layer_costs import TypicalBatch
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingSettings
from fuse.training.reading import TokenSequence
from fuse.training.rounds import RankRound, StepPart
from fuse.training.score_pipelines import Piece, Scored
from fuse.training.scoring import Inference, ScoringSettings
from fuse.training.update_piece import UpdatePiece
from fuse.workers.calls import Future, Remote, Worker, as_received
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.cluster import Accelerator, Cluster
from fuse.workers.model_worker import ModelWorker
from fuse.workers.weight_port import Membership
from fuse.workers.weights import WeightsRef

_ROLE = "model worker"


@dataclass(frozen=True, slots=True, eq=False)
class ModelHandle:
    """A `ModelWorker` in a process of its own, which has these methods under the same names."""

    worker: Worker[ModelWorker]

    @classmethod
    def spawn(
        cls,
        cluster: Cluster,
        device: int,
        accelerator: Accelerator,
        trained: Mapping[str, ModelSpec],
        scoring: Mapping[str, ModelSpec],
        settings: TrainingSettings,
        scoring_settings: ScoringSettings,
    ) -> ModelHandle:
        """Make the worker of a device, whose rank is the device's index; returns before it is made."""
        worker = cluster.spawn(
            _ROLE, device, ModelWorker, device, accelerator, trained, scoring, settings, scoring_settings
        )
        return cls(worker)

    def serve_store(self, host: str) -> Future[int]:
        """Open the store at which the ranks meet; returns its port."""
        return self.worker.call(ModelWorker.serve_store, host)

    def connect(self, host: str, port: int, world_size: int) -> Future[None]:
        """Join the world."""
        return self.worker.call(ModelWorker.connect, host, port, world_size)

    def measure_layer_costs(self, batch: TypicalBatch, tick_s: float) -> Future[Profile]:
        """What parts of the trained models cost there; all ranks are called at once."""
        return self.worker.call(ModelWorker.measure_layer_costs, batch, tick_s)

    def measure_update_costs(self) -> Future[UpdateCosts]:
        """What sums of gradients and the optimizer cost there; all ranks are called at once."""
        return self.worker.call(ModelWorker.measure_update_costs)

    def place(self, placement: tuple[Replica, ...]) -> Future[None]:
        """Build the stages and the scoring models that belong there; all ranks are called at once."""
        return self.worker.call(ModelWorker.place, placement)

    def train(self, piece: Remote[UpdatePiece]) -> Future[list[RankRound]]:
        """Take all optimizer steps of a piece of an update; all ranks are called at once."""
        return self.worker.call(ModelWorker.train, as_received(piece))

    def accumulate(self, model: str, replica: int, experience: Remote[Experience], part: StepPart) -> Future[RankRound]:
        """Train micro-batches of the coming optimizer step now; all ranks of the replica are called at once."""
        return self.worker.call(ModelWorker.accumulate, model, replica, as_received(experience), part)

    def scale_gradients(self, model: str, factor: float) -> Future[None]:
        """Multiply what has been accumulated of a model's gradients there."""
        return self.worker.call(ModelWorker.scale_gradients, model, factor)

    def offload_training(self, kept: Sequence[str] = ()) -> Future[None]:
        """Move what trains to host memory until it is needed, but for the weights of `kept` models."""
        return self.worker.call(ModelWorker.offload_training, kept)

    def free_bytes(self) -> Future[int | None]:
        """Memory that training could still take on the device; None on a CPU."""
        return self.worker.call(ModelWorker.free_bytes)

    def infer(self, sequences: Sequence[TokenSequence]) -> Future[list[Inference]]:
        """Score sequences by every model that scores."""
        return self.worker.call(ModelWorker.infer, sequences)

    def advance(self, piece: Piece | None) -> Future[list[Scored]]:
        """Have a piece enter the pipelines that score, or all come to its end; all ranks are called in one order."""
        return self.worker.call(ModelWorker.advance, piece)

    def load_training_weights(self, model: str, weights: Mapping[str, WeightsRef]) -> Future[None]:
        """Copy a model's initial weights into the stages held there."""
        return self.worker.call(ModelWorker.load_training_weights, model, weights)

    def load_scoring_weights(self, role: str, weights: Mapping[str, WeightsRef]) -> Future[None]:
        """Have a scoring model compute with these weights."""
        return self.worker.call(ModelWorker.load_scoring_weights, role, weights)

    def lend_stages(self, model: str, weights: Sequence[WeightsRef]) -> Future[None]:
        """Have a model's stages there hold these weights for a while."""
        return self.worker.call(ModelWorker.lend_stages, model, weights)

    def take_back_stages(self, model: str) -> Future[None]:
        """Have them hold their own again."""
        return self.worker.call(ModelWorker.take_back_stages, model)

    def export_scoring_weights(self, role: str) -> Future[WeightsRef]:
        """Put a model that only scores into the object store."""
        return self.worker.call(ModelWorker.export_scoring_weights, role)

    def begin_export(
        self, model: str, to: str, dtype: torch.dtype, most_bytes: int, part: Exported
    ) -> Future[dict[str, torch.Size]]:
        """Prepare to send the rank's part of a model; the shapes of what it will send, by name."""
        return self.worker.call(ModelWorker.begin_export, model, to, dtype, most_bytes, part)

    def export_next(self, to: str, group: str | None) -> Future[Parcel | None]:
        """The next bucket of it, broadcast to that group as well; None after the last one, and of a silent sender."""
        return self.worker.call(ModelWorker.export_next, to, group)

    def end_export(self, to: str) -> Future[None]:
        """Send no more of it."""
        return self.worker.call(ModelWorker.end_export, to)

    def has_copy(self, role: str) -> Future[bool]:
        """Whether the rank scores by a model's copy, which must be given its weights."""
        return self.worker.call(ModelWorker.has_copy, role)

    def begin_copy(self, role: str, shapes: Mapping[str, torch.Size]) -> Future[None]:
        """Whether weights of these shapes fit the copy."""
        return self.worker.call(ModelWorker.begin_copy, role, shapes)

    def copy(self, role: str, parcels: Sequence[Parcel], alpha: float | None) -> Future[None]:
        """Have a copy compute with these of its weights, or move towards them."""
        return self.worker.call(ModelWorker.copy, role, parcels, alpha)

    def serve_group(self, host: str) -> Future[int]:
        """Open a store at which the members of a broadcast group meet; its port."""
        return self.worker.call(ModelWorker.serve_group, host)

    def join(self, own: Membership) -> Future[None]:
        """Become a member of a group to which weights are broadcast; all members do at once."""
        return self.worker.call(ModelWorker.join, own)

    def leave(self, group: str) -> Future[None]:
        """Leave a group that has lost a member."""
        return self.worker.call(ModelWorker.leave, group)

    def export_weights(self, model: str, part: Exported) -> Future[WeightsRef | None]:
        """Put the rank's part of a model into the object store; None where another replica's does."""
        return self.worker.call(ModelWorker.export_weights, model, part)

    def export_average(self, model: str) -> Future[WeightsRef]:
        """Put what the rank has of a model's average into the object store."""
        return self.worker.call(ModelWorker.export_average, model)

    def save(self, directory: Path, mixed: Sequence[str] = ()) -> Future[dict[str, int]]:
        """Write the rank's part of the training state, with `mixed` models that only score; all ranks are called at
        once. See `save_state`."""
        return self.worker.call(ModelWorker.save, directory, mixed)

    def load(self, directory: Path, mixed: Sequence[str] = ()) -> Future[None]:
        """Read the rank's part of a training state, with `mixed` models that only score."""
        return self.worker.call(ModelWorker.load, directory, mixed)

    def drain_spans(self) -> Future[list[Span]]:
        """Spans since the last call."""
        return self.worker.call(ModelWorker.drain_spans)
