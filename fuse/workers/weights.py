"""Weights from process to process through Ray's object store: written once, read without a copy on the same node."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuse.training.model_spec import Origin

# numpy has no such type, so the bits travel as unsigned integers.
_CARRIERS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """A state dict in the object store, which keeps it until the last copy of this reference and the last tensor
    read through it are gone, in every process."""

    reference: ray.ObjectRef[Any]
    num_bytes: int


def put_state_dict(state_dict: Mapping[str, Tensor]) -> WeightsRef:
    """Store tensors, from whatever device, by their names; tensors that share memory (tied weights) are stored once."""
    arrays: dict[tuple[object, ...], NDArray[Any]] = {}
    entries: dict[str, tuple[NDArray[Any], torch.dtype]] = {}
    for name, tensor in state_dict.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in arrays:
            host = tensor.detach().cpu().contiguous()
            # Not by Tensor.numpy(), after which the tensor's memory could not be released any more.
            arrays[identity] = np.from_dlpack(host.view(_CARRIERS.get(tensor.dtype, tensor.dtype)))
        entries[name] = (arrays[identity], tensor.dtype)
    return WeightsRef(ray.put(entries), sum(array.nbytes for array in arrays.values()))


def get_state_dict(refs: Sequence[WeightsRef]) -> dict[str, Tensor]:
    """Read one state dict, or merge several partial ones of different names (pipeline stages).

    The tensors are views of the object store, which keep the object alive: models that only compute use them as they
    are. Do not write to them.
    """
    state_dict: dict[str, Tensor] = {}
    for entries in ray.get([ref.reference for ref in refs]):
        twice = state_dict.keys() & entries.keys()
        assert not twice, f"{sorted(twice)[:3]} come from several stages"
        state_dict |= {name: _tensor(array, dtype) for name, (array, dtype) in entries.items()}
    return state_dict


def get_weights(role: str, stored: Mapping[str, WeightsRef], origins: Mapping[str, Origin]) -> dict[str, Tensor]:
    """Those of a model, of which some are other models'. stored: by role, what is their own."""
    own = {holder: get_state_dict([ref]) for holder, ref in stored.items()}
    lent = {name: own[origin.role][origin.name] for name, origin in origins.items() if origin.role != role}
    return own[role] | lent


def _tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        # torch cannot mark a tensor read-only and warns of arrays that are.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array).view(dtype)
