"""One base under several models of a run: which of their frozen tensors are equal, and so need be held only once.

This is the one place that decides it, and by bits: models of one file are equal, and so are copies of another origin.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.driver.fleet_settings import FleetSettings
from fuse.intrastage.adapters import plain_name
from fuse.roles import role_of, scoring, training
from fuse.training.model_spec import ModelSpec, Origin

_logger = logging.getLogger(__name__)

Origins = Mapping[str, Mapping[str, Origin]]
"""By role and name, whose tensor each is that does not change."""


def origins_of(models: Mapping[str, PreTrainedModel], settings: FleetSettings) -> Origins:
    """What of these models, by role, no update changes, each with the first model that has an equal one.

    Reads equal tensors through once. Megatron's stages hold weights in another form, and share none.
    """
    if settings.training.backend == "megatron":
        return {}
    fixed = {
        role: {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if not (parameter.requires_grad and (role_of(role).trains or role in settings.variants))
        }
        for role, model in ((role, models[role]) for role in (*training(models), *scoring(models)))
        if role not in settings.mixed_roles
    }
    found = first_of_equals(fixed, _has_same_bits)
    for role, origins in found.items():
        lent = [fixed[role][name] for name, origin in origins.items() if origin.role != role]
        if lent and role not in settings.variants:
            num_bytes = sum(tensor.nbytes for tensor in lent)
            _logger.info("%s: %d frozen tensors, %.2f GB, are those of other models", role, len(lent), num_bytes / 1e9)
    return found


def first_of_equals(fixed: Mapping[str, Mapping[str, Tensor]], is_equal: Callable[[Tensor, Tensor], bool]) -> Origins:
    """By role and name, the first of tensors that are called the same and are equal. fixed: by role and name."""
    known: defaultdict[object, list[tuple[Origin, Tensor]]] = defaultdict(list)
    found: dict[str, dict[str, Origin]] = {role: {} for role in fixed}
    for role, tensors in fixed.items():
        for name, tensor in tensors.items():
            same = known[plain_name(name, None) or name, tensor.shape, tensor.dtype]
            equal = (origin for origin, other in same if origin.role != role and is_equal(tensor, other))
            origin = next(equal, Origin(role, name))
            if origin.role == role:
                same.append((origin, tensor))
            found[role][name] = origin
    return found


def _has_same_bits(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def own_weights(role: str, model: PreTrainedModel, spec: ModelSpec) -> dict[str, Tensor]:
    """Those that come from no other model of the run."""
    lent = {id(one) for name, one in model.named_parameters() if spec.origin(role, name).role != role}
    return {name: one.detach() for name, one in model.state_dict(keep_vars=True).items() if id(one) not in lent}
