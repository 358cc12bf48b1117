"""Frozen weights of a process: one tensor of each, whichever models and stages compute by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fuse.state_dict import WeightLayout, adopt_tensors
from fuse.training.model_spec import Origin


class FrozenTensors:
    """By origin and type. Nobody writes to them.

    On a device the first who needs one copies it there. In host memory, of the type that they came in, they are the
    pages that they came in, which all processes of the host have in common.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[Origin, torch.dtype], Tensor] = {}

    def adopt(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        origins: Mapping[str, Origin],
        weights: Mapping[str, Tensor],
    ) -> frozenset[str]:
        """Let parameters be those that they have an origin for, in the parameter's type; returns their names.

        weights: of the same names.
        """
        adopted = set()
        for name, parameter in parameters:
            if (origin := origins.get(name)) is None:
                continue
            key = origin, parameter.dtype
            if key not in self._tensors:
                self._tensors[key] = weights[name].to(parameter.device, parameter.dtype)
            parameter.data = self._tensors[key]
            adopted.add(name)
        return frozenset(adopted)

    def adopt_whole(self, model: nn.Module, origins: Mapping[str, Origin], weights: Mapping[str, Tensor]) -> None:
        """Have a model that only computes do so by these weights; see `adopt_state_dict`.

        Raises: ValueError for names or shapes that do not match; then nothing has changed.
        """
        WeightLayout.of(model).check(weights)
        adopted = self.adopt(model.named_parameters(), origins, weights)
        own = model.state_dict(keep_vars=True)  # a tied tensor is one object under all of its names
        kept = {id(own[name]) for name in adopted}
        adopt_tensors(model, ((name, tensor) for name, tensor in weights.items() if id(own[name]) not in kept))


def release_frozen(parameters: Iterable[tuple[str, nn.Parameter]], origins: Mapping[str, Origin]) -> None:
    """Have those that are to be adopted take no memory until then."""
    for name, parameter in parameters:
        if name in origins:
            parameter.data = parameter.new_empty(()).expand(parameter.shape)
