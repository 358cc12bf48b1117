"""Finds what a model's stages hold and take without memory: they run on tensors that have only shapes.

So it is the code that trains that is measured, whatever the architecture, and not a formula of it.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.driver.memory_changes import RECORDED_LENGTH, MemoryChanges, MemoryRecord
from fuse.driver.stage_bytes import SIZES, HeadBytes, Line, ModelBytes, StageLines
from fuse.intrastage.adapters import Adapters
from fuse.intrastage.transformers_stage import TransformersStage, without_memory
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
    model_class: Any = spec.model_class
    try:
        measured = _measured(
            _Layers(
                type(without_memory(model_class, config).base_model), spec.adapters.digest, model_class, spec.adapters
            ),
            json.dumps({**config.to_dict(), **_LEFT_OUT}, sort_keys=True, default=str),
            config._attn_implementation,
            autocast,
            gradient_checkpointing,
            split_backward,
        )
    except (RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"memory of {spec.model_class.__name__} cannot be foreseen ({reason}): plan with a dense model of its size"
        ) from error
    return measured(head=HeadBytes(*head_shape, (autocast or torch.float32).itemsize, device))


_LEFT_OUT: Mapping[str, None] = dict.fromkeys(
    ("_name_or_path", "architectures", "id2label", "label2id", "pad_token_id", "problem_type")
)
"""What only heads look at in a configuration, where it is from, and what takes no memory."""


@dataclass(frozen=True, slots=True)
class _Layers:
    """The same of a language model and of a classifier. base: the class of the model without its head.

    digest: of the adapters.
    """

    base: type[nn.Module]
    digest: str
    model_class: Any = field(compare=False)
    adapters: Adapters = field(compare=False)


@lru_cache(maxsize=32)
def _measured(
    layers: _Layers,
    config_json: str,
    attention: str | None,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    split_backward: bool,
) -> partial[ModelBytes]:
    """All but the head's bytes: roles whose models differ by the head share them."""
    model_class = layers.model_class
    config = model_class.config_class.from_dict(json.loads(config_json))
    # Under its own name transformers would build a mask wherever it cannot see that none is needed.
    ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, sdpa_attention_forward)
    config._attn_implementation = _UNMASKED if attention in (None, "sdpa") else attention

    def probe(stage: int, num_layers: int) -> StageProbe:
        return StageProbe(
            model_class,
            config,
            stage=stage,
            num_stages=_NUM_STAGES,
            layer_range=(0, num_layers),
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
            split_backward=split_backward,
            adapters=layers.adapters,
        )

    one, two = probe(1, 1), probe(1, 2)
    return partial(
        ModelBytes,
        one=one.lines(),
        two=two.lines(),
        first=probe(0, 1).lines(),
        last=probe(_NUM_STAGES - 1, 1).lines(),
        boundary=one.boundary(),
        scoring=two.scoring(),
        shared=one.shared_bytes(),
    )


