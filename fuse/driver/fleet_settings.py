"""Which workers a run has and how they work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from fuse.driver.engine_choice import EngineFactory
from fuse.driver.memory_setup import MemorySetup
from fuse.driver.mixing import Mixing
from fuse.interstage.rollout_planner import RolloutSettings
from fuse.interstage.tail import Sharing
from fuse.intrastage.forward_only import Scorer
from fuse.intrastage.placement import Counts, Replica, most_replicas, num_micro_batches, replicas_of
from fuse.intrastage.plan_settings import PlanSettings
from fuse.intrastage.stage import Exported
from fuse.intrastage.training_schedule import serial_schedule
from fuse.roles import GENERATING
from fuse.training.late_scores import SCORED_BY
from fuse.training.layer_costs import TypicalBatch
from fuse.training.model_spec import ModelSpec, Origin
from fuse.training.rank import TrainingSettings
from fuse.training.regrouping import Dealing
from fuse.training.rounds import Round
from fuse.training.scoring import ScoringSettings
from fuse.workers.kv.transfer import MakeKVTransfer


@dataclass(frozen=True, slots=True)
class Variant:
    """Which model that trains a role's is, by its role, and the adapter that it computes by; None for none."""

    of: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Which workers a run has, and how they work.

    generation_dtype: what engines compute in, and so the type in which weights travel there.
    pad_token_id: what ends the tokens of a response that count; None where they all count, up to a stop token.
    micro_batches_per_step: the most that train at once.
    placement: every replica of the models that train, in the order of the schedules' pipelines.
    alternative: a placement to take instead where measured times favour it, which needs `balance`.
    balance: a micro-batch of typical size; with it, models are cut where measured times favour it.
    memory: what the run's memory depends on; None where it is not planned.
    engines_sleep: during training. offloads_training: what trains lies in host memory while samples are generated.
    exported: which of the policy's weights go to engines after an update.
    engine_devices: that share each engine, a divisor of the devices.
    tail_sharing: how decoding and training slow one another down on a device; None where that is not known.
    variants: by role, models that score and are one that trains, with another adapter or none.
    origins: by role, as of `ModelSpec`.
    output_dir: where workers write checkpoints, which all hosts must share; None where none are written.
    late: columns of targets that training steps may score; see `fuse.training.late_scores`.
    mixing: how a model that only scores follows the policy; None where none does.
    """

    num_devices: int
    accelerator: Literal["cpu", "cuda"]
    ray_address: str | None
    pad_token_id: int | None
    engine: EngineFactory
    generation_dtype: torch.dtype
    kv_transfer: MakeKVTransfer
    scoring: ScoringSettings
    training: TrainingSettings
    placement: tuple[Replica, ...]
    micro_batches_per_step: Counts
    balance: TypicalBatch | None
    plan: PlanSettings
    rollout: RolloutSettings
    memory: MemorySetup | None = None
    engines_sleep: bool = False
    offloads_training: bool = False
    alternative: tuple[Replica, ...] | None = None
    mixing: Mixing | None = None
    late: frozenset[str] = frozenset()
    output_dir: Path | None = None
    engine_devices: int = 1
    exported: Exported = "trained"
    tail_sharing: Sharing | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)
    origins: Mapping[str, Mapping[str, Origin]] = field(default_factory=dict)

    @property
    def mixed_roles(self) -> tuple[str, ...]:
        """Models that only score and yet change: part of the training state."""
        return () if self.mixing is None else (self.mixing.role,)

    def spec(self, role: str, model: PreTrainedModel) -> ModelSpec:
        """How workers build it. One that is mixed is held in float32, in which small moves are not rounded away."""
        spec = replace(ModelSpec.of(model), origins=self.origins.get(role, {}))
        if (variant := self.variants.get(role)) is not None:
            adapters = replace(spec.adapters, active=variant.adapter)
            return replace(spec, adapters=adapters, variant_of=variant.of)
        return replace(spec, dtype=torch.float32) if role in self.mixed_roles else spec

    @property
    def scorers(self) -> list[Scorer]:
        """Who scores them: stages that train, or shares of a model over all devices; no whole copies."""
        return [
            Scorer(
                name=column,
                model=GENERATING,
                ranks=None if role == GENERATING or role in self.variants else tuple(range(self.num_devices)),
            )
            for column, role in SCORED_BY.items()
            if column in self.late and (role == GENERATING or self.scoring.is_sharded)
        ]

    def for_updates(self, num_updates: int) -> FleetSettings:
        """The same for a run that has so many left. For a single one nothing is measured beforehand."""
        settings = replace(self, plan=replace(self.plan, num_updates=num_updates))
        return settings if num_updates > 1 else replace(settings, balance=None, alternative=None)

    @property
    def num_replicas(self) -> dict[str, int]:
        """Of each model that trains."""
        return dict(Counter(replica.model for replica in self.placement))

    def _counts(self, one: Round) -> Counts:
        """Micro-batches of the round, where they are dealt with one at least for each replica."""
        units, dealing = self.training.units, Dealing(replicas=most_replicas(self.placement))
        added = {
            role: dealing.number(len(part.micro_batches), sum(map(len, part.micro_batches)) // units[role])
            - len(part.micro_batches)
            for role, part in one.parts.items()
            if role in units
        }
        return tuple((name, count + added.get(name, 0)) for name, count in one.counts)

    def for_rounds(self, rounds: Sequence[Round]) -> FleetSettings:
        """The same for a run whose updates have rounds like these.

        Raises: ValueError when one cannot be scheduled.
        """
        counts = [self._counts(one) for one in rounds]
        for one in counts:
            serial_schedule(replicas_of(self.placement, one), one)
        most = {
            role: max([least, *(num_micro_batches(one, role) for one in counts)])
            for role, least in self.num_replicas.items()
        }
        return replace(self, micro_batches_per_step=tuple(most.items()))
