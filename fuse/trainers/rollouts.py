"""Responses to prompts, and what models and reward functions say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from fuse.driver.fleet import Fleet
from fuse.engines.engine import SamplingParams
from fuse.sample import Sample
from fuse.trace import PhaseClock
from fuse.trainers.rewards import RewardCalls, RewardFunction


@dataclass(frozen=True, slots=True)
class Rollouts:
    """How samples are generated and scored.

    reward: None where a model gives the rewards. fused: samples are scored while others are generated.
    tell: hears what is being done.
    """

    tokenizer: PreTrainedTokenizerBase
    reward: RewardFunction | None
    fused: bool
    tell: Callable[[str], None]

    def roll_out(
        self,
        fleet: Fleet,
        samples: Sequence[Sample],
        params: SamplingParams,
        clock: PhaseClock,
        max_new_tokens: Mapping[int, int] | None = None,
        *,
        teaches: bool = True,
    ) -> None:
        """Generate responses, and score them by models and by the reward function, where there is one.

        max_new_tokens: by sample id, in place of that of `params`. teaches: whether policies and costs of later
            rollouts may be learnt from this one; not from an evaluation, whose samples are few and others.
        """
        decode = partial(self.tokenizer.batch_decode, skip_special_tokens=True)
        with RewardCalls(self.reward, decode) as rewards:
            if self.fused:
                with clock.phase("rollout"):
                    fleet.roll_out(samples, params, rewards.submit, max_new_tokens=max_new_tokens, teaches=teaches)
            else:
                with clock.phase("generation"):
                    fleet.generate(samples, params, max_new_tokens=max_new_tokens)
                with clock.phase("inference"):
                    fleet.infer(samples)
                rewards.submit(samples)
            with clock.phase("reward"):
                self.tell("waiting: for rewards")
                rewards.finish()
        if not teaches:
            fleet.forget_spans()
