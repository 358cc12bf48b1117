"""Responses to prompts, and what models and reward functions say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fuse.algorithms.policy_loss import LARGEST_SAMPLER_DIFFERENCE, SAMPLER_DIFFERENCE
from fuse.config.run import RunConfig
from fuse.driver.fleet import Fleet
from fuse.driver.tail import TailPlan
from fuse.engines.engine import SamplingParams
from fuse.sample import Sample
from fuse.trace import PhaseClock, Span
from fuse.trainers.reward_calls import RewardCalls, RewardSettings
from fuse.trainers.rewards import RewardFunction
from fuse.training.late_scores import OLD_LOGPROBS


def reward_settings(args: RunConfig) -> RewardSettings:
    """How `args` has reward functions called."""
    return RewardSettings(
        workers=args.reward_workers, timeout_s=args.reward_timeout_s, error_score=args.reward_error_score
    )


def reward_calls(args: RunConfig, reward: object, tokenizer: PreTrainedTokenizerBase) -> RewardCalls:
    """What calls `reward`, where that is a function."""
    function = None if isinstance(reward, PreTrainedModel) else cast(RewardFunction, reward)
    return RewardCalls(function, partial(tokenizer.batch_decode, skip_special_tokens=True), reward_settings(args))


class Rewards(Protocol):
    """What scores samples beside models."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Samples are generated, and models are going to score them."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """Have generated samples rewarded; returns at once."""

    def rewarded(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of these samples, which models have scored, whose rewards are known by now, and written."""
        ...

    def finish(self) -> dict[str, float]:
        """Wait for all that was submitted, and return metrics of it."""
        ...

    def drain_spans(self) -> Sequence[Span]:
        """Of calls of functions since the last time."""
        ...


@dataclass(frozen=True, slots=True)
class Rollouts:
    """How samples are generated and scored.

    rewards: calls the reward function, where there is one. fused: samples are scored while others are generated.
    tell: hears what is being done. recomputes_logprobs: the trainer computes those of samples to learn from, too, if
        not within the update's steps.
    """

    rewards: Rewards
    fused: bool
    tell: Callable[[str], None]
    recomputes_logprobs: bool = False

    def roll_out(
        self,
        fleet: Fleet,
        samples: Sequence[Sample],
        params: SamplingParams,
        clock: PhaseClock,
        max_new_tokens: Mapping[int, int] | None = None,
        *,
        teaches: bool = True,
        tail: TailPlan | None = None,
    ) -> dict[str, float]:
        """Generate responses, and score them by models and by the reward function, where there is one.

        max_new_tokens: by sample id, in place of that of `params`. teaches: whether policies and costs of later
            rollouts may be learnt from this one; not from an evaluation, whose samples are few and others. tail: what
            may be trained before all samples are scored.

        Returns the metrics of the reward function's calls, and of the log-probabilities.
        """
        if self.fused:
            with clock.phase("rollout"):
                fleet.roll_out(
                    *(samples, params, self._generated), max_new_tokens=max_new_tokens, teaches=teaches, tail=tail
                )
        else:
            with clock.phase("generation"):
                fleet.generate(samples, params, max_new_tokens=max_new_tokens)
            self.rewards.prepare(samples)
            with clock.phase("inference"):
                fleet.infer(samples)
            self.rewards.submit(samples)
        differences = {}
        if teaches and self.recomputes_logprobs and OLD_LOGPROBS not in fleet.late_columns:
            with clock.phase("logprobs"):
                fleet.recompute_logprobs(samples)
            differences = sampler_differences(samples)
        with clock.phase("reward"):
            self.tell("waiting: for rewards")
            metrics = self.rewards.finish()
        clock.rewards += self.rewards.drain_spans()
        if not teaches:
            fleet.forget_spans()
        return metrics | differences

    def _generated(self, samples: Sequence[Sample]) -> None:
        self.rewards.prepare(samples)
        self.rewards.submit(samples)


def sampler_differences(samples: Sequence[Sample]) -> dict[str, float]:
    """How far the engines' log-probabilities are from the trainer's, by the names of the losses' metrics."""
    pairs = [(sample.old_logprobs, np.asarray(sample.logprobs[: sample.length])) for sample in samples]
    differences = np.abs(np.concatenate([own - sampled for own, sampled in pairs]))
    if not len(differences):
        return {}
    return {
        SAMPLER_DIFFERENCE.name: float(differences.mean()),
        LARGEST_SAMPLER_DIFFERENCE.name: float(differences.max()),
    }
