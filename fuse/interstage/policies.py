"""Policies by name, from what past lengths teach: for simulations, and for rollouts beside them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.lengths import KnownLengths, Observation, learn
from fuse.interstage.migration import Policy, StageByStage
from fuse.interstage.rollout import Rollout
from fuse.interstage.tuning import LengthHistory, expected_gain, pays, tune_threshold

NONE, THRESHOLD, ADAPTIVE, KNOWN = "none", "threshold", "adaptive", "known"
POLICIES = (NONE, THRESHOLD, ADAPTIVE)
"""Those that know of lengths what the past tells."""


def policy_of(name: str, rollout: Rollout, past: LengthTrace, prompts: Sequence[Hashable] = ()) -> Policy:
    """The policy of this name for a rollout; KNOWN is the adaptive one, told all lengths.

    past: lengths to learn from. prompts: of the rollout's samples, equal to those of the past where prompts are.
    """
    costs, limits = rollout.costs, rollout.limits
    if name == NONE:
        return StageByStage()
    if name == KNOWN:
        return Adaptive(costs, KnownLengths(rollout.response_tokens), rollout.can_transfer)
    history = LengthHistory(prompt_tokens=past.prompt_tokens, response_tokens=past.response_tokens)
    policy: Policy
    pooled: Policy  # as it is of samples of whose prompts nothing is known
    if name == ADAPTIVE:
        pairs = zip(past.response_tokens.tolist(), past.prompts, strict=True)
        model = learn((Observation(tokens, prompt=prompt) for tokens, prompt in pairs), limits.max_new_tokens)
        policy = Adaptive(costs, model.for_samples(dict(enumerate(prompts))), rollout.can_transfer)
        pooled = Adaptive(costs, model.for_samples(), rollout.can_transfer)
    else:
        assert name == THRESHOLD, name
        policy = pooled = tune_threshold(
            history,
            num_samples=rollout.num_samples,
            num_devices=rollout.num_devices,
            costs=costs,
            limits=limits,
            can_transfer=rollout.can_transfer,
        )
    gain = expected_gain(
        pooled,
        history,
        num_samples=rollout.num_samples,
        num_devices=rollout.num_devices,
        costs=costs,
        limits=limits,
        can_transfer=rollout.can_transfer,
    )
    return policy if pays(gain) else StageByStage()
