"""How long prompts are, on which engines and stages depend."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from fuse.engines.limits import num_positions

_LEAST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """How many tokens prompts have: typically, and at most; None where that is not known."""

    typical: int
    most: int | None = None

    def context(self, response_length: int, actor: PretrainedConfig) -> int | None:
        """The most tokens of prompt and response together; None for what the actor has positions for."""
        if self.most is None:
            return None
        positions = num_positions(actor)
        needed = max(self.most + response_length, _LEAST_CONTEXT)
        return needed if positions is None else min(needed, positions)
