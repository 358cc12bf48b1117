"""Made-up micro-batches go through the losses of actor and critic, so that last stages can be measured on them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fuse.intrastage.measure import measure
from fuse.intrastage.profile import Shape
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.workers.losses import ActorLoss, CriticLoss
from fuse.workers.profiling import made_up

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_actor_and_critic_are_measured_on_them() -> None:
    losses = (
        ActorLoss(temperature=0.7, cliprange=0.2),
        CriticLoss(vf_coef=0.1, cliprange_value=0.2),
    )
    classes = (LlamaForCausalLM, LlamaForSequenceClassification)
    stages = {}
    for number, (model_class, loss) in enumerate(zip(classes, losses, strict=True)):
        config = LlamaConfig(**SIZES, num_labels=1)
        stages[number, 0] = TransformersStage(
            model_class, config, stage=0, num_stages=1, loss=loss, split_backward=True
        )
        for parameter in stages[number, 0].model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    shapes = [Shape(2, 6), Shape(2, 12)]
    batches = list(zip(*(made_up(shape, response_tokens=3) for shape in shapes), strict=True))
    pipelines = [("actor.0", (0,)), ("critic.0", (0,))]
    profile = measure(0, pipelines, stages, batches, [None, None], repeats=1)  # type: ignore[list-item]
    assert [(cost.pipeline, cost.shape) for cost in profile.stages] == [
        (name, shape) for name, _ in pipelines for shape in shapes
    ]
    assert all(len(loss.statistics.drain()) == 2 * 5 for loss in losses)


def test_the_head_sees_what_predicts_the_response() -> None:
    actor, critic = made_up(Shape(2, 5), response_tokens=2)
    assert actor.head_index.tolist() == critic.head_index.tolist() == [2, 3, 7, 8]
    with pytest.raises(ValueError, match="choose between 1 and 4"):
        made_up(Shape(2, 5), response_tokens=5)
