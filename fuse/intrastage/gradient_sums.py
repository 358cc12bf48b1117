"""Gradients of several copies of parameters added up: of copies on this device, and on a group's ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fuse.intrastage.communication import all_reduce_sum


def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, what: str) -> None:
    """Give every rank of the group the sum of all ranks' gradients."""
    gradients = [gradient_of(parameter) for parameter in parameters]
    if (
        len(gradients) == 1 and gradients[0].is_contiguous()
    ):  # an embedding, of which a copy would be the largest tensor
        all_reduce_sum(gradients[0].view(-1), group, what)
        return
    flat = _flatten_dense_tensors(gradients)
    all_reduce_sum(flat, group, what)
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))


def add_onto_first(copies: Sequence[Sequence[nn.Parameter]]) -> None:
    """Add the gradients of other copies of some parameters, on this device, to those of the first."""
    for other in copies[1:]:
        torch._foreach_add_([gradient_of(one) for one in copies[0]], [gradient_of(one) for one in other])


def give_first_to_others(copies: Sequence[Sequence[nn.Parameter]]) -> None:
    """Have all copies on this device have the first one's gradients."""
    for other in copies[1:]:
        torch._foreach_copy_([gradient_of(one) for one in other], [gradient_of(one) for one in copies[0]])


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient, which there is."""
    assert parameter.grad is not None
    return parameter.grad
