"""GRPOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

from typing import Any

from fuse.config.grpo import GRPOConfig
from fuse.trainers.policy_gradient import PolicyGradientTrainer


class GRPOTrainer(PolicyGradientTrainer):
    """Group relative policy optimisation, in place of `trl.GRPOTrainer`. args: see `GRPOConfig`.

    Source: Shao et al. 2024 (arXiv 2402.03300). The arguments are those of `GroupTrainer`.
    """

    NAME = "GRPO"
    SOURCE = "group relative policy optimisation (arXiv 2402.03300)"
    CONFIG = GRPOConfig

    args: GRPOConfig

    def _estimator_options(self) -> dict[str, Any]:
        return {"scale": self.args.scale_rewards, "aggregation": self.args.multi_objective_aggregation}
