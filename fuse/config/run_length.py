"""How much a run trains, and in what units."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """Updates, of one rollout each, and the optimizer steps in them.

    num_steps: of the run, as its state counts them: `global_step`. steps_per_update: so many of these are an update.
    optimizer_steps_per_update: as many, or more where an update counts as one step whatever it consists of; of the role
        that takes most.
    samples_per_prompt: responses to each of the prompts.
    """

    prompts_per_update: int
    num_steps: int
    optimizer_steps_per_update: int
    micro_batches_per_step: int
    steps_per_update: int = 1
    samples_per_prompt: int = 1

    @property
    def samples_per_update(self) -> int:
        return self.prompts_per_update * self.samples_per_prompt

    @property
    def num_updates(self) -> int:
        return math.ceil(self.num_steps / self.steps_per_update)

    def num_epochs(self, num_rows: int) -> int:
        """Passes over so many prompts, the last of them begun."""
        return math.ceil(self.num_updates * self.prompts_per_update / num_rows)

    @property
    def identity(self) -> dict[str, int]:
        """What must not change on resumption."""
        group = {"num_generations": self.samples_per_prompt} if self.samples_per_prompt > 1 else {}
        return {"batch_size": self.samples_per_update, **group}
