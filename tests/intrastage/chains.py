"""Tiny models and the chains of stages that they are cut into, of either kind, all in this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.intrastage.megatron_stage import MegatronStage
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch

from ..tiny_models import ModelKind, build, classifier, language_model, spread

KINDS: dict[str, type[Any]] = {"transformers": TransformersStage, "megatron": MegatronStage}

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
COMMON: dict[str, ModelKind] = {
    "llama": language_model("llama", **GROUPED, rms_norm_eps=0.1),
    "llama 3": language_model("llama", **GROUPED, rope_parameters=LLAMA3),
    "llama tied": language_model("llama", **GROUPED, tie_word_embeddings=True),
    "llama classifier": classifier("llama", **GROUPED, dtype=torch.bfloat16),
    "qwen2": language_model("qwen2", **GROUPED, tie_word_embeddings=True),
    "qwen3": language_model("qwen3", **GROUPED, head_dim=16),
}
"""What stages of both kinds are made of."""
MODELS: dict[str, ModelKind] = {
    **COMMON,
    "qwen2 sliding": language_model("qwen2", **GROUPED, **SLIDING),
    "neox": language_model("gpt_neox", **SIZES, hidden_dropout=0.5, attention_dropout=0.5),
    "neox classifier": classifier("gpt_neox", **SIZES),
}
EVERY = [*(("transformers", name) for name in MODELS), *(("megatron", name) for name in COMMON)]
"""Each kind of stage with each model that it can be of."""

Ranges = Sequence[tuple[int, int] | None]
ONE: Ranges = (None,)
TWO: Ranges = (None, None)
UNEVEN: Ranges = ((0, 1), (1, 3), (3, 4))


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return (head(hidden).float() * micro_batch.targets).square().mean(), {}


@cache
def model_of(name: str) -> PreTrainedModel:
    """Everyone's: stages copy its weights."""
    model: PreTrainedModel = spread(build(MODELS[name]).float())
    return model


def chain_of(kind: str, model: PreTrainedModel, layer_ranges: Ranges = UNEVEN, **options: Any) -> list[Any]:
    options = {"loss": loss, **options}
    stages = [
        KINDS[kind](
            type(model), model.config, stage=stage, num_stages=len(layer_ranges), layer_range=layer_range, **options
        )
        for stage, layer_range in enumerate(layer_ranges)
    ]
    for stage in stages:
        stage.load_state_dict(model.state_dict())
    return stages


def micro_batch_of(tokens: int = 7) -> MicroBatch:
    generator = torch.Generator().manual_seed(tokens)
    return MicroBatch(
        input_ids=torch.randint(0, 96, (2, tokens), generator=generator),
        head_index=torch.tensor([1, 3, tokens, tokens + 2]),
        targets=torch.randn(4, 1, generator=generator),
    )


BATCHES = [micro_batch_of(7), micro_batch_of(12)]


def forward(stages: Sequence[Any], micro_batches: Sequence[MicroBatch] = BATCHES) -> None:
    for index, micro_batch in enumerate(micro_batches):
        hidden = None
        for stage in stages:
            hidden = stage.forward(index, micro_batch, hidden)


def run(stages: Sequence[Any], micro_batches: Sequence[MicroBatch] = BATCHES, *, splits: bool = False) -> None:
    """All forwards before all backwards, which may come in halves."""
    forward(stages, micro_batches)
    for index in range(len(micro_batches)):
        grad = None
        for stage in reversed(stages):
            grad = stage.backward_input(index, grad) if splits else stage.backward(index, grad)
        for stage in stages if splits else ():
            stage.backward_weight(index)


def gradients(stages: Sequence[Any]) -> dict[str, Tensor]:
    """By Hugging Face name; tied copies are summed."""
    total: dict[str, Tensor] = {}
    for stage in stages:
        own = {name: parameter.grad for name, parameter in stage.named_parameters()}
        for name, gradient in (stage.to_hugging_face(own) if isinstance(stage, MegatronStage) else own).items():
            total[name] = total.get(name, 0) + gradient
    return total


def trained(stages: Sequence[Any], micro_batches: Sequence[MicroBatch] = BATCHES) -> dict[str, Tensor]:
    """The gradients of a run."""
    run(stages, micro_batches)
    return gradients(stages)


def exported(stages: Sequence[Any]) -> dict[str, Tensor]:
    """The whole model's weights, each by one stage."""
    weights: dict[str, Tensor] = {}
    for stage in stages:
        part = dict(stage.export_weights())
        assert not weights.keys() & part.keys()
        weights |= part
    return weights


def whole_models(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch] = BATCHES
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Gradients of the model that nothing has cut, and by micro-batch its logits and loss."""
    head = model.get_output_embeddings() or model.score
    seen = []
    for micro_batch in micro_batches:
        hidden = model.base_model(
            micro_batch.input_ids,
            attention_mask=micro_batch.attention_mask,
            position_ids=micro_batch.position_ids,
        ).last_hidden_state.flatten(0, 1)[micro_batch.head_index]
        value, _ = loss(hidden, head, micro_batch)
        seen.append((head(hidden).detach(), value.detach()))
        value.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found, seen


@cache
def expected_of(name: str) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """What `whole_models` finds of BATCHES."""
    return whole_models(model_of(name))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
