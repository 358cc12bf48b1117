"""GRPOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

from typing import Any, cast

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.grpo import GRPOSettings, grpo
from fuse.algorithms.grpo_loss import GRPOLossSettings
from fuse.algorithms.sampler_correction import CorrectionSettings
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.config.grpo import GRPOConfig
from fuse.sample import SpecialTokens
from fuse.trainers.group import GroupTrainer


class GRPOTrainer(GroupTrainer):
    """Group relative policy optimisation, in place of `trl.GRPOTrainer`. args: see `GRPOConfig`.

    Source: Shao et al. 2024 (arXiv 2402.03300). The arguments are those of `GroupTrainer`.
    """

    NAME = "GRPO"
    SOURCE = "group relative policy optimisation (arXiv 2402.03300)"
    CONFIG = GRPOConfig

    args: GRPOConfig

    def _make_algorithm(self, group: GroupSettings, special: SpecialTokens) -> Algorithm:
        return grpo(grpo_settings(self.args, group, special), special)


def grpo_settings(args: GRPOConfig, group: GroupSettings, special: SpecialTokens) -> GRPOSettings:
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
    loss = GRPOLossSettings(
        temperature=args.sampling_temperature,
        loss_type=args.loss_type,
        level=args.importance_sampling_level,
        surrogate=surrogate,
        beta=args.beta,
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
    return GRPOSettings(
        group=group,
        scale=cast(Any, args.scale_rewards),
        aggregation=args.multi_objective_aggregation,
        loss=loss,
    )
