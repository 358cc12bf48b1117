"""Averages of weights, from the stages that keep them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fuse.state_dict import load_state_dict
from fuse.workers.calls import gather
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import get_state_dict


def fetch_average(model: nn.Module, workers: Sequence[ModelHandle], role: str) -> None:
    """Copy a role's average into a model like it, which has the parameters already that do not train.

    Ranks may tell of the same parameter, as of copies of a tied one, and then of the same average.
    """
    average: dict[str, Tensor] = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    for part in gather([worker.export_average(role) for worker in workers]):
        average |= get_state_dict([part])
    load_state_dict(model, average)
