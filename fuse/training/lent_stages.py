"""Stages of a model that hold other weights for a while, and get their own back to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fuse.intrastage.stage import TrainedStage


class LentStages:
    """Of one model, all that a rank holds. In host memory lies what is their own; optimizers are left alone.

    weights: of a whole model of the same shapes, by Hugging Face name. Frozen ones may be left out, and stay; those in
        use stay where they are, for other models may compute by them.

    Raises: ValueError for weights that do not fit.
    """

    def __init__(self, stages: Iterable[TrainedStage], weights: Mapping[str, Tensor]) -> None:
        self._stages = tuple(stages)
        self._own = [
            {
                name: parameter.detach().to("cpu", copy=True) if parameter.requires_grad else parameter.detach()
                for name, parameter in stage.named_parameters()
            }
            for stage in self._stages
        ]
        for stage in self._stages:
            frozen = {name: one for name, one in stage.named_parameters() if not one.requires_grad}
            for name in frozen.keys() & weights.keys():
                frozen[name].data = torch.empty_like(frozen[name])
            stage.load_state_dict(weights, kept=frozen.keys() - weights.keys())

    def take_back(self) -> None:
        """Give them their own weights again."""
        with torch.no_grad():
            for stage, own in zip(self._stages, self._own, strict=True):
                for name, parameter in stage.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(own[name])
                    else:
                        parameter.data = own[name]
