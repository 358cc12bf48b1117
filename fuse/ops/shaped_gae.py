"""From log-probabilities, scores and values to whitened advantages and returns, over ragged responses in one pass.

Source: Schulman et al., Proximal Policy Optimization Algorithms (arXiv 1707.06347); where scores go and what is
whitened as in TRL's PPOTrainer (trl 1.12).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fuse.ops.gae import NATIVE_DTYPES, describe, gae_reference, implementation
from fuse.ops.native import choose, current, log_choice, queue

# Native code serves what it serves of `gae`, and is described alike.
__all__ = [
    "NATIVE_DTYPES",
    "describe",
    "implementation",
    "kl_penalty",
    "shape_rewards",
    "shaped_gae",
    "shaped_gae_reference",
    "whiten",
]

_EPSILON = 1e-8  # added to variances


def shaped_gae(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    token_offsets: Tensor,
    value_offsets: Tensor,
    *,
    kl_coef: float,
    estimator: Literal["k1", "k3"],
    whiten_rewards: bool,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL estimates [tokens], whitened advantages [tokens] and returns [values]; no gradient flows.

    The reward of a token is -kl_coef times its KL estimate; a sample's score comes on its last value. With
    `whiten_rewards`, rewards get unit variance, and keep their mean. Then generalized advantage estimation over all
    values of a sample; the advantages of tokens are whitened, to zero mean and unit variance.

    logprobs, reference_logprobs: [tokens]. scores: [num_samples]. values: [values]. One floating dtype and device.
    token_offsets, value_offsets: int64 [num_samples + 1]; sample i has tokens token_offsets[i]:token_offsets[i + 1],
        and a value before each of them and at most one after, at least one in all.

    Variances are unbiased. The native code sums in float64, sample by sample: results are the same on every run.

    Raises: ValueError on shapes, dtypes and offsets that break these rules, and for fewer than two values to whiten.
    """
    tensors = (logprobs, reference_logprobs, scores, values)
    _check(*tensors, token_offsets, value_offsets, whiten_rewards)
    device, dtype = logprobs.device, logprobs.dtype
    native, choice = choose(device, dtype, NATIVE_DTYPES, has_cuda=True)
    log_choice("shaped_gae", choice)
    if native is None:
        return shaped_gae_reference(
            *tensors,
            token_offsets,
            value_offsets,
            kl_coef=kl_coef,
            estimator=estimator,
            whiten_rewards=whiten_rewards,
            gamma=gamma,
            lam=lam,
        )
    inputs = [one.detach().contiguous() for one in (*tensors, token_offsets, value_offsets)]
    sums = torch.empty(len(scores), 2, dtype=torch.float64, device=device)
    mean, scale = 0.0, 1.0
    with current(device):
        if whiten_rewards:
            native.reward_sums(*inputs, kl_coef, estimator == "k3", sums, *queue(device))
            mean, scale = (float(one) for one in _whitening(sums, len(values)))
        kl, advantages, returns = (torch.empty_like(inputs[index]) for index in (0, 0, 3))
        native.shaped_gae(
            *inputs, kl_coef, estimator == "k3", mean, scale, gamma, lam, kl, advantages, returns, sums, *queue(device)
        )
    shift, scale_of_advantages = (one.to(dtype) for one in _whitening(sums, len(logprobs)))
    return kl, advantages.sub_(shift).mul_(scale_of_advantages), returns


def shaped_gae_reference(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    token_offsets: Tensor,
    value_offsets: Tensor,
    *,
    kl_coef: float,
    estimator: Literal["k1", "k3"],
    whiten_rewards: bool,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`shaped_gae`, one step after the other."""
    kl = kl_penalty(logprobs, reference_logprobs, estimator)
    tokens = torch.arange(len(logprobs), device=logprobs.device)
    rows = tokens + torch.repeat_interleave(value_offsets[:-1] - token_offsets[:-1], token_offsets.diff())
    rewards = shape_rewards(kl, scores, rows, value_offsets, kl_coef)
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages, returns = gae_reference(rewards, values, value_offsets, gamma, lam)
    return kl, whiten(advantages[rows]), returns


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference), [tokens].

    Source: Schulman, "Approximating KL divergence" (2020): k1 is the unbiased log-ratio, k3 is unbiased and positive.
    """
    log_ratio = reference_logprobs - logprobs
    return -log_ratio if estimator == "k1" else log_ratio.expm1() - log_ratio


def shape_rewards(kl: Tensor, scores: Tensor, token_rows: Tensor, value_offsets: Tensor, kl_coef: float) -> Tensor:
    """Reward of every value position, [values]: the KL penalty on tokens, the score [num_samples] on the last.

    token_rows: int64 [tokens], the value position at which each token was chosen.
    """
    rewards = kl.new_zeros(int(value_offsets[-1]))
    rewards[token_rows] = -kl_coef * kl
    rewards[value_offsets[1:] - 1] += scores
    return rewards


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit (unbiased) variance and, with `shift_mean`, zero mean."""
    variance, mean = torch.var_mean(values, unbiased=True)
    whitened = (values - mean) * torch.rsqrt(variance + _EPSILON)
    return whitened if shift_mean else whitened + mean


def _whitening(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean, and the factor to unit variance, from the samples' sums and sums of squares, float64 [num_samples, 2]."""
    total, square = sums.sum(0)
    mean = total / count
    variance = ((square - total * mean) / (count - 1)).clamp(min=0.0)
    return mean, torch.rsqrt(variance + _EPSILON)


def _check(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    token_offsets: Tensor,
    value_offsets: Tensor,
    whiten_rewards: bool,
) -> None:
    num_samples = len(scores)
    rules = {
        "logprobs": (logprobs, len(logprobs), logprobs.dtype),
        "reference_logprobs": (reference_logprobs, len(logprobs), logprobs.dtype),
        "scores": (scores, num_samples, logprobs.dtype),
        "values": (values, len(values), logprobs.dtype),
        "token_offsets": (token_offsets, num_samples + 1, torch.int64),
        "value_offsets": (value_offsets, num_samples + 1, torch.int64),
    }
    for name, (tensor, length, dtype) in rules.items():
        if tensor.shape != (length,) or tensor.dtype != dtype or tensor.device != logprobs.device:
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}: "
                f"pass [{length}] {dtype} on {logprobs.device}, as the others have it"
            )
    if not logprobs.is_floating_point():
        raise ValueError(f"logprobs is {logprobs.dtype}: pass a floating-point tensor")
    if len(logprobs) < 2 or (whiten_rewards and len(values) < 2):
        raise ValueError(f"cannot whiten {len(logprobs)} value: the batch holds too few response tokens")
    for name, offsets, length in (
        ("token_offsets", token_offsets, len(logprobs)),
        ("value_offsets", value_offsets, len(values)),
    ):
        if int(offsets[0]) != 0 or int(offsets[-1]) != length or bool((offsets.diff() < 0).any()):
            raise ValueError(f"{name} is {offsets.tolist()}: it must rise from 0 to the {length} rows given")
    extra = value_offsets.diff() - token_offsets.diff()
    if bool(((extra < 0) | (extra > 1) | (value_offsets.diff() < 1)).any()):
        raise ValueError(
            "a sample has fewer values than tokens, none, or more than one beyond its tokens: "
            f"{value_offsets.diff().tolist()} values for {token_offsets.diff().tolist()} tokens"
        )
