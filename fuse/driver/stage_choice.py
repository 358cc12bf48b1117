"""Where models are cut, and whether two opposite replicas train sooner than plain 1F1B, by measured times."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fuse.driver.model_size import ModelSize
from fuse.intrastage.measurement_store import Measured
from fuse.intrastage.opposite import UpdateCosts
from fuse.intrastage.placement import Counts, Replica, describe, share_ranks
from fuse.intrastage.search_time import SearchTime
from fuse.intrastage.stage_balance import LayerCosts, balance_stages, predicted_step_s, unfused_stages
from fuse.training.model_spec import ModelSpec

_logger = logging.getLogger(__name__)

_FUSED_SHARE = 0.75
"""Of the time, for the stages to train in; the rest is for those of training without fusion, which reports name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """Cuts placements of the models that train.

    specs, costs: by role. tick_s: that the costs count in. is_fused: replicas that share ranks train at once.
    tensor_parallel_size: devices that share a stage. within: for all searches together.
    """

    specs: Mapping[str, ModelSpec]
    costs: Mapping[str, LayerCosts]
    num_micro_batches: Counts
    is_fused: bool
    tensor_parallel_size: int
    tick_s: float
    within: SearchTime

    def cut(self, placement: tuple[Replica, ...]) -> Measured:
        """The placement with the layers of each stage, and the directions, that train soonest."""
        return self._cut(placement, self.within)

    def _cut(self, placement: tuple[Replica, ...], within: SearchTime) -> Measured:
        layers = {role: spec.num_layers for role, spec in self.specs.items()}
        asked = self.costs, placement, layers, self.num_micro_batches
        is_fused = self._is_fused(placement)
        balanced = balance_stages(*asked, is_fused=is_fused, tick_s=self.tick_s, within=within.part(_FUSED_SHARE))
        unfused = unfused_stages(*asked, tick_s=self.tick_s, within=within) if is_fused else None
        return Measured(balanced, None, unfused)

    def cut_with_update(
        self, placement: tuple[Replica, ...], costs: UpdateCosts, within: SearchTime | None = None
    ) -> Measured:
        """As `cut`, and what optimizer steps take. within: a part of the time."""
        sizes = {role: ModelSize.of(spec) for role, spec in self.specs.items()}

        def update_s(stages: tuple[Replica, ...]) -> float:
            parameters = {}
            for replica in stages:
                size = sizes[replica.model]
                trained = map(sum, size.tensors_of(replica, trained=True))
                parameters[replica.model] = [each / self.tensor_parallel_size for each in trained]
            return costs.seconds(stages, parameters)

        made = self._cut(placement, within or self.within)
        unfused = made.unfused and replace(made.unfused, update_s=update_s(made.unfused.placement))
        return replace(made, unfused=unfused, update_s=update_s(made.placement))

    def soonest(self, plain: tuple[Replica, ...], opposite: tuple[Replica, ...], costs: UpdateCosts) -> Measured:
        """The one of two placements that is predicted to take less time for a step: the second has opposite replicas.

        Messages between stages are left out; a step has as many either way.
        """
        plain_stages = self.cut_with_update(plain, costs, self.within.part(0.5))
        opposite_stages = self.cut_with_update(opposite, costs)
        plain_s, opposite_s = self._step_s(plain_stages), self._step_s(opposite_stages)
        is_sooner = opposite_s < plain_s
        _logger.info(
            "%s: a step of %s should take %.3f s by two opposite replicas, %.3f s by plain 1F1B, sums of "
            "gradients and the optimizer included: %.2f times as fast",
            "two opposite replicas of the actor" if is_sooner else "plain 1F1B",
            *(describe(self.num_micro_batches), opposite_s, plain_s, plain_s / opposite_s),
        )
        return opposite_stages if is_sooner else plain_stages

    def _step_s(self, stages: Measured) -> float:
        assert stages.update_s is not None
        return stages.update_s + predicted_step_s(
            self.costs,
            stages.placement,
            self.num_micro_batches,
            is_fused=self._is_fused(stages.placement),
            tick_s=self.tick_s,
        )

    def _is_fused(self, placement: tuple[Replica, ...]) -> bool:
        return self.is_fused and share_ranks(placement)
