"""DAPO's dynamic sampling: groups whose rewards are all equal give way to groups of the next prompts.

Source: Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.2. As many prompts are drawn as groups are to be replaced,
where DAPO draws whole batches and drops what it has too many of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fuse.sample import Sample
from fuse.trainers.reward_calls import ERRORS
from fuse.trainers.spread_filter import alike, without_spread

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSampling:
    """How groups are replaced.

    most_rounds: of drawing prompts in their place, in one update. num_generations: samples of a group, side by side.
    reward_weights: of the functions whose weighted sums must not all be equal in a group; penalties do not count.
    min_variance: that they must have, too.
    draw: so many prompts -> their samples. score: fills these in, and returns metrics of rewarding them.
    """

    most_rounds: int
    num_generations: int
    reward_weights: Sequence[float]
    draw: Callable[[int], Sequence[Sample]]
    score: Callable[[Sequence[Sample]], Mapping[str, float]]
    min_variance: float | None = None

    def roll_out(self, num_groups: int) -> tuple[list[Sample], list[Sample], dict[str, float]]:
        """So many groups, the samples that were replaced on the way, and metrics.

        Groups keep their places, and one that replaces another takes its: what is trained on does not depend on which
        sample is generated first. When the rounds are used up, groups without spread stay, and a warning says so.
        """
        rounds: list[Mapping[str, float]] = []
        samples = list(self.draw(num_groups))
        rounds.append(self.score(samples))
        replaced: list[Sample] = []
        left = self._without_spread(samples)
        while left and len(rounds) <= self.most_rounds:
            _logger.info(
                "dynamic sampling: %d of %d groups have %s, and are replaced (round %d of at most %d)",
                *(len(left), num_groups, alike(self.min_variance), len(rounds), self.most_rounds),
            )
            fresh = list(self.draw(len(left)))
            rounds.append(self.score(fresh))
            for index, group in enumerate(left):
                replaced += samples[self._slice(group)]
                samples[self._slice(group)] = fresh[self._slice(index)]
            left = self._without_spread(samples)
        if left:
            _logger.warning(
                "dynamic sampling: after max_dynamic_rounds=%d rounds %d of %d groups still have %s, and teach "
                "nothing: raise max_dynamic_rounds, or choose prompts that are neither too easy nor too hard",
                *(self.most_rounds, len(left), num_groups, alike(self.min_variance)),
            )
        return (
            samples,
            replaced,
            {
                **_merged(rounds),
                "dynamic_sampling/replaced_groups": float(len(replaced) // self.num_generations),
                "dynamic_sampling/rounds": float(len(rounds) - 1),
                "dynamic_sampling/groups_without_spread": float(len(left)),
            },
        )

    def _without_spread(self, samples: Sequence[Sample]) -> list[int]:
        """Numbers of groups."""
        return without_spread(samples, self.num_generations, self.reward_weights, self.min_variance)

    def _slice(self, group: int) -> slice:
        return slice(group * self.num_generations, (group + 1) * self.num_generations)


def _merged(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of rewarding, over all rounds: errors are counted, others are means over the rounds that have them."""
    names = {name for metrics in rounds for name in metrics}
    merged = {}
    for name in sorted(names):
        values = [metrics[name] for metrics in rounds if name in metrics]
        merged[name] = sum(values) / (1 if name == ERRORS else len(values))
    return merged
