"""ReinforcePlusPlusTrainer: REINFORCE++ by the constructor of `GRPOTrainer`."""

from __future__ import annotations

from typing import Any

from fuse.config.clip_range import as_pair
from fuse.config.reinforce_plus_plus import ReinforcePlusPlusConfig
from fuse.trainers.policy_gradient import PolicyGradientTrainer


class ReinforcePlusPlusTrainer(PolicyGradientTrainer):
    """REINFORCE with returns whitened over the batch. args: see `ReinforcePlusPlusConfig`.

    Source: Hu et al. 2025 (arXiv 2501.03262). The arguments are those of `GroupTrainer`.
    """

    NAME = "REINFORCE++"
    SOURCE = "REINFORCE++ (arXiv 2501.03262)"
    CONFIG = ReinforcePlusPlusConfig

    args: ReinforcePlusPlusConfig

    def _estimator_options(self) -> dict[str, Any]:
        return {
            "reward_range": as_pair(self.args.reward_clip_range),
            "gamma": self.args.gamma,
        }
