"""Weights from the stages that train to the driver: what trains, and averages of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.intrastage.adapters import base_of
from fuse.intrastage.stage import Exported
from fuse.state_dict import load_state_dict
from fuse.training.model_spec import ModelSpec
from fuse.workers.calls import gather
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weights import WeightsRef, get_state_dict


def exported(workers: Sequence[ModelHandle], role: str, part: Exported) -> list[WeightsRef]:
    """This part of a role's weights, in the object store, as ranks have it."""
    told = gather([worker.export_weights(role, part) for worker in workers])
    return [one for one in told if one is not None]


def fetch_trained(model: PreTrainedModel, workers: Sequence[ModelHandle], role: str) -> None:
    """Copy what trains into the model that the run was started with; what is frozen is there already."""
    state_dict = get_state_dict(exported(workers, role, "trained"))
    load_state_dict(model, state_dict, kept=ModelSpec.of(model).frozen)


def fetch_scoring(model: nn.Module, worker: ModelHandle, role: str) -> None:
    """Copy what a worker scores by into a model like it."""
    load_state_dict(model, get_state_dict(gather([worker.export_scoring_weights(role)])))


def fetch_average(model: nn.Module, workers: Sequence[ModelHandle], role: str) -> None:
    """Copy a role's average into a model like it, which has the parameters already that do not train.

    Ranks may tell of the same parameter, as of copies of a tied one, and then of the same average.
    """
    model = base_of(model)
    average: dict[str, Tensor] = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    for part in gather([worker.export_average(role) for worker in workers]):
        average |= get_state_dict([part])
    load_state_dict(model, average)
