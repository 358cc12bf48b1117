"""GRPOLossConfig: the options of GRPO's loss, whichever advantages it weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fuse.config.option import option
from fuse.config.policy_gradient import PolicyGradientConfig

_REFUSED = "Accepted for compatibility; must stay unset."


@dataclass
class GRPOLossConfig(PolicyGradientConfig):
    """Arguments of `PolicyGradientConfig`, and those of GRPO's loss, as TRL's GRPOConfig has them (trl 1.12).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    POSITIVE: ClassVar[tuple[str, ...]] = (
        *PolicyGradientConfig.POSITIVE,
        *("sapo_temperature_neg", "sapo_temperature_pos"),
    )
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PolicyGradientConfig.CHOICES,
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
        "importance_sampling_level": ("token", "sequence"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    }
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        **PolicyGradientConfig.UNSUPPORTED,
        "use_adaptive_entropy": "leave it out: entropy_coef stays as it is set",
        "cast_lm_head_to_fp32": "leave it out: heads compute log-probabilities in float32",
        "max_tool_calling_iterations": "leave it out: responses call no tools",
        "log_completions_hub_repo": "leave it out: completions are printed and given to TensorBoard and W&B",
        "vllm_importance_sampling_cap": "set vllm_importance_sampling_clip_max",
    }
    OF_LOSSES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PolicyGradientConfig.OF_LOSSES,
        **dict.fromkeys(
            (
                *("loss_type", "importance_sampling_level", "delta", "top_entropy_quantile", "entropy_coef"),
                "use_bias_correction_kl",
                *("off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos"),
                *("vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "vllm_importance_sampling_correction"),
                *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
                "vllm_importance_sampling_clip_min",
            ),
            ("grpo",),
        ),
    }

    loss_type: str = option(
        "dapo",
        "What the loss of a token is, and what kind of mean over tokens: one of grpo, bnpo, dr_grpo, dapo, "
        "cispo, sapo, vespo, luspo.",
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Whether a ratio is a token's, or the geometric mean over its response."
    )
    delta: float | None = option(None, "Upper bound of ratios for negative advantages, too.")
    top_entropy_quantile: float = option(1.0, "The share of tokens, those of most entropy, that are trained on.")
    entropy_coef: float = option(0.0, "Weight of the entropy of the tokens that are trained on, which is to be large.")
    use_bias_correction_kl: bool = option(True, "Multiply the KL penalty of a token by its ratio.")
    off_policy_mask_threshold: float | None = option(
        None, "Leave out responses with negative advantage whose log-ratio is, in the mean, larger."
    )
    sapo_temperature_neg: float = option(1.05, "SAPO's temperature for advantages that are not positive.")
    sapo_temperature_pos: float = option(1.0, "SAPO's temperature for positive advantages.")
    vespo_k_pos: float = option(2.0, "VESPO's k for advantages that are not negative.")
    vespo_lambda_pos: float = option(3.0, "VESPO's lambda for advantages that are not negative.")
    vespo_k_neg: float = option(3.0, "VESPO's k for negative advantages.")
    vespo_lambda_neg: float = option(2.0, "VESPO's lambda for negative advantages.")
    vllm_importance_sampling_correction: bool = option(
        True, "With engine='vllm', weight samples by how likely the trainer finds them."
    )
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        "Whether these weights are of tokens or of responses, and whether those out of bounds become the bound or "
        "zero: token_truncate, token_mask, sequence_truncate or sequence_mask.",
    )
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Largest of these weights.")
    vllm_importance_sampling_clip_min: float | None = option(None, "Smallest of these weights.")

    use_adaptive_entropy: bool = option(False, _REFUSED)
    entropy_coef_min: float = option(0.0, "Accepted for compatibility; no effect.")
    entropy_coef_max: float = option(1.0, "Accepted for compatibility; no effect.")
    entropy_coef_delta: float = option(0.005, "Accepted for compatibility; no effect.")
    entropy_target: float = option(0.2, "Accepted for compatibility; no effect.")
    cast_lm_head_to_fp32: bool = option(False, _REFUSED)
    max_tool_calling_iterations: int | None = option(None, _REFUSED)
    log_completions_hub_repo: str | None = option(None, _REFUSED)
    vllm_importance_sampling_cap: float | None = option(None, _REFUSED)

    @property
    def corrects_sampler(self) -> bool:
        """Whether samples are weighted by how likely the trainer finds them."""
        return self.engine == "vllm" and self.vllm_importance_sampling_correction and self.loss == "grpo"

    @property
    def has_separable_loss(self) -> bool:
        """Not with a quantile, which is of all of a micro-batch's tokens."""
        return self.top_entropy_quantile == 1

    @property
    def recomputes_logprobs(self) -> bool:
        """Where all is trained on by the weights that generated it, the loss has the trainer's own without a pass."""
        is_asked = self.old_logprobs == "trainer" or (self.old_logprobs == "auto" and self.corrects_sampler)
        return is_asked and not self.is_on_policy

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile={self.top_entropy_quantile} must lie between 0 and 1, or be 1")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        mode = self.vllm_importance_sampling_mode
        least, most = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if least is not None and most is not None and least >= most:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={least} is not below vllm_importance_sampling_clip_max={most}"
            )
        if not self.corrects_sampler:
            return
        if mode.endswith("truncate") and least is None and most is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r} without bounds: set vllm_importance_sampling_clip_max"
            )
        if self.loss_type == "vespo" and mode.startswith("sequence"):
            raise ValueError(
                f"loss_type='vespo' with vllm_importance_sampling_mode={mode!r}: it weights sequences itself, so set "
                f"'token_truncate' or 'token_mask'"
            )
        if self.old_logprobs == "engine" and not self.is_on_policy:
            raise ValueError(
                "vllm_importance_sampling_correction=True and old_logprobs='engine' with several optimizer steps per "
                "rollout: samples are weighted by the trainer's log-probabilities of before the first, so set "
                "old_logprobs='trainer'"
            )
