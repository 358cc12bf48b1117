"""RLOOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

from typing import Any

from fuse.config.clip_range import as_pair
from fuse.config.rloo import RLOOConfig
from fuse.trainers.policy_gradient import PolicyGradientTrainer


class RLOOTrainer(PolicyGradientTrainer):
    """REINFORCE leave-one-out, in place of `trl.RLOOTrainer`. args: see `RLOOConfig`.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740). The arguments are those of `GroupTrainer`.
    """

    NAME = "RLOO"
    SOURCE = "REINFORCE leave-one-out (arXiv 2402.14740)"
    CONFIG = RLOOConfig

    args: RLOOConfig

    def _estimator_options(self) -> dict[str, Any]:
        return {
            "reward_range": as_pair(self.args.reward_clip_range),
            "normalizes": self.args.normalize_advantages,
        }
