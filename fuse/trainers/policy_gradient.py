"""What the trainers of policy gradients without a critic share: estimators and losses by the names in `args`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from fuse.algorithms.algorithm import Algorithm, MeanOver
from fuse.algorithms.estimators import EstimatorSettings
from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.policy_gradient import policy_gradient
from fuse.algorithms.proximal_rloo_loss import proximal_rloo_policy_loss
from fuse.algorithms.rloo_loss import rloo_loss
from fuse.algorithms.sampler_correction import CorrectionSettings
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.config.grpo_loss import GRPOLossConfig
from fuse.config.policy_gradient import PolicyGradientConfig
from fuse.micro_batch import Loss
from fuse.sample import SpecialTokens
from fuse.trainers.group import GroupTrainer


class PolicyGradientTrainer(GroupTrainer):
    """Trains a policy by the estimator and the loss that `args` names."""

    args: PolicyGradientConfig

    def _make_algorithm(self, group: GroupSettings, special: SpecialTokens) -> Algorithm:
        args = self.args
        group = replace(group, reports_kl=bool(args.beta_of_reward))
        settings = EstimatorSettings(group=group, beta=args.beta_of_reward, **self._estimator_options())
        loss = LOSSES[args.loss](args, special)
        return policy_gradient(
            *(args.advantage, settings, loss, special),
            is_separable=args.has_separable_loss,
            has_reference=args.needs_reference,
            mean_over=_mean_over(args),
        )

    def _estimator_options(self) -> dict[str, Any]:
        """Those of `EstimatorSettings` that this algorithm's `args` have."""
        return {}


_MEANS_OVER: Mapping[str, MeanOver] = MappingProxyType(
    {"bnpo": "micro_batch", "dapo": "rollout", "cispo": "rollout", "vespo": "rollout"}
)
"""By `loss_type`; all others are means of samples."""


def _mean_over(args: PolicyGradientConfig) -> MeanOver | None:
    """Of the loss; None for the sum of two means of different kinds."""
    if not isinstance(args, GRPOLossConfig):
        return "samples"
    mean_over = _MEANS_OVER.get(args.loss_type, "samples")
    if not args.entropy_coef:
        return mean_over
    return None if mean_over == "rollout" else "micro_batch"


def _grpo(args: PolicyGradientConfig, special: SpecialTokens) -> Loss:
    assert isinstance(args, GRPOLossConfig)
    return partial(grpo_loss, settings=grpo_loss_settings(args, special))


def grpo_loss_settings(args: GRPOLossConfig, special: SpecialTokens) -> GRPOLossSettings:
    """What `args` asks for."""
    surrogate = SurrogateSettings(
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
    )
    mode = cast(Any, args.vllm_importance_sampling_mode)
    correction = CorrectionSettings(
        mode=mode, least=args.vllm_importance_sampling_clip_min, most=args.vllm_importance_sampling_clip_max
    )
    return GRPOLossSettings(
        temperature=args.sampling_temperature,
        loss_type=args.loss_type,
        level=args.importance_sampling_level,
        surrogate=surrogate,
        beta=args.beta_of_loss,
        weighs_kl=args.use_bias_correction_kl,
        is_on_policy=args.is_on_policy,
        max_tokens=args.max_completion_length,
        micro_batches_per_rollout=args.micro_batches_per_rollout,
        top_entropy_quantile=args.top_entropy_quantile,
        entropy_coef=args.entropy_coef,
        off_policy_threshold=args.off_policy_mask_threshold,
        correction=correction if args.corrects_sampler else None,
        num_tokens=special.num_tokens,
    )


def _rloo(args: PolicyGradientConfig, special: SpecialTokens) -> Loss:
    return partial(
        rloo_loss,
        temperature=args.sampling_temperature,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        num_tokens=special.num_tokens,
    )


def _proximal_rloo(args: PolicyGradientConfig, special: SpecialTokens) -> Loss:
    return partial(
        proximal_rloo_policy_loss,
        temperature=args.sampling_temperature,
        cliprange=args.epsilon,
        num_tokens=special.num_tokens,
    )


LOSSES: Mapping[str, Callable[[Any, SpecialTokens], Loss]] = MappingProxyType(
    {"grpo": _grpo, "rloo": _rloo, "proximal_rloo": _proximal_rloo}
)
"""The losses by name, made of what `args` asks for."""
