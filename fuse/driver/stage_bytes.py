"""What a stage's micro-batches hold and take, found without memory: the stage runs on tensors that have only shapes.

So it is the code that trains that is measured, whatever the architecture, and not a formula of it. Bytes are constants
and bytes per token, from two sizes of micro-batches; a stage is the sum of its layers and its ends.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.linear_logprob import CHUNK_TOKENS, chunk_shape
from fuse.training.model_spec import ModelSpec

_NUM_STAGES = 3
_SIZES = (64, 4096, 8192)
"""Tokens of the micro-batches measured: at the least, what weights take shows; between the others, what tokens do."""
_SEQUENCES = 8
_STATISTICS_BYTES = 4 * 8 + 8
"""What the head's loss keeps of a position beside its hidden state: float64 [4] and its target."""
_UNMASKED = "fuse_unmasked_sdpa"


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of tokens: a constant and so many per token, and no fewer than `least`."""

    fixed: float
    per_token: float
    least: float = 0.0

    @classmethod
    def through(cls, values: Sequence[int]) -> Line:
        """The line through the values at the larger `_SIZES`, and at least that at the smallest."""
        _, size, larger = _SIZES
        slope = (values[2] - values[1]) / (larger - size)
        return cls(values[1] - slope * size, slope, values[0])

    def at(self, tokens: int) -> int:
        return round(max(self.least * (tokens > 0), self.fixed + self.per_token * tokens, 0.0))


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of a micro-batch on a stage. held: from F to B or I. deferred: from I to W. working: beside, while one runs."""

    held: int
    deferred: int
    working: int


@dataclass(frozen=True, slots=True)
class _Lines:
    """`StageBytes` of a stage, by tokens."""

    held: Line
    deferred: Line
    working: Line

    def at(self, tokens: int) -> StageBytes:
        return StageBytes(self.held.at(tokens), self.deferred.at(tokens), self.working.at(tokens))


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Of the head's loss, as `fuse.ops.linear_logprob` computes it. A head of one output takes next to nothing.

    num_outputs, hidden_size: of its weight. itemsize: of products. device: "cpu" or "cuda".
    """

    num_outputs: int
    hidden_size: int
    itemsize: int
    device: str

    def kept(self, tokens: int) -> int:
        """From F to B: logits, where one chunk has them all."""
        is_kept = self.num_outputs > 1 and tokens <= CHUNK_TOKENS and self.num_outputs <= self._chunk(tokens)[1]
        return tokens * self.num_outputs * self.itemsize if is_kept else 0

    def working(self, tokens: int) -> int:
        """While it runs: a chunk of logits, its weights and their gradient; and gradients of all weights and inputs."""
        if self.num_outputs == 1:
            return 0
        rows, columns = self._chunk(tokens)
        columns = min(columns, self.num_outputs)
        chunk = rows * columns * self.itemsize + columns * self.hidden_size * (self.itemsize + 4)
        return chunk + 4 * self.num_outputs * self.hidden_size + tokens * self.hidden_size * (self.itemsize + 4)

    def scoring(self) -> int:
        """Of scoring: a chunk of logits and its weights."""
        rows, columns = self._chunk(CHUNK_TOKENS)
        columns = min(columns, self.num_outputs)
        return 0 if self.num_outputs == 1 else columns * (rows + self.hidden_size) * self.itemsize

    def _chunk(self, tokens: int) -> tuple[int, int]:
        return chunk_shape(tokens, self.device)


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What stages of a model take.

    one, two: of an inner stage of one layer, and of two. first, last: of a stage of one layer at an end.
    boundary: of a message to the next stage. scoring: the most that layers take in a forward beside weights.
    shared: held bytes of a position that sequences share, such as its rotary angles. head: of the model.
    """

    one: _Lines
    two: _Lines
    first: _Lines
    last: _Lines
    boundary: Line
    scoring: Line
    shared: float
    head: HeadBytes

    def stage(self, shape: Shape, num_layers: int, *, is_first: bool, is_last: bool) -> StageBytes:
        """Of a stage of so many layers on a micro-batch of this shape."""
        tokens = shape.size
        shared = round(self.shared * (tokens - shape.num_tokens))
        one, two = self.one.at(tokens), self.two.at(tokens)
        ends = [lines.at(tokens) for lines, is_there in ((self.first, is_first), (self.last, is_last)) if is_there]
        more = num_layers - 1
        kept, computing = (self.head.kept(tokens), self.head.working(tokens)) if is_last else (0, 0)
        return StageBytes(
            held=one.held + more * (two.held - one.held) + sum(end.held - one.held for end in ends) + kept - shared,
            deferred=one.deferred + more * (two.deferred - one.deferred),
            # Layers run one after the other.
            working=max(one.working, computing, *(end.working for end in ends)),
        )


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
    try:
        return _measured(
            spec.model_class,
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

    def lines(self) -> _Lines:
        """Of forward and backward, in halves where the stage can."""
        return _Lines(*map(Line.through, zip(*map(self._trained, _SIZES), strict=True)))

    def scoring(self) -> Line:
        """The most of a forward of which nothing is kept."""
        return Line.through([self._scored(tokens) for tokens in _SIZES])

    def shared_bytes(self) -> float:
        """Of a position, held once for all sequences."""
        tokens = _SIZES[1]
        apart, _, _ = self._trained(tokens)
        together, _, _ = self._trained(tokens, _SEQUENCES)
        return (apart - together) / (tokens - tokens // _SEQUENCES)

    def boundary(self) -> Line:
        """Of the hidden states that stages send."""
        return Line.through([self._boundary_bytes(tokens) for tokens in _SIZES])

    def _boundary_bytes(self, tokens: int) -> int:
        with self._shapes_alone:
            return self._stage.boundary(_micro_batch(tokens)).nbytes

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
            return live.peak_bytes


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

