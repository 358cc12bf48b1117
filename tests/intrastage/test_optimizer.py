"""Steps of a model that is on one rank as a whole, in one stage or several. On several ranks: tests/distributed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch

from ..tiny_models import build, language_model

MODEL = language_model("qwen2", tie_word_embeddings=True)
BATCH = MicroBatch(input_ids=torch.tensor([[3, 1, 4, 1, 5]]), head_index=torch.arange(5), targets=None)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return head(hidden).square().mean(), {}


def model_and_stages(num_stages: int) -> tuple[PreTrainedModel, dict[tuple[int, int], TransformersStage]]:
    model = build(MODEL).eval()
    stages = {}
    for number in range(num_stages):
        stage = TransformersStage(*MODEL, stage=number, num_stages=num_stages, loss=loss)
        stage.load_state_dict(model.state_dict())
        stages[0, number] = stage
    return model, stages


def train(stages: dict[tuple[int, int], TransformersStage]) -> None:
    hidden = grad = None
    for stage in stages.values():
        hidden = stage.forward(0, BATCH, hidden)
    for stage in reversed(stages.values()):
        grad = stage.backward(0, grad)


def weights(stages: dict[tuple[int, int], TransformersStage]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for stage in stages.values() for name, one in stage.named_parameters()}


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e3])
def test_the_norm_is_the_whole_models_and_clips_only_above_the_limit(num_stages: int, max_grad_norm: float) -> None:
    model, stages = model_and_stages(num_stages)
    reference = torch.optim.AdamW(model.parameters(), weight_decay=0.0, eps=1e-3)
    loss(model.model(BATCH.input_ids).last_hidden_state.flatten(0, 1), model.lm_head, BATCH)[0].backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
    reference.param_groups[0]["lr"] = 0.01
    reference.step()

    # A large eps, so that the update shows the size of the gradient.
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig(max_grad_norm=max_grad_norm, eps=1e-3))
    train(stages)
    assert optimizer.step(0.01) == pytest.approx(expected, rel=1e-6)
    for name, weight in weights(stages).items():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=1e-6)


def test_gradients_are_gone_after_a_step() -> None:
    _, stages = model_and_stages(2)
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig())
    train(stages)
    first = optimizer.step(0.0)
    train(stages)
    assert optimizer.step(0.0) == pytest.approx(first, rel=1e-6)
    assert optimizer.num_steps == 2


def test_both_copies_of_a_tied_embedding_stay_the_same() -> None:
    _, stages = model_and_stages(2)
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig(weight_decay=0.1))
    for _ in range(3):
        train(stages)
        optimizer.step(0.01)
    first, last = (dict(stage.named_parameters())["model.embed_tokens.weight"] for stage in stages.values())
    assert first is not last
    assert torch.equal(first, last)
    kept = [len(parts) for name, parts in optimizer.state() if name == "model.embed_tokens.weight"]
    assert kept == [3, 1], "the first stage has the moments of both"


def test_weight_decay_spares_norms_and_biases() -> None:
    _, stages = model_and_stages(2)
    before = weights(stages)
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig(weight_decay=0.5))
    optimizer.step(0.1)  # no gradients: only the decay moves weights
    for name, weight in weights(stages).items():
        spared = "norm" in name or "bias" in name
        torch.testing.assert_close(weight, before[name] * (1.0 if spared else 0.95))


def test_the_learning_rate_is_the_one_of_the_step() -> None:
    _, stages = model_and_stages(1)
    before = weights(stages)
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig())
    train(stages)
    optimizer.step(0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(stages).items())
    train(stages)
    optimizer.step(0.01)
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(stages).items() if "proj" in name)


def test_a_rank_without_a_stage_has_nothing_to_do() -> None:
    from fuse.intrastage.communication import ModelGroups

    optimizer = ModelOptimizer("critic", {}, ModelGroups(1, 2, {}, {}, {}), AdamWConfig())
    assert optimizer.step(0.1) == 0.0
    assert dict(optimizer.state()) == {}
    assert optimizer.model_shapes == {}
