"""Sequences packed into one row against the same sequences padded: what a model says of them, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fuse.benchmarks.gpu.setup import Row, Setup, random_model, spec_for, synchronize
from fuse.benchmarks.measure import interleave, median_ms
from fuse.head_dim import head_dim
from fuse.intrastage.packed_attention import way_of_device
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import MicroBatch

_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the largest difference in a matrix's gradient, over its largest number: attention adds up in another order."""
_NUM_SEQUENCES = 8
_REPEATS = 3


def check(setup: Setup) -> Iterator[Row]:
    """A row for each type that stages compute in, and so for each way of attention."""
    for autocast in (None, torch.bfloat16):
        yield _row(setup, autocast)


def _row(setup: Setup, autocast: torch.dtype | None) -> Row:
    stage = _stage(setup, autocast)
    padded = _padded(setup)
    packed = replace(padded, lengths=_lengths(setup))
    gradients = zip(_trained(stage, packed), _trained(stage, padded), strict=True)
    difference = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in gradients)
    functions = {"packed": lambda: _run(setup, stage, packed), "padded": lambda: _run(setup, stage, padded)}
    ms = {name: median_ms(seconds) for name, seconds in interleave(functions, _REPEATS).items()}
    dtype = autocast or torch.float32
    way = way_of_device(torch.device(setup.device), dtype, head_dim(stage.model.config))
    return Row(
        name=f"packed training, {str(dtype).removeprefix('torch.')}",
        measured=f"off by {difference:.2g}",
        bound=f"{_BOUNDS[dtype]:.2g}",
        ok=difference <= _BOUNDS[dtype],
        detail=f"attention by {way}: forward and backward {ms['packed']:.1f} ms, padded {ms['padded']:.1f} ms for "
        f"{padded.input_ids.numel() / sum(_lengths(setup)):.2f} times the tokens",
    )


def _stage(setup: Setup, autocast: torch.dtype | None) -> TransformersStage:
    """The whole policy."""
    spec = spec_for(setup, "actor", torch.float32)
    device = torch.device(setup.device)
    options: Any = {"stage": 0, "num_stages": 1, "loss": _loss, "device": device, "autocast": autocast}
    stage = TransformersStage(spec.model_class, spec.config, **options)
    stage.load_state_dict(random_model(setup, "actor", torch.float32).state_dict())
    return stage


def _loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[Any, Tensor]]:
    """Of the last hidden states of all tokens, a number that depends on all they depend on."""
    weights = torch.linspace(-1.0, 1.0, hidden.shape[-1], device=hidden.device)
    return (hidden.float() @ weights).sum(), {}


def _lengths(setup: Setup) -> tuple[int, ...]:
    longest = setup.prompt_tokens + setup.response_tokens
    return tuple(max(1, longest >> (row % 4)) - row % 3 * (longest > 64) for row in range(_NUM_SEQUENCES))


def _padded(setup: Setup) -> MicroBatch:
    """Random tokens, of which the head sees all."""
    lengths = _lengths(setup)
    width = max(lengths)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, setup.model.vocab_size, (len(lengths), width), generator=generator)
    places = [torch.arange(length) + row * width for row, length in enumerate(lengths)]
    made = MicroBatch(input_ids=input_ids, head_index=torch.cat(places), targets=None)
    return made.to(torch.device(setup.device))


def _trained(stage: TransformersStage, micro_batch: MicroBatch) -> list[Tensor]:
    """Gradients of the matrices that a micro-batch trains."""
    stage.model.zero_grad()
    stage.forward(0, micro_batch, None)
    stage.backward(0, None)
    grads = [parameter.grad for _, parameter in stage.named_parameters() if parameter.dim() > 1]
    return [grad.clone() for grad in grads if grad is not None]


def _run(setup: Setup, stage: TransformersStage, micro_batch: MicroBatch) -> None:
    stage.forward(0, micro_batch, None)
    stage.backward(0, None)
    synchronize(setup)
