"""Finds what a model's stages hold and take without memory: they run on tensors that have only shapes.

So it is the code that trains that is measured, whatever the architecture, and not a formula of it.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.driver.stage_bytes import SIZES, HeadBytes, Line, ModelBytes, StageLines
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training.model_spec import ModelSpec

_NUM_STAGES = 3
_SEQUENCES = 8
_STATISTICS_BYTES = 4 * 8 + 8
"""What the head's loss keeps of a position beside its hidden state: float64 [4] and its target."""
_UNMASKED = "fuse_unmasked_sdpa"


def model_bytes(
    spec: ModelSpec,
    head_shape: tuple[int, int],
    *,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    split_backward: bool,
    device: str,
) -> ModelBytes:
    """Run stages of `spec`'s layers with these options of `TransformersStage`, without memory. Takes seconds.

    head_shape: of the head's weight. device: that it is for, "cpu" or "cuda".

    Raises:
        ValueError: a model of which no stages can be made, or whose layers do not run without values.
    """
    config = copy.deepcopy(spec.config)
    text = config.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:2]
    attention = config._attn_implementation
    model_class: Any = spec.model_class
    try:
        return _measured(
            model_class,
            config.to_json_string(),
            attention,
            HeadBytes(*head_shape, (autocast or torch.float32).itemsize, device),
            autocast,
            gradient_checkpointing,
            split_backward,
        )
    except (RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"memory of {spec.model_class.__name__} cannot be foreseen ({reason}): plan with a dense model of its size"
        ) from error


@lru_cache(maxsize=32)
def _measured(
    model_class: Any,
    config_json: str,
    attention: str | None,
    head: HeadBytes,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    split_backward: bool,
) -> ModelBytes:
    config = model_class.config_class.from_dict(json.loads(config_json))
    # Under its own name transformers would build a mask wherever it cannot see that none is needed.
    ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, sdpa_attention_forward)
    config._attn_implementation = _UNMASKED if attention in (None, "sdpa") else attention

    def probe(stage: int, num_layers: int) -> _Probe:
        return _Probe(
            model_class,
            config,
            stage=stage,
            num_stages=_NUM_STAGES,
            layer_range=(0, num_layers),
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
            split_backward=split_backward,
        )

    one, two = probe(1, 1), probe(1, 2)
    return ModelBytes(
        one=one.lines(),
        two=two.lines(),
        first=probe(0, 1).lines(),
        last=probe(_NUM_STAGES - 1, 1).lines(),
        boundary=one.boundary(),
        scoring=two.scoring(),
        shared=one.shared_bytes(),
        head=head,
    )


class _Probe:
    """A stage of one or two layers without memory, and the bytes it would take."""

    def __init__(self, model_class: Any, config: Any, **options: Any) -> None:
        self._shapes_alone = FakeTensorMode(allow_non_fake_inputs=True)
        with self._shapes_alone:
            self._stage = _ShapeStage(model_class, config, loss=_loss, **options)
            for _, parameter in self._stage.named_parameters():
                parameter.grad = torch.empty_like(parameter)

    def lines(self) -> StageLines:
        """Of forward and backward, in halves where the stage can."""
        return StageLines(*map(Line.through, zip(*map(self._trained, SIZES), strict=True)))

    def scoring(self) -> Line:
        """The most of a forward of which nothing is kept."""
        return Line.through([self._scored(tokens) for tokens in SIZES])

    def shared_bytes(self) -> float:
        """Of a position, held once for all sequences."""
        tokens = SIZES[1]
        apart, _, _ = self._trained(tokens)
        together, _, _ = self._trained(tokens, _SEQUENCES)
        return (apart - together) / (tokens - tokens // _SEQUENCES)

    def boundary(self) -> Line:
        """Of the hidden states that stages send."""
        return Line.through([self._boundary_bytes(tokens) for tokens in SIZES])

    def _boundary_bytes(self, tokens: int) -> int:
        with self._shapes_alone:
            num_bytes: int = self._stage.boundary(_micro_batch(tokens)).nbytes
        return num_bytes

    def _trained(self, tokens: int, num_sequences: int = 1) -> tuple[int, int, int]:
        stage = self._stage
        with self._shapes_alone:
            batch = _micro_batch(tokens, num_sequences)
            with LiveMemory() as live:
                stage_input = None if stage.is_first else torch.empty_like(stage.boundary(batch))
                output = stage.forward(0, batch, stage_input)
                del stage_input
                held = live.bytes
                working, live.peak_bytes = live.peak_bytes - held, held
                output_grad = None if output is None else torch.empty_like(output)
                del output
                if not stage.can_split_backward:
                    stage.backward(0, output_grad)
                    return held, 0, max(working, live.peak_bytes - held)
                input_grad = stage.backward_input(0, output_grad)
                del input_grad, output_grad
                deferred = live.bytes
                working, live.peak_bytes = max(working, live.peak_bytes - held), deferred
                stage.backward_weight(0)
                return held, deferred, max(working, live.peak_bytes - deferred)

    def _scored(self, tokens: int) -> int:
        for _, parameter in self._stage.named_parameters():
            parameter.requires_grad_(False)
        with self._shapes_alone, torch.no_grad(), LiveMemory() as live:
            batch = _micro_batch(tokens)
            self._stage.forward(tokens, batch, torch.empty_like(self._stage.boundary(batch)))
            peak_bytes: int = live.peak_bytes
        return peak_bytes


class _ShapeStage(TransformersStage):
    """A stage whose tensors have shapes and no memory."""

    def _materialise(self) -> None:
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    like = torch.empty(parameter.shape, device=self._device)
                    module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(like))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device)


class _Kept(torch.autograd.Function):
    """Keeps of selected positions what the heads' losses keep."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        statistics = torch.empty(len(hidden), _STATISTICS_BYTES, dtype=torch.uint8, device=hidden.device)
        ctx.save_for_backward(hidden, statistics)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    apply: Any = _Kept.apply
    return apply(hidden), {}


def _micro_batch(tokens: int, num_sequences: int = 1) -> MicroBatch:
    untyped: Any = None
    return MicroBatch(
        input_ids=torch.empty(num_sequences, tokens // num_sequences, dtype=torch.int64),
        head_index=torch.empty(tokens, dtype=torch.int64),
        targets=untyped,
        weight=1.0,
    )