class StageProbe:
    """A stage of one or two layers without memory, and the bytes it would take. The options are those of stages."""

    def __init__(self, model_class: Any, config: Any, **options: Any) -> None:
        self._shapes_alone = FakeTensorMode(allow_non_fake_inputs=True)
        with self._shapes_alone:
            self._stage = _ShapeStage(model_class, config, loss=_loss, **options)
            for _, parameter in self._stage.named_parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        self._weights = {parameter.numel() for _, parameter in self._stage.named_parameters()}
        self._indices = itertools.count()
        self._recorded: dict[tuple[Any, ...], MemoryChanges] = {}

    def lines(self) -> StageLines:
        """Of forward and backward, in halves where the stage can."""
        return StageLines(*map(Line.through, zip(*map(self.trained, SIZES), strict=True)))

    def scoring(self) -> Line:
        """The most of a forward of which nothing is kept. The stage trains no more."""
        for _, parameter in self._stage.named_parameters():
            parameter.requires_grad_(False)
        return Line.through([self._changes(self.run_scoring, tokens).rise(0) for tokens in SIZES])

    def shared_bytes(self) -> float:
        """Of a position, held once for all sequences."""
        tokens = SIZES[1]
        apart, _, _ = self.trained(tokens)
        together = self._changes(self.run_forward, tokens // _SEQUENCES, _SEQUENCES).kept(0)
        return (apart - together) / (tokens - tokens // _SEQUENCES)

    def boundary(self) -> Line:
        """Of the hidden states that stages send."""
        return Line.through([self._boundary_bytes(tokens) for tokens in SIZES])

    def _boundary_bytes(self, tokens: int) -> int:
        with self._shapes_alone:
            num_bytes: int = self._stage.boundary(_micro_batch(tokens)).nbytes
        return num_bytes

    def trained(self, tokens: int) -> tuple[int, int, int]:
        """Held, deferred and working bytes of a sequence, as of `StageBytes`."""
        changes = self._changes(self.run_training, tokens)
        held = changes.kept(0)
        deferred = held + changes.kept(1) if self._stage.can_split_backward else 0
        return held, deferred, max(changes.rise(0) - held, *map(changes.rise, range(1, len(changes.parts))))

    def run_training(self, length: int) -> MemoryChanges:
        """Changes of forward and backward, or of forward and both halves."""
        stage, index = self._stage, next(self._indices)
        parts = []
        with self._shapes_alone:
            batch = _micro_batch(length)
            with MemoryRecord() as record:
                output = self._forward(index, batch)
                parts.append(record.taken())
                output_grad = None if output is None else torch.empty_like(output)
                del output
                if stage.can_split_backward:
                    stage.backward_input(index, output_grad)
                    del output_grad
                    parts.append(record.taken())
                    stage.backward_weight(index)
                else:
                    stage.backward(index, output_grad)
                parts.append(record.taken())
        return MemoryChanges(length, tuple(parts))

    def run_forward(self, length: int, num_sequences: int) -> MemoryChanges:
        """Changes of a forward that a backward could follow."""
        with self._shapes_alone:
            batch = _micro_batch(length, num_sequences)
            with MemoryRecord() as record:
                output = self._forward(next(self._indices), batch)
                changes = MemoryChanges(length, (record.taken(),))
                del output
        return changes

    def run_scoring(self, length: int) -> MemoryChanges:
        """Changes of a forward that computes no gradients, its micro-batch included."""
        with self._shapes_alone, torch.no_grad(), MemoryRecord() as record:
            self._forward(next(self._indices), _micro_batch(length))
            return MemoryChanges(length, (record.taken(),))

    def _forward(self, index: int, batch: MicroBatch) -> Tensor | None:
        stage = self._stage
        return stage.forward(index, batch, None if stage.is_first else torch.empty_like(stage.boundary(batch)))

    def _changes(self, run: Callable[..., MemoryChanges], length: int, *more: int) -> MemoryChanges:
        """Of a run at this length, which is run at but one unless a tensor does not scale with it."""
        key = (run.__name__, *more)
        if key not in self._recorded:
            self._recorded[key] = run(RECORDED_LENGTH, *more)
        recorded = self._recorded[key]
        return recorded.at(length) if recorded.are_powers(self._weights) else run(length, *more)


class _ShapeStage(TransformersStage):
    """A stage whose tensors have shapes and no memory."""

    def _materialise(self) -> None:
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    like = torch.empty(parameter.shape, device=self._device)
                    trains = parameter.requires_grad
                    module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(like, requires_grad=trains))
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


def _micro_batch(length: int, num_sequences: int = 1) -> MicroBatch:
    untyped: Any = None
    return MicroBatch(
        input_ids=torch.empty(num_sequences, length, dtype=torch.int64),
        head_index=torch.empty(num_sequences * length, dtype=torch.int64),
        targets=untyped,
        weight=1.0,
    )
