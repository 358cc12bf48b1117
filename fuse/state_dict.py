"""Weights by name: whether they fit a model, and giving them to one that is in use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_REMEDY = "load weights of the same architecture and configuration"


def check_fit(
    found: Mapping[str, str],
    expected: Mapping[str, str],
    what: str,
    remedy: str,
    *,
    optional: Collection[str] = (),
    may_have_more: bool = False,
) -> None:
    """Compare tensors by name, each given as a description of what must agree, such as "[2, 3]".

    what: the subject of the error, such as "weights". remedy: what the user can do. optional: names that may be absent.
    may_have_more: names that are not expected are passed over.

    Raises: ValueError for names that are unknown or missing, and for tensors that differ.
    """
    problems = (
        [] if may_have_more else [f"{name} is not part of the model" for name in sorted(found.keys() - expected.keys())]
    )
    problems += [f"{name} is missing" for name in expected if name not in found and name not in optional]
    problems += [
        f"{name} is {found[name]}, the model has {description}"
        for name, description in expected.items()
        if name in found and found[name] != description
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what} does not fit: {'; '.join(problems[:3])}{more}: {remedy}")


def check_state_dict(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    model: str,
    *,
    optional: Collection[str] = (),
    may_have_more: bool = False,
) -> None:
    """`check_fit` of weights by their shapes. model: names it in errors.

    Raises: ValueError for names that are unknown or missing, and for shapes that differ.
    """
    check_fit(
        {name: str(list(tensor.shape)) for name, tensor in state_dict.items()},
        {name: str(list(shape)) for name, shape in shapes.items()},
        f"state dict for {model}",
        _REMEDY,
        optional=optional,
        may_have_more=may_have_more,
    )


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """What weights a model takes, without holding any.

    shapes: by name. tensors: names that share a tensor (tied weights) have the same number. required: names of
    parameters, while buffers may be left out.
    """

    model_name: str
    shapes: Mapping[str, torch.Size]
    tensors: Mapping[str, int]
    required: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> WeightLayout:
        own = model.state_dict()
        return cls(
            model_name=type(model).__name__,
            shapes={name: tensor.shape for name, tensor in own.items()},
            tensors={name: tensor.data_ptr() for name, tensor in own.items()},
            required=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        )

    def check(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raises: ValueError for names or shapes that do not match. A tied tensor may come under any of its names."""
        given = {self.tensors[name] for name in state_dict.keys() & self.tensors.keys()}
        optional = {name for name, tensor in self.tensors.items() if name not in self.required or tensor in given}
        check_state_dict(state_dict, self.shapes, self.model_name, optional=optional)

    def under_all_names(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict`, in which a tied tensor may come under any of its names, with it under all of them."""
        by_tensor = {self.tensors[name]: tensor for name, tensor in state_dict.items()}
        return {name: by_tensor[number] for name, number in self.tensors.items() if number in by_tensor}


def adopt_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Let `state_dict` be the model's weights: no copy is made where type and device are the model's own.

    The model may have released its own.

    For models that only compute: what they share with others must never be written. Names as in `load_state_dict`.

    Raises:
        ValueError: names or shapes that do not match; then nothing has changed.
    """
    WeightLayout.of(model).check(state_dict)
    own = model.state_dict(keep_vars=True)  # a tied tensor is one object under all of its names
    with torch.no_grad():
        for name, tensor in state_dict.items():
            own[name].data = tensor.to(own[name].device, own[name].dtype)


def release_weights(model: nn.Module) -> None:
    """Free the parameters of a model that only computes. It keeps their shapes, and takes others by `adopt_state_dict`.

    Ties stay. Until then it must not compute: parameters read as one undefined value.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.new_empty(()).expand(parameter.shape)


def mix_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], alpha: float) -> None:
    """Let parameters w become alpha * s + (1 - alpha) * w, for s of their names in `state_dict`, cast to their types.

    Parameters get tensors of their own, for adopted ones must not be written. Names as in `load_state_dict`.

    Raises:
        ValueError: names or shapes that do not match; then nothing has changed.
    """
    WeightLayout.of(model).check(state_dict)
    own = model.state_dict(keep_vars=True)
    # A tied tensor is one object under all of its names, and is mixed once.
    given = {own[name]: tensor for name, tensor in state_dict.items() if isinstance(own[name], nn.Parameter)}
    with torch.no_grad():
        for parameter, tensor in given.items():
            parameter.data = parameter.data.mul(1.0 - alpha).add_(tensor.to(parameter), alpha=alpha)


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy `state_dict` into the model's own tensors, cast to their types.

    A tensor that the model ties under several names may come under any of them; buffers may be left out.

    Raises:
        ValueError: names or shapes that do not match; then nothing was copied.
    """
    WeightLayout.of(model).check(state_dict)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state_dict.items():
            own[name].copy_(tensor)
