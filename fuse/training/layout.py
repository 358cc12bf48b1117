"""How a batch is laid out and stepped through: ragged, or as TRL's trainers do it, for comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fuse.algorithms.batch import Experience
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.packing import can_pack
from fuse.micro_batch import MicroBatch
from fuse.roles import training
from fuse.training.micro_batches import padded, ragged
from fuse.training.steps import Division, OptimizerStep, optimizer_steps, trl_optimizer_steps


class Layout(Protocol):
    """How an update's samples become optimizer steps and micro-batches.

    drops_padding: padding tokens inside of prompts are left out. clips_gradients, autocasts: whether options that ask
    for it take effect. packs: models compute nothing for padding, so that a micro-batch costs its tokens.
    """

    drops_padding: ClassVar[bool]
    clips_gradients: ClassVar[bool]
    autocasts: ClassVar[bool]

    @property
    def packs(self) -> bool: ...

    def steps(
        self, permutations: Sequence[NDArray[np.int64]], division: Division, *, last_of_pass: bool
    ) -> list[OptimizerStep]:
        """An update's steps. permutations: [epochs][batch]. last_of_pass: the update ends a pass over the dataset."""
        ...

    def micro_batches(self, experience: Experience, samples: Sequence[int], weight: float) -> dict[str, MicroBatch]:
        """What each role that trains gets of these samples."""
        ...

    def shape(self, experience: Experience, samples: Sequence[int]) -> Shape:
        """Of that micro-batch."""
        ...

    def num_places(self, division: Division) -> int | None:
        """How many micro-batches a metric's mean counts, those that are not there as zero; None: those that are."""
        ...


@dataclass(frozen=True, slots=True)
class RaggedLayout:
    """Nothing is padded that need not be, and every mini-batch is one step."""

    drops_padding: ClassVar[bool] = False
    clips_gradients: ClassVar[bool] = True
    autocasts: ClassVar[bool] = True

    packs: bool = False

    @classmethod
    def of(cls, models: Mapping[str, PreTrainedModel], backend: str, accelerator: str) -> RaggedLayout:
        """That of a run of these models, by role: packed where all of them that train can be on these devices."""
        can = all(can_pack(models[role], accelerator) for role in training(models))
        return cls(packs=can and backend == "transformers")

    def steps(
        self, permutations: Sequence[NDArray[np.int64]], division: Division, *, last_of_pass: bool
    ) -> list[OptimizerStep]:
        return optimizer_steps(
            permutations, num_mini_batches=division.num_mini_batches, micro_batch_size=division.micro_batch_size
        )

    def micro_batches(self, experience: Experience, samples: Sequence[int], weight: float) -> dict[str, MicroBatch]:
        return ragged(experience, samples, weight, packs=self.packs)

    def shape(self, experience: Experience, samples: Sequence[int]) -> Shape:
        return Shape.of([len(experience.prompts[i]) + experience.lengths[i] for i in samples], packs=self.packs)

    def num_places(self, division: Division) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class TRLLayout:
    """TRL's PPOTrainer (trl 1.12) with its quirks: padded batches, steps by accumulation, no clipping or autocast.

    Its table of metrics counts places too that no micro-batch fills.
    """

    pad_token_id: int

    drops_padding: ClassVar[bool] = True
    clips_gradients: ClassVar[bool] = False
    autocasts: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def steps(
        self, permutations: Sequence[NDArray[np.int64]], division: Division, *, last_of_pass: bool
    ) -> list[OptimizerStep]:
        return trl_optimizer_steps(
            permutations,
            num_mini_batches=division.num_mini_batches,
            micro_batch_size=division.micro_batch_size,
            accumulation=division.accumulation,
            last_of_pass=last_of_pass,
        )

    def micro_batches(self, experience: Experience, samples: Sequence[int], weight: float) -> dict[str, MicroBatch]:
        return padded(experience, samples, weight, self.pad_token_id)

    def shape(self, experience: Experience, samples: Sequence[int]) -> Shape:
        return Shape(len(samples), max(map(len, experience.prompts)) + experience.width)

    def num_places(self, division: Division) -> int | None:
        return division.num_epochs * division.num_mini_batches * division.accumulation
