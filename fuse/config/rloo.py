"""RLOOConfig: every option of an RLOO run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.config.group import GroupConfig
from fuse.config.run import option


@dataclass
class RLOOConfig(GroupConfig):
    """Arguments of `RLOOTrainer`: those of `GroupConfig` plus RLOO's own, as TRL's RLOOConfig has them (trl 1.12).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    num_generations: int = option(2, "Responses to every prompt, which are compared with one another.")
    beta: float = option(0.05, "Weight of the KL penalty in the reward. 0: there is no reference model.")
    normalize_advantages: bool = option(False, "Scale advantages to mean 0 and deviation 1 over the batch.")
    reward_clip_range: tuple[float, float] | None = option(None, "Bounds of rewards, before the KL penalty.")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.reward_clip_range is not None:
            least, most = self.reward_clip_range
            if least >= most:
                raise ValueError(
                    f"reward_clip_range={self.reward_clip_range} is empty: give a smaller and a larger number"
                )
            self.reward_clip_range = (least, most)
