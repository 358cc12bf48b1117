"""Megatron stages, beyond the contract of all stages: their names for weights, and the models they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from fuse.intrastage.megatron_stage import MegatronStage

from ..tiny_models import language_model
from .chains import GROUPED, SLIDING, chain_of, loss, model_of

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_weights_of_a_stage_have_hugging_face_names_and_shapes(name: str) -> None:
    for stage in chain_of("megatron", model_of(name)):
        own = stage.to_hugging_face(dict(stage.named_parameters()))
        assert stage.stage_shapes == {key: tensor.shape for key, tensor in own.items()}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            (GPTNeoXForCausalLM, GPTNeoXConfig()),
            {},
            r"'gpt_neox'.*llama, qwen2, qwen3; train others with transformers stages",
        ),
        (language_model(**GROUPED, hidden_act="gelu"), {}, "hidden_act 'gelu'"),
        (language_model(**GROUPED, attention_bias=True), {}, "attention_bias True"),
        (language_model("qwen2", **GROUPED, **SLIDING), {}, r"layer_types \['sliding_attention'\]"),
        (language_model(**GROUPED, rope_parameters=DYNAMIC), {}, "rope_type 'dynamic'"),
        (language_model(**GROUPED), {"layer_range": (3, 3)}, r"layer range \(3, 3\).*at least 1"),
    ],
)
def test_refusals_name_the_setting_and_the_remedy(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegatronStage(*model, stage=0, num_stages=2, loss=loss, **options)
