"""A probe finds the bytes of a micro-batch that a measurement of its own finds, and changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage.measure import measure
from fuse.intrastage.memory_probe import MemoryProbe
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch

from ..tiny_models import language_model, spread

MODEL = language_model(hidden_size=32, intermediate_size=64, num_hidden_layers=3)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return head(hidden).square().mean(), {}


def stage_of(number: int, *, split: bool = True) -> Any:
    torch.manual_seed(0)
    stage = TransformersStage(*MODEL, stage=number, num_stages=3, loss=loss, split_backward=split)
    spread(stage.model, std=0.1)
    return stage


def run(stage: Any, batch: MicroBatch, *, whole: bool = False) -> list[Tensor]:
    """Two micro-batches there and back; the gradients."""
    torch.manual_seed(1)
    first, last = stage_is(stage)
    inputs = [None if first else torch.randn_like(stage.boundary(batch)) for _ in range(2)]
    grads = [None if last else torch.randn_like(stage.boundary(batch)) for _ in range(2)]
    for index in range(2):
        stage.forward(index, batch, inputs[index])
    for index in range(2):
        if whole:
            stage.backward(index, grads[index])
        else:
            stage.backward_input(index, grads[index])
            stage.backward_weight(index)
    return [parameter.grad for _, parameter in stage.named_parameters() if parameter.grad is not None]


def stage_is(stage: Any) -> tuple[bool, bool]:
    held = stage._stage if isinstance(stage, MemoryProbe) else stage
    return held.is_first, held.is_last


@pytest.mark.parametrize("number", [0, 1, 2])
def test_it_finds_what_a_measurement_finds(number: int) -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    batch = MicroBatch(input_ids=ids, head_index=torch.arange(16), targets=None)
    stages = {(0, stage): stage_of(stage) for stage in range(3)}
    measured = measure(0, [("actor.0", (0, 0, 0))], stages, [[batch]], [], repeats=1).stages[number]

    probe = MemoryProbe(stage_of(number), index=1)
    gradients = run(probe, batch)
    assert probe.activation_bytes == measured.activation_bytes
    assert probe.weight_grad_bytes == pytest.approx(measured.weight_grad_bytes, rel=0.1)
    assert all(map(torch.equal, gradients, run(stage_of(number), batch)))


def test_a_whole_backward_leaves_nothing_to_a_weight_gradient() -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    batch = MicroBatch(input_ids=ids, head_index=torch.arange(16), targets=None)
    probe = MemoryProbe(stage_of(1, split=False), index=0)
    assert not probe.can_split_backward
    run(probe, batch, whole=True)
    assert probe.activation_bytes > 0
    assert probe.weight_grad_bytes == 0
