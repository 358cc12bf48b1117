"""Weights by name, at hand or on their way: whether they fit a model, and giving them to one that is in use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_REMEDY = "load weights of the same architecture and configuration"


@dataclass(frozen=True, slots=True)
class WeightStream:
    """Weights that come one tensor after another, and are read once.

    shapes: of all of them, by name. tensors: by name. One in host memory may be kept, and is never written again; one
    on a device is good until the next is asked for.
    """

    shapes: Mapping[str, torch.Size]
    tensors: Iterable[tuple[str, Tensor]]

    @classmethod
    def of(cls, weights: Weights) -> WeightStream:
        """Weights of either form."""
        if isinstance(weights, WeightStream):
            return weights
        return cls({name: tensor.shape for name, tensor in weights.items()}, weights.items())


Weights = Mapping[str, Tensor] | WeightStream
"""Of a model, by name."""


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
    _check_shapes(
        {name: tensor.shape for name, tensor in state_dict.items()},
        shapes,
        model,
        optional=optional,
        may_have_more=may_have_more,
    )


def _check_shapes(
    found: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    model: str,
    *,
    optional: Collection[str],
    may_have_more: bool = False,
) -> None:
    check_fit(
        {name: str(list(shape)) for name, shape in found.items()},
        {name: str(list(shape)) for name, shape in expected.items()},
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

    def check(self, weights: Weights, *, kept: Collection[str] = ()) -> None:
        """Raises: ValueError for names or shapes that do not match. A tied tensor may come under any of its names.

        kept: what the model has already and may be left out.
        """
        shapes = WeightStream.of(weights).shapes
        given = {self.tensors[name] for name in (*kept, *shapes) if name in self.tensors}
        optional = {name for name, tensor in self.tensors.items() if name not in self.required or tensor in given}
        _check_shapes(shapes, self.shapes, self.model_name, optional=optional)

    def under_all_names(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once under each of its names, where a tied one may come under any of them."""
        names: dict[int, list[str]] = {}
        for name, number in self.tensors.items():
            names.setdefault(number, []).append(name)
        for name, tensor in tensors:
            yield from ((one, tensor) for one in names.pop(self.tensors[name], ()))


def adopt_state_dict(model: nn.Module, weights: Weights) -> None:
    """Let these be the model's weights, one after another; between two of them they are of both kinds.

    Those on the host of the model's type are kept as they are, without a copy. On a device they are copied to where the
    model has its own, for captured graphs of it know no other place. The model may have released its own.

    For models that only compute: what they share with others must never be written. Names as in `load_state_dict`.

    Raises:
        ValueError: names or shapes that do not match; then nothing has changed.
    """
    WeightLayout.of(model).check(weights)
    adopt_tensors(model, WeightStream.of(weights).tensors)


def adopt_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`adopt_state_dict` of some of a model's weights, which have been checked."""
    own = model.state_dict(keep_vars=True)  # a tied tensor is one object under all of its names
    with torch.no_grad():
        for name, tensor in tensors:
            if own[name].device.type == "cpu":
                own[name].data = tensor.to("cpu", own[name].dtype)
            else:
                write(own[name], tensor)


def write(own: Tensor, tensor: Tensor) -> None:
    """Copy `tensor` into the memory of `own`, which takes some if it was released."""
    if own.untyped_storage().nbytes() < own.numel() * own.element_size():
        own.data = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    own.copy_(tensor)


def release_weights(model: nn.Module, *, kept: Collection[str] = ()) -> None:
    """Free the parameters of a model that only computes. It keeps their shapes, and takes others by `adopt_state_dict`.

    kept: names of those that it keeps. Ties stay. Until then it must not compute: the rest reads as one undefined
    value.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                continue
            parameter.data = parameter.new_empty(()).expand(parameter.shape)


def mix_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], alpha: float) -> None:
    """Let parameters w become alpha * t + (1 - alpha) * w, for tensors t of their names, cast to their types.

    Parameters get tensors of their own, for adopted ones must not be written. Pre: names and shapes have been checked,
    and a tied tensor comes once.
    """
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors:
            if isinstance(parameter := own[name], nn.Parameter):
                parameter.data = parameter.data.mul(1.0 - alpha).add_(tensor.to(parameter), alpha=alpha)


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], *, kept: Collection[str] = ()) -> None:
    """Copy `state_dict` into the model's own tensors, cast to their types.

    A tensor that the model ties under several names may come under any of them; buffers may be left out, and `kept`.

    Raises:
        ValueError: names or shapes that do not match; then nothing was copied.
    """
    WeightLayout.of(model).check(state_dict, kept=kept)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state_dict.items():
            own[name].copy_(tensor)
