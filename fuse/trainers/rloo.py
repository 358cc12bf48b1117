"""RLOOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

from dataclasses import replace

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.rloo import RLOOSettings, rloo
from fuse.config.rloo import RLOOConfig
from fuse.sample import SpecialTokens
from fuse.trainers.group import GroupTrainer


class RLOOTrainer(GroupTrainer):
    """REINFORCE leave-one-out, in place of `trl.RLOOTrainer`. args: see `RLOOConfig`.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740). The arguments are those of `GroupTrainer`.
    """

    NAME = "RLOO"
    SOURCE = "REINFORCE leave-one-out (arXiv 2402.14740)"
    CONFIG = RLOOConfig

    args: RLOOConfig

    def _make_algorithm(self, group: GroupSettings, special: SpecialTokens) -> Algorithm:
        args = self.args
        settings = RLOOSettings(
            group=replace(group, reports_kl=bool(args.beta)),
            beta=args.beta,
            reward_range=args.reward_clip_range,
            normalizes_advantages=args.normalize_advantages,
            temperature=args.sampling_temperature,
            epsilon_low=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            num_tokens=special.num_tokens,
        )
        return rloo(settings, special)
