"""Generalized advantage estimation over ragged responses.

Source: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation
(arXiv 1506.02438), equation 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.ops.native import choose, current, described, log_choice, queue

NATIVE_DTYPES = (torch.float32, torch.float64)


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every row, each [total] in the dtype of the inputs; no gradient flows.

        delta_t = reward_t + gamma value_{t+1} - value_t
        advantage_t = delta_t + gamma lam advantage_{t+1}
        return_t = advantage_t + value_t

    rewards, values: [total], one floating-point dtype and device, any stride.
    offsets: [num_samples + 1] int64; sample i is rows offsets[i]:offsets[i + 1], the value after its last row is 0.

    Raises: ValueError on shapes, dtypes, devices, offsets or factors that break these rules.
    """
    _check(rewards, values, offsets, gamma, lam)
    rewards, values = rewards.detach(), values.detach()
    device = rewards.device
    native, choice = choose(device, rewards.dtype, NATIVE_DTYPES, has_cuda=True)
    log_choice("gae", choice)
    if native is None:
        return gae_reference(rewards, values, offsets, gamma, lam)
    advantages, returns = (torch.empty(len(rewards), dtype=rewards.dtype, device=device) for _ in range(2))
    with current(device):
        native.gae(rewards, values, offsets.contiguous(), gamma, lam, advantages, returns, *queue(device))
    return advantages, returns


def gae_reference(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """`gae` as a torch loop: all samples side by side, padded with zeros, from the last row to the first.

    Dtypes below float32 are computed in float32. Rounds like the native code, bit for bit.
    """
    lengths = offsets.diff()
    width = int(lengths.max()) if len(lengths) else 0
    is_row = torch.arange(width, device=rewards.device) < lengths[:, None]  # [num_samples, width]
    compute_dtype = torch.promote_types(rewards.dtype, torch.float32)
    padded_rewards = rewards.new_zeros(is_row.shape, dtype=compute_dtype)
    padded_values = padded_rewards.clone()
    padded_rewards[is_row] = rewards.to(compute_dtype)
    padded_values[is_row] = values.to(compute_dtype)

    next_value = padded_rewards.new_zeros(len(lengths))
    advantage = next_value
    advantages = torch.empty_like(padded_rewards)
    for t in reversed(range(width)):
        delta = padded_rewards[:, t] + gamma * next_value - padded_values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = padded_values[:, t]
    returns = advantages + padded_values
    return advantages[is_row].to(rewards.dtype), returns[is_row].to(rewards.dtype)


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described(
        "native C++ for float32 and float64 on CPU", "torch reference for other dtypes", on_gpus="CUDA on GPUs"
    )


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES, has_cuda=True)[1]


def _check(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> None:
    for name, tensor in (("rewards", rewards), ("values", values)):
        if tensor.ndim != 1 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}: pass the rows of all samples, [total], "
                "in one floating-point tensor"
            )
    if rewards.shape != values.shape or rewards.dtype != values.dtype:
        raise ValueError(
            f"rewards is {list(rewards.shape)} {rewards.dtype} but values is {list(values.shape)} {values.dtype}: "
            "every row has both, in one dtype"
        )
    if not rewards.device == values.device == offsets.device:
        raise ValueError(
            f"rewards, values and offsets are on {rewards.device}, {values.device} and {offsets.device}: "
            "move them to one device"
        )
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) == 0:
        raise ValueError(f"offsets is {list(offsets.shape)} {offsets.dtype}: pass [num_samples + 1] int64, first 0")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(rewards):
        raise ValueError(f"offsets run from {first} to {last}: they must run from 0 to the {len(rewards)} rows given")
    if bool((offsets.diff() < 0).any()):
        sample = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"offsets decrease at sample {sample}, from {offsets[sample]} to {offsets[sample + 1]}")
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} is {factor}: it must lie in [0, 1]")
