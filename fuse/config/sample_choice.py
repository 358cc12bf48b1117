"""SampleChoiceConfig: which groups of responses are trained on, and what is taken off the rewards of long ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fuse.algorithms.group_batch import Penalty
from fuse.algorithms.overlong_penalty import overlong_penalty
from fuse.config.option import option
from fuse.config.run import RunConfig

_ROUNDS = 10


@dataclass
class SampleChoiceConfig(RunConfig):
    """Arguments of `RunConfig`, and DAPO's of samples: Yu et al. 2025 (arXiv 2503.14476), sections 3.2 and 3.4.

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        *RunConfig.AT_LEAST_ONE,
        *("max_dynamic_rounds", "overlong_buffer", "overlong_max_length"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*RunConfig.NOT_NEGATIVE, "overlong_penalty", "min_reward_variance")

    dynamic_sampling: bool = option(
        False,
        "Replace groups whose responses are all rewarded alike by groups of the next prompts, as DAPO does; "
        "dynamic_sampling/replaced_groups counts them.",
    )
    min_reward_variance: float | None = option(
        None,
        "Least sample variance of a group's rewards, penalties not counted: of groups below it, and of equal rewards, "
        "nothing is learnt; dynamic_sampling replaces them. spread_filter/groups counts them. Default: none, by which "
        "all groups take part.",
    )
    max_dynamic_rounds: int = option(
        _ROUNDS, "Times that dynamic_sampling draws prompts for one update; then it goes on with what there is."
    )
    overlong_penalty: float = option(
        0.0,
        "What is taken off the reward of a response of overlong_max_length tokens or more, and of one in the buffer "
        "before it in proportion, as DAPO does, with 1; 0 for nothing.",
    )
    overlong_buffer: int | None = option(
        None, "Tokens below overlong_max_length in which overlong_penalty rises from 0: DAPO's L_cache."
    )
    overlong_max_length: int | None = option(
        None, "Tokens from which on overlong_penalty is whole: DAPO's L_max. Default: most tokens of a response."
    )

    @property
    def penalties(self) -> Mapping[str, Penalty]:
        """What is added to rewards, by name."""
        if not self.overlong_penalty:
            return {}
        assert self.overlong_buffer is not None, "checked on construction"
        penalty = partial(
            overlong_penalty,
            max_length=self.overlong_max_length or self.max_response_tokens,
            buffer=self.overlong_buffer,
            factor=self.overlong_penalty,
        )
        return {"overlong_penalty": lambda lengths, ended: penalty(lengths)}

    @property
    def trains_early(self) -> bool:
        """Not where groups may be replaced after they have been scored."""
        return super().trains_early and not self.dynamic_sampling

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.max_dynamic_rounds != _ROUNDS and not self.dynamic_sampling:
            raise ValueError(
                f"max_dynamic_rounds={self.max_dynamic_rounds} without dynamic_sampling: set dynamic_sampling=True, or "
                f"leave it out"
            )
        if not self.overlong_penalty:
            for name in ("overlong_buffer", "overlong_max_length"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name}={value} without overlong_penalty: set overlong_penalty, DAPO's is 1, or leave it out"
                    )
            return
        if self.overlong_buffer is None:
            raise ValueError(
                f"overlong_penalty={self.overlong_penalty} without overlong_buffer: set the tokens in which it rises"
            )
        most = self.overlong_max_length or self.max_response_tokens
        if self.overlong_buffer > most:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is more than overlong_max_length={most}: choose at most that"
            )
        if most - self.overlong_buffer >= self.max_response_tokens:
            raise ValueError(
                f"overlong_max_length={most} less overlong_buffer={self.overlong_buffer} is no less than "
                f"{self.MAX_RESPONSE_OPTION}={self.max_response_tokens}, so no response would be penalised: lower "
                f"overlong_max_length, or raise overlong_buffer"
            )
