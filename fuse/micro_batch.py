"""What goes through a pipeline, and what comes out at its end: micro-batches, losses, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """What the rows of a regrouped micro-batch count in the sum that a step minimises: means and `weight` in one.

    Each sample's are of the micro-batch that it was drawn in, of weight w, with s samples and p selected rows.

    of_sum: [selected], w. of_positions: [selected], w / p. of_samples: [batch], w / s.
    """

    of_sum: Tensor
    of_positions: Tensor
    of_samples: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Right-padded sequences that pass through a pipeline together.

    input_ids: [batch, tokens] int64; every rank of the pipeline has them, as they tell the shape of what it receives.
    head_index: [selected] int64 into the flattened [batch * tokens]: the rows of the final hidden state the head sees.
    targets: what the loss needs; stages do not look inside.
    weight: of this micro-batch's loss in the sum that a step minimises.
    row_weights: in place of the loss's means where samples of several micro-batches pass together; `weight` is then 1.
    lengths: tokens of each sequence, without padding, which need not be computed then; None where it is to be.
    attention_mask, position_ids: [batch, tokens], only for layouts padded inside; plain causal attention without them.
    """

    input_ids: Tensor
    head_index: Tensor
    targets: Any
    weight: float = 1.0
    row_weights: RowWeights | None = None
    lengths: tuple[int, ...] | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def selected(self, hidden: Tensor) -> Tensor:
        """Of the final hidden states [batch, tokens, hidden] the rows [selected, hidden] that the head sees."""
        return hidden.flatten(0, 1).index_select(0, self.head_index)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on a device, with the targets' tensors if those are one, or a dataclass of some.

        All of them are on one device.
        """
        moved: MicroBatch = self if self.input_ids.device == device else _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that a loss gives of each micro-batch, and how an update's are made one.

    reduction: of the micro-batches' figures. per: a metric reduced alike that divides this one; it is not reported.
    first_step: of the micro-batches of an update's first optimizer step alone.
    """

    name: str
    reduction: Literal["mean", "min", "max", "sum"] = "mean"
    per: str | None = None
    first_step: bool = False


Metrics = Mapping[Metric, Tensor]
"""A micro-batch's figures, scalars."""

Loss = Callable[[Tensor, nn.Module, MicroBatch], tuple[Tensor, Metrics]]
"""(hidden [selected, hidden], head, micro-batch) -> (scalar to minimise, metrics); micro-batches add up."""
