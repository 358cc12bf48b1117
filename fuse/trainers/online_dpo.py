"""OnlineDPOTrainer: TRL's trainer to the code that calls it, stage fusion on Ray workers inside."""

from __future__ import annotations

from typing import Any, cast

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.online_dpo import OnlineDPOSettings, online_dpo
from fuse.config.online_dpo import OnlineDPOConfig
from fuse.sample import SpecialTokens
from fuse.trainers.group import GroupTrainer


class OnlineDPOTrainer(GroupTrainer):
    """Online direct preference optimisation, in place of `trl.experimental.online_dpo.OnlineDPOTrainer`.

    args: see `OnlineDPOConfig`. The other arguments are those of `GroupTrainer`, by name: there is no `ref_model`, for
    the reference is the policy as it was. Sources: Guo et al. 2024 (arXiv 2402.04792), Rafailov et al. 2023 (arXiv
    2305.18290).
    """

    NAME = "Online-DPO"
    SOURCE = "online direct preference optimisation (arXiv 2402.04792)"
    CONFIG = OnlineDPOConfig

    args: OnlineDPOConfig

    def _make_algorithm(self, group: GroupSettings, special: SpecialTokens) -> Algorithm:
        args = self.args
        settings = OnlineDPOSettings(
            group=group,
            beta=args.beta,
            form=cast(Any, args.loss_type),
            temperature=args.sampling_temperature,
            num_tokens=special.num_tokens,
        )
        return online_dpo(settings, special)
