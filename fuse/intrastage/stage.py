"""What a pipeline stage is to the executor: forwards, backwards in one piece or two. To the optimizer: parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fuse.micro_batch import Metrics, MicroBatch

Readout = Callable[[Tensor, nn.Module, MicroBatch], Tensor]
"""(hidden [selected, hidden], head, micro-batch) -> [selected]: what a model says of it, without gradient."""


Exported = Literal["trained", "whole", "merged"]
"""Weights that a stage tells: those that train; all; or those of the model without adapters that computes the same."""


class Stage(Protocol):
    """One stage of one model, as the executor sees it: it computes, and knows nothing of other stages."""

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        """An uninitialised tensor in the shape, type and device of this micro-batch's hidden states between stages.

        That is [batch, tokens, hidden], or [1, tokens, hidden] of those that are no padding.
        """
        ...

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        """Run micro-batch `index` and remember it until its backward.

        `stage_input` is what the previous stage returned, None at the first stage. Returns the hidden states
        [batch, tokens, hidden] for the next stage, None at the last one, which computes the loss instead.
        """
        ...

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        """Add micro-batch `index` to the parameters' gradients and forget it.

        `output_grad` is what the next stage returned, None at the last stage. Returns the gradient of
        `stage_input`, None at the first stage.
        """
        ...

    @property
    def can_split_backward(self) -> bool:
        """Whether a backward may come as `backward_input`, then `backward_weight`, which together do its work."""
        ...

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        """The half of `backward` that the previous stage waits for; same arguments, same result.

        Forgets micro-batch `index` but for what its weight gradients are made of.
        """
        ...

    def backward_weight(self, index: int) -> None:
        """The other half: add the weight gradients of micro-batch `index`, and forget the rest of it."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under the whole model's names; a tied copy carries its source's name.

        Those that are to stay as they are do not require gradients.
        """
        ...


class ForwardStage(Protocol):
    """One stage of one model, as forward-only pipelines see it."""

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        """As of `Stage`."""
        ...

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Readout) -> Tensor:
        """Run a micro-batch forward and remember nothing of it.

        `stage_input` is what the previous stage returned, None at the first stage. Returns the hidden states
        [batch, tokens, hidden] for the next stage, and at the last one what `read` makes of those of its rows.
        """
        ...


class TrainedStage(Stage, ForwardStage, Protocol):
    """A stage of a Hugging Face model, as optimizer and training state see it.

    metrics: of a last stage, by index, what the loss gave of each micro-batch when it last went forward.
    """

    metrics: dict[int, Metrics]

    def freeze(self, names: Collection[str]) -> None:
        """Have these parameters of the model, by their Hugging Face names, stay as they are, and all others train.

        Raises: ValueError where some are one tensor with others that train.
        """
        ...

    @property
    def tied_names(self) -> frozenset[str]:
        """Names of parameters that another stage of the same pipeline holds a copy of."""
        ...

    @property
    def undecayed_names(self) -> frozenset[str]:
        """Names of this stage's parameters that weight decay leaves alone."""
        ...

    @property
    def sharded_names(self) -> frozenset[str]:
        """Names of parameters of which other tensor-parallel ranks hold other parts; of the rest all hold copies."""
        ...

    @property
    def model_shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter of the whole Hugging Face model by name, on whichever stage it lives."""
        ...

    @property
    def stage_shapes(self) -> Mapping[str, torch.Size]:
        """Those of `model_shapes` that this stage's parameters are made of."""
        ...

    def to_hugging_face(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes with parameters of this stage, such as their gradients, under Hugging Face names and shapes.

        tensors: by the parameters' names. Views of them are returned where that can be.

        Whole on every tensor-parallel rank; all of them call this at once.
        """
        ...

    def from_hugging_face(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The way back: what goes with this stage's parameters, by name, for as many as `tensors` has."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, kept: Collection[str] = ()) -> None:
        """Copy this stage's weights from a Hugging Face state dict of the whole model, or of a part that has them.

        kept: names of those that it has already, which are not written.

        Raises: ValueError when one is missing or has another shape; then nothing was copied.
        """
        ...

    def export_weights(
        self, dtype: torch.dtype = torch.float32, part: Exported = "whole"
    ) -> Iterator[tuple[str, Tensor]]:
        """This stage's weights of this type under Hugging Face names; the first stage's copy alone of a tied embedding.

        They are made one by one as they are asked for: at no time does this hold more than two that training does not.
        Whole on every tensor-parallel rank; all of them ask in step. Some are live, others copies.
        """
        ...

    def exported_shapes(self, part: Exported = "whole") -> Mapping[str, torch.Size]:
        """Those of `export_weights`, in its order."""
        ...
