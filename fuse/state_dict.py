"""Copying weights into a model that is in use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy `state_dict` into the model's own tensors, cast to their types.

    A tensor that the model ties under several names may come under any of them; buffers may be left out.

    Raises:
        ValueError: names or shapes that do not match; then nothing was copied.
    """
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    given = {own[name].data_ptr() for name in state_dict.keys() & own.keys()}
    problems = [f"{name} is unknown" for name in sorted(state_dict.keys() - own.keys())]
    problems += [
        f"{name} is missing" for name in sorted(parameters - state_dict.keys()) if own[name].data_ptr() not in given
    ]
    problems += [
        f"{name} is {list(tensor.shape)}, the model has {list(own[name].shape)}"
        for name, tensor in state_dict.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"weights do not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}: "
            f"load weights of the same architecture and configuration"
        )
    with torch.no_grad():
        for name, tensor in state_dict.items():
            own[name].copy_(tensor)
