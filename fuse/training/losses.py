"""The losses at the last stage of the actor's and the critic's pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse.algorithms import ppo
from fuse.intrastage.megatron_head import VocabularyHead, vocab_parallel_logprobs
from fuse.intrastage.stage import MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.training.micro_batches import PolicyTargets, ValueTargets
from fuse.training.steps import SAMPLER_STATISTICS


class _Statistics:
    """One row of scalars per micro-batch, on the device until drained, so that no micro-batch waits for one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._rows: list[Tensor] = []

    def add(self, *values: Tensor) -> None:
        self._rows.append(torch.stack([value.detach() for value in values]))

    def drain(self) -> list[dict[str, float]]:
        """The rows since the last call, in order."""
        rows, self._rows = self._rows, []
        return [dict(zip(self._names, row, strict=True)) for row in torch.stack(rows).tolist()] if rows else []


class ActorLoss:
    """PPO's policy loss of a micro-batch, divided by `accumulation`, the micro-batches per optimizer step."""

    def __init__(self, *, temperature: float, cliprange: float) -> None:
        self.temperature = temperature
        self.cliprange = cliprange
        self.accumulation = 1
        names = ("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "val/ratio")
        self.statistics = _Statistics((*names, *SAMPLER_STATISTICS))

    def __call__(self, hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
        targets = micro_batch.targets
        assert isinstance(targets, PolicyTargets)
        if isinstance(head, VocabularyHead):
            logprobs, entropy = vocab_parallel_logprobs(hidden, head, targets.token_ids, self.temperature)
        else:
            logprobs, entropy = token_logprobs(hidden, head, targets.token_ids, self.temperature)
        logprobs = logprobs.masked_fill(~targets.mask, ppo.INVALID_LOGPROB)
        result = ppo.policy_loss(logprobs, targets.old_logprobs, targets.advantages, targets.mask, self.cliprange)
        self.statistics.add(
            *(result.approximate_kl, result.clip_fraction, entropy.mean(), result.loss, result.ratio),
            *_sampler_differences(logprobs.detach(), targets),
        )
        return result.loss / self.accumulation


def _sampler_differences(logprobs: Tensor, targets: PolicyTargets) -> tuple[Tensor, Tensor, Tensor]:
    """SAMPLER_STATISTICS: of the tokens that count, how far the sampler's log-probabilities are from these."""
    differences = (logprobs - targets.old_logprobs).abs().masked_fill(~targets.mask, 0.0)
    largest = differences.amax() if differences.numel() else differences.sum()
    return differences.sum(), largest, targets.mask.sum()


class CriticLoss:
    """PPO's value loss of a micro-batch, weighted by `vf_coef` and divided by `accumulation`."""

    def __init__(self, *, vf_coef: float, cliprange_value: float) -> None:
        self.vf_coef = vf_coef
        self.cliprange_value = cliprange_value
        self.accumulation = 1
        self.statistics = _Statistics(("loss/value_avg", "val/clipfrac_avg"))

    def __call__(self, hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
        targets = micro_batch.targets
        assert isinstance(targets, ValueTargets)
        values = head(hidden).float().squeeze(-1).masked_fill(~targets.mask, 0.0)
        loss, clip_fraction = ppo.value_loss(
            values, targets.old_values, targets.returns, targets.mask, self.cliprange_value
        )
        self.statistics.add(loss, clip_fraction)
        return self.vf_coef * loss / self.accumulation
