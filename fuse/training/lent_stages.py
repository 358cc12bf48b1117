"""Stages of a model that hold other weights for a while, and get their own back to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fuse.intrastage.stage import TrainedStage


class LentStages:
    """Of one model, all that a rank holds. In host memory lies what is their own; optimizers are left alone.

    weights: of a whole model of the same shapes, by Hugging Face name.

    Raises: ValueError for weights that do not fit.
    """

    def __init__(self, stages: Iterable[TrainedStage], weights: Mapping[str, Tensor]) -> None:
        self._stages = tuple(stages)
        self._own = [
            {name: parameter.detach().to("cpu", copy=True) for name, parameter in stage.named_parameters()}
            for stage in self._stages
        ]
        for stage in self._stages:
            stage.load_state_dict(weights)

    def take_back(self) -> None:
        """Give them their own weights again."""
        with torch.no_grad():
            for stage, own in zip(self._stages, self._own, strict=True):
                for name, parameter in stage.named_parameters():
                    parameter.copy_(own[name])
