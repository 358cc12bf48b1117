"""Transformers stages, beyond the contract of all stages: bfloat16, weight decay, and the models they refuse."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaModel,
    Trainer,
    masking_utils,
)

from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import MicroBatch

from ..tiny_models import config
from .chains import GROUPED, MODELS, ONE, SIZES, TWO, chain_of, loss, micro_batch_of, model_of, trained


@pytest.mark.parametrize("name", ["llama", "neox", "qwen2"])
def test_bfloat16_is_the_same_on_any_number_of_stages(name: str) -> None:
    """Hidden states are bfloat16 everywhere, so cutting the model rounds nothing."""
    model = model_of(name)
    one = trained(chain_of("transformers", model, ONE, autocast=torch.bfloat16), [micro_batch_of()])
    split = trained(chain_of("transformers", model, autocast=torch.bfloat16), [micro_batch_of()])
    for gradient_name, gradient in split.items():
        # The tied copies are added in float32 when split, in autograd's order when not.
        torch.testing.assert_close(gradient, one[gradient_name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_undecayed_names_are_the_trainers(name: str) -> None:
    model = model_of(name)
    undecayed = frozenset[str]().union(*(stage.undecayed_names for stage in chain_of("transformers", model)))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert undecayed == {parameter for parameter, _ in model.named_parameters()} - decayed


@pytest.mark.parametrize(
    ("model_class", "model_config", "message"),
    [
        (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True), r"declares no pipeline plan.*use an architecture that"),
        (LlamaModel, config("llama", **GROUPED), r"LlamaModel has neither.*use a causal language model"),
        (Gemma2ForCausalLM, Gemma2Config(**GROUPED, head_dim=8), r"Gemma2ForCausalLM .*final_logit_softcapping"),
    ],
)
def test_refusals_name_the_model_and_the_remedy(model_class: type, model_config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersStage(model_class, model_config, stage=0, num_stages=2, loss=loss)


def test_layer_types_of_the_callers_configuration_are_left_alone() -> None:
    model = model_of("qwen2 sliding")
    chain_of("transformers", model)
    assert model.config.num_hidden_layers == 4
    assert len(model.config.layer_types) == 4


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_looks_at_what_tensors_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host would wait for them. Tensors without values refuse to be looked at.

    Where transformers would look, it leaves tensors without values alone: that it never comes there is seen apart.
    """
    asked: list[object] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked.append)
    first, last = chain_of("transformers", model_of(name), TWO, split_backward=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        real = micro_batch_of()
        micro_batch = MicroBatch(
            input_ids=mode.from_tensor(real.input_ids),
            head_index=mode.from_tensor(real.head_index),
            targets=mode.from_tensor(real.targets),
        )
        hidden = first.forward(0, micro_batch, None)
        last.forward(0, micro_batch, hidden.detach())
        first.backward_input(0, last.backward_input(0, None))
        for stage in (first, last):
            stage.backward_weight(0)
        assert not asked
        with pytest.raises(DataDependentOutputException):
            bool(micro_batch.targets.sum() > 0)
