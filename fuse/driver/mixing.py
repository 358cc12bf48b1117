"""A model that only scores and yet follows the policy, at a distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """After every `every_steps` optimizer steps, weights of `role` become alpha * policy + (1 - alpha) * themselves.

    Source: Gorbatovski et al. 2024 (arXiv 2404.09656), the soft update, as TRL has it with `sync_ref_model`.
    """

    role: str
    alpha: float
    every_steps: int

    def is_due(self, num_steps: int) -> bool:
        """Whether weights are mixed after the run's optimizer step of this number, counted from 1."""
        return num_steps % self.every_steps == 0

    def pieces(self, num_before: int, num_steps: int) -> Iterator[slice]:
        """So many steps after the first `num_before`, cut where weights are mixed before the last of them."""
        cuts = [step for step in range(1, num_steps) if self.is_due(num_before + step)]
        yield from map(slice, [0, *cuts], [*cuts, num_steps])
