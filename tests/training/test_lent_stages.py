"""Stages that hold other weights for a while."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training.lent_stages import LentStages

from ..tiny_models import build, language_model


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    raise AssertionError


def weights_of(stages: list[TransformersStage]) -> dict[str, Tensor]:
    return {f"{stage.stage} {name}": one.clone() for stage in stages for name, one in stage.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_they_get_their_own_back_to_the_bit(tied: bool) -> None:
    model = language_model(num_hidden_layers=2, tie_word_embeddings=tied)
    stages = [TransformersStage(*model, stage=number, num_stages=2, loss=loss) for number in range(2)]
    for stage in stages:
        stage.load_state_dict(build(model, seed=0).state_dict())
    own = weights_of(stages)
    other = build(model, seed=1).state_dict()
    lent = LentStages(stages, other)
    held = weights_of(stages)
    assert any(not torch.equal(one, own[name]) for name, one in held.items())
    for stage in stages:
        for name, one in stage.named_parameters():
            torch.testing.assert_close(one.detach(), other[name], rtol=0, atol=0)
    lent.take_back()
    back = weights_of(stages)
    assert back.keys() == own.keys()
    assert all(torch.equal(one, own[name]) for name, one in back.items())


@pytest.mark.parametrize("given", [False, True])
def test_frozen_tensors_are_left_to_whoever_else_computes_by_them(given: bool) -> None:
    """They may come or not: what the stage had is not written."""
    model = language_model(num_hidden_layers=2)
    stage = TransformersStage(*model, stage=0, num_stages=1, loss=loss)
    stage.load_state_dict(build(model, seed=0).state_dict())
    frozen = "model.layers.0.mlp.up_proj.weight"
    stage.freeze({frozen})
    held = dict(stage.named_parameters())[frozen]
    common, bits = held.data, held.detach().clone()
    other = build(model, seed=1).state_dict()
    lent = LentStages([stage], {name: one for name, one in other.items() if given or name != frozen})
    assert torch.equal(held, other[frozen] if given else bits)
    assert torch.equal(common, bits)
    lent.take_back()
    assert held.data_ptr() == common.data_ptr()
    assert torch.equal(held, bits)
