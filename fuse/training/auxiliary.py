"""Text that a policy trains on beside its samples: micro-batches of its own in the policy's optimizer steps.

They pass through the policy's pipeline as those of samples do, behind them, so that schedules, profiles and memory
count them; their gradients are part of the step's sum. What a token counts depends on the step alone, and not on the
micro-batch it is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuse.algorithms.language_model_loss import AUXILIARY_LOSS, TextTargets, language_model_loss
from fuse.intrastage.cost_profile import Shape
from fuse.micro_batch import Loss, Metric, Metrics, MicroBatch
from fuse.training.length_groups import length_groups


@dataclass(frozen=True, slots=True)
class Text:
    """A row of text. learnt: its tokens' indices that the loss is of, each of which has a token before it."""

    input_ids: tuple[int, ...]
    learnt: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Rows that pass through the pipeline together. weight: of each learnt token in the sum that the step minimises."""

    rows: tuple[Text, ...]
    weight: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the rows."""
        return tuple(len(row.input_ids) for row in self.rows)

    def shape(self, *, packs: bool) -> Shape:
        """Of the micro-batch. packs: as of `Layout`."""
        return Shape.of(self.lengths, packs=packs)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def micro_batch(self, *, packs: bool) -> MicroBatch:
        """Right-padded; the head sees where a learnt token is predicted. packs: as of `Layout`."""
        width = max(self.lengths)
        input_ids = torch.zeros(len(self.rows), width, dtype=torch.int64)
        for index, row in enumerate(self.rows):
            input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        places = [index * width + learnt - 1 for index, row in enumerate(self.rows) for learnt in row.learnt]
        head_index = torch.tensor(places, dtype=torch.int64)
        targets = TextTargets(input_ids.flatten()[head_index + 1])
        lengths = self.lengths if packs else None
        return MicroBatch(
            input_ids=input_ids, head_index=head_index, targets=targets, weight=self.weight, lengths=lengths
        )


def text_batches(rows: Sequence[Text], *, most_rows: int, coef: float) -> tuple[TextBatch, ...]:
    """The rows of an optimizer step, dealt by length into as many micro-batches as hold all at `most_rows` each.

    How many there are depends on the number of rows alone. Short rows may be more together: none has more tokens,
    padding included, than `most_rows` of the longest. coef: of the mean over the step's learnt tokens.
    """
    weight = coef / sum(len(row.learnt) for row in rows)
    groups = length_groups([len(row.input_ids) for row in rows], -(-len(rows) // most_rows))
    return tuple(TextBatch(rows=tuple(rows[index] for index in group), weight=weight) for group in groups)


@dataclass(frozen=True, slots=True)
class WithText:
    """A loss of samples; of micro-batches of text it is that of a language model."""

    of_samples: Loss

    def __call__(self, hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        loss = language_model_loss if isinstance(micro_batch.targets, TextTargets) else self.of_samples
        return loss(hidden, head, micro_batch)


def is_of_text(metrics: Mapping[Metric, Tensor]) -> bool:
    """Whether a micro-batch of text gave them."""
    return AUXILIARY_LOSS in metrics
