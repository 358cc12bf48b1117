"""Tensors between processes as numpy's arrays: torch pickles each through a file of its own, ten times as slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sent: TypeAlias = NDArray[Any] | Tensor
"""What travels of a tensor: an array, or itself where numpy does not have its type, or it is on a device."""


def sent(tensor: Tensor) -> Sent:
    """What `arrived` makes the same tensor of, in another process."""
    has_array = tensor.device.type == "cpu" and tensor.dtype is not torch.bfloat16
    return tensor.detach().numpy() if has_array else tensor


def arrived(tensor: Sent) -> Tensor:
    """The tensor, of memory of its own: an array that arrived may be written by nobody."""
    return tensor if isinstance(tensor, Tensor) else torch.from_numpy(np.array(tensor))


def sent_rows(tensors: Sequence[Tensor]) -> tuple[Sent, list[int]]:
    """As `sent`, of tensors [rows, ...] end to end. Pre: there are some, alike but for their rows."""
    return sent(torch.cat(list(tensors))), [len(one) for one in tensors]


def arrived_rows(tensors: Sent, sizes: Sequence[int]) -> list[Tensor]:
    """The tensors."""
    return list(arrived(tensors).split(list(sizes)))
