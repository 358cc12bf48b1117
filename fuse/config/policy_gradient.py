"""PolicyGradientConfig: which advantages weigh which loss, and what of it goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fuse.algorithms.estimators import ESTIMATORS, Estimator
from fuse.config.group import GroupConfig
from fuse.config.option import either, option

_ADVANTAGES: Mapping[str, str] = {
    "group": "over the mean of a prompt's responses (GRPO)",
    "leave_one_out": "over the mean of a prompt's other responses (RLOO)",
    "reinforce++": "returns whitened over the batch (arXiv 2501.03262)",
    "reinforce++-baseline": "the same of rewards less the mean of a prompt's responses, which needs several",
    "grpovi": "as group, of rewards whose variance is increased (arXiv 2505.23247)",
}
_LOSSES: Mapping[str, str] = {
    "grpo": "the ratio of tokens, in the way of loss_type",
    "rloo": "the clipped ratio of whole responses",
    "proximal_rloo": "the same with one bound and PPO's metrics (arXiv 2410.18252)",
}


def advantage_option(default: str, *names: str) -> Any:
    """The field, with help on the estimators of these names; by default on all."""
    return option(default, f"What advantages are: {_described(_ADVANTAGES, names)}.")


def loss_option(default: str, *names: str) -> Any:
    """The field, with help on the losses of these names; by default on all."""
    return option(default, f"What advantages weigh: {_described(_LOSSES, names)}.")


def _described(texts: Mapping[str, str], names: Sequence[str]) -> str:
    return "; ".join(f"'{name}', {texts[name]}" for name in names or texts)


@dataclass
class PolicyGradientConfig(GroupConfig):
    """Arguments of `GroupConfig`, and the estimator of advantages and the loss, which may be combined.

    The KL penalty is in the reward where the estimator has it there, else in the loss.

    Raises:
        ValueError: an option out of range, or what does not go together, with the value, the rule and the remedy.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GroupConfig.CHOICES,
        "advantage": tuple(ESTIMATORS),
        "loss": ("grpo", "rloo", "proximal_rloo"),
    }
    OF_ADVANTAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Options, and the estimators that take them; with others they must stay unset."""
    OF_LOSSES: ClassVar[Mapping[str, tuple[str, ...]]] = {"epsilon_high": ("grpo", "rloo")}
    """Options, and the losses that take them."""

    advantage: str = advantage_option("group")
    loss: str = loss_option("grpo")

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage]

    @property
    def least_generations(self) -> int:
        return self.estimator.least_generations

    @property
    def needs_reference(self) -> bool:
        return self.estimator.needs_reference or super().needs_reference

    @property
    def beta_of_reward(self) -> float:
        """Weight of the KL penalty in the reward."""
        return self.beta if self.estimator.penalizes else 0.0

    @property
    def has_separable_loss(self) -> bool:
        """Whether the loss is a sum of terms of single responses."""
        return True

    @property
    def beta_of_loss(self) -> float:
        return 0.0 if self.estimator.penalizes else self.beta

    def _check_combinations(self) -> None:
        super()._check_combinations()
        self._check_taken("advantage", self.OF_ADVANTAGES)
        self._check_taken("loss", self.OF_LOSSES)
        if self.loss == "grpo":
            return
        if self.estimator.by_token:
            remedies = {
                "loss": [name for name in self.CHOICES["loss"] if name == "grpo"],
                "advantage": [name for name in self.CHOICES["advantage"] if not ESTIMATORS[name].by_token],
            }
            raise ValueError(
                f"advantage={self.advantage!r} with loss={self.loss!r}: these advantages differ from token to token, "
                f"and to this loss a response is one action: use "
                + ", or ".join(f"{option}={either(names)}" for option, names in remedies.items() if names)
            )
        if self.beta_of_loss:
            penalizing = [name for name, one in ESTIMATORS.items() if one.penalizes and not one.by_token]
            raise ValueError(
                f"beta={self.beta} with advantage={self.advantage!r} and loss={self.loss!r}, neither of which has a KL "
                f"penalty: set beta=0, or advantage={either(penalizing)}"
            )

    def _check_taken(self, by: str, options: Mapping[str, tuple[str, ...]]) -> None:
        """Whether options that the chosen estimator or loss does not take are unset."""
        defaults = {field.name: field.default for field in fields(self)}
        chosen = getattr(self, by)
        for name, takers in options.items():
            if chosen not in takers and (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} with {by}={chosen!r}, which does not take it: leave it out, or set "
                    f"{by}={either(takers)}"
                )
