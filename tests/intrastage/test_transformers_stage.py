"""Stages chained in one process equal the model they were cut from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
)

from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama classifier": (LlamaForSequenceClassification, LlamaConfig(**GROUPED, num_labels=1, dtype=torch.bfloat16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen2 sliding": (Qwen2ForCausalLM, Qwen2Config(**GROUPED, **SLIDING)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=8)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5)),
    "neox classifier": (GPTNeoXForSequenceClassification, GPTNeoXConfig(**SIZES, num_labels=1)),
}
UNEVEN = ((0, 1), (1, 4), (4, 5))


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return (head(hidden).float() * micro_batch.targets).square().mean(), {}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config).float().eval()
    for parameter in model.parameters():  # norms start at 1 and biases at 0: make every parameter count
        nn.init.normal_(parameter, std=0.2)
    return model


def stages_of(
    model: PreTrainedModel, layer_ranges: Sequence[tuple[int, int] | None] = UNEVEN, **options: object
) -> list[TransformersStage]:
    stages = [
        TransformersStage(
            type(model),
            model.config,
            stage=stage,
            num_stages=len(layer_ranges),
            loss=loss,
            layer_range=layer_range,
            **options,
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


def train(stages: Sequence[TransformersStage], micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Gradients by global name, all forwards before all backwards; tied copies are summed."""
    for index, micro_batch in enumerate(micro_batches):
        hidden = None
        for stage in stages:
            hidden = stage.forward(index, micro_batch, hidden)
    for index in range(len(micro_batches)):
        grad = None
        for stage in reversed(stages):
            grad = stage.backward(index, grad)
    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return gradients


def reference_gradients(model: PreTrainedModel, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    head = model.get_output_embeddings() or model.score
    for micro_batch in micro_batches:
        hidden = model.base_model(
            micro_batch.input_ids,
            attention_mask=micro_batch.attention_mask,
            position_ids=micro_batch.position_ids,
        ).last_hidden_state
        loss(hidden.flatten(0, 1)[micro_batch.head_index], head, micro_batch)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_ranges", [UNEVEN, (None,), (None, None)], ids=["uneven", "one", "two"])
def test_gradients_equal_the_whole_model(name: str, layer_ranges: Sequence[tuple[int, int] | None]) -> None:
    model = model_of(name)
    micro_batches = [micro_batch_of(7), micro_batch_of(5)]
    expected = reference_gradients(model, micro_batches)
    assert min(gradient.abs().max() for gradient in expected.values()) > 0
    assert_equal(train(stages_of(model, layer_ranges), micro_batches), expected)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model = model_of("neox")
    micro_batches = [micro_batch_of()]
    stages = stages_of(model, gradient_checkpointing=True)
    assert_equal(train(stages, micro_batches), reference_gradients(model, micro_batches))


def test_recomputing_keeps_fewer_activations() -> None:
    model = model_of("llama")

    def saved_bytes(checkpointing: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        stage = stages_of(model, (None,), gradient_checkpointing=checkpointing)[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage.forward(0, micro_batch_of(), None)
        return sum(sizes)

    assert saved_bytes(True) < saved_bytes(False) / 5


def test_rows_padded_inside_use_their_mask_and_positions() -> None:
    model = model_of("llama")
    plain = micro_batch_of(7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    padded = MicroBatch(
        input_ids=plain.input_ids,
        head_index=torch.tensor([3, 6, 8, 12]),
        targets=plain.targets,
        attention_mask=mask,
        position_ids=mask.cumsum(1) - mask,
    )
    expected = reference_gradients(model, [padded])
    assert_equal(train(stages_of(model), [padded]), expected)
    without = MicroBatch(input_ids=plain.input_ids, head_index=padded.head_index, targets=plain.targets)
    gradients = train(stages_of(model), [without])
    assert (gradients["lm_head.weight"] - expected["lm_head.weight"]).abs().max() > 1e-3


def test_right_padding_changes_nothing_before_it() -> None:
    model = model_of("qwen3")
    whole = micro_batch_of(7)
    longer = MicroBatch(
        input_ids=torch.cat([whole.input_ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1),
        head_index=torch.tensor([1, 3, 10, 12]),
        targets=whole.targets,
    )
    assert_equal(train(stages_of(model), [longer]), train(stages_of(model), [whole]))


@pytest.mark.parametrize("name", ["llama", "neox", "qwen2"])
def test_bfloat16_is_the_same_on_any_number_of_stages(name: str) -> None:
    """Hidden states are bfloat16 everywhere, so cutting the model rounds nothing; parameters stay float32."""
    model = model_of(name)
    stages = stages_of(model, autocast=torch.bfloat16)
    hidden = stages[0].forward(7, micro_batch_of(), None)
    assert hidden is not None
    assert hidden.dtype == torch.bfloat16
    assert stages[0].boundary(micro_batch_of()).dtype == torch.bfloat16

    stages = stages_of(model, autocast=torch.bfloat16)
    one = train(stages_of(model, (None,), autocast=torch.bfloat16), [micro_batch_of()])
    split = train(stages, [micro_batch_of()])
    assert {gradient.dtype for gradient in split.values()} == {torch.float32}
    exact = reference_gradients(model, [micro_batch_of()])
    for gradient_name, gradient in split.items():
        # The tied copies are added in float32 when split, in autograd's order when not.
        torch.testing.assert_close(gradient, one[gradient_name], rtol=1e-5, atol=1e-6)
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact[gradient_name].flatten(), dim=0) > 0.99
    assert any((split[name] != exact[name]).any() for name in exact)


def test_undecayed_names_are_the_trainers() -> None:
    for name in MODELS:
        model = model_of(name)
        stages = stages_of(model)
        undecayed = frozenset[str]().union(*(stage.undecayed_names for stage in stages))
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        assert undecayed == {parameter for parameter, _ in model.named_parameters()} - decayed


def test_every_parameter_lives_on_one_stage_except_tied_ones() -> None:
    for name, tied in (("llama", set()), ("qwen2", {"model.embed_tokens.weight"})):
        stages = stages_of(model_of(name))
        names = [parameter for stage in stages for parameter, _ in stage.named_parameters()]
        assert {parameter for parameter in names if names.count(parameter) > 1} == tied
        assert set(names) == set(stages[0].model_shapes)
        assert [stage.tied_names for stage in stages] == [tied, set(), tied]
    assert stages_of(model_of("qwen2"), (None,))[0].tied_names == set()


def test_refusals_name_the_model_and_the_remedy() -> None:
    def stage(model_class: type[PreTrainedModel], config: PretrainedConfig, **options: object) -> TransformersStage:
        return TransformersStage(model_class, config, **{"stage": 0, "num_stages": 2, "loss": loss, **options})

    bert = BertConfig(**SIZES, is_decoder=True)
    with pytest.raises(ValueError, match=r"BertLMHeadModel declares no pipeline plan.*use an architecture that does"):
        stage(BertLMHeadModel, bert)
    with pytest.raises(ValueError, match=r"LlamaModel has neither.*use a causal language model"):
        stage(LlamaModel, LlamaConfig(**GROUPED))
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM .*final_logit_softcapping"):
        stage(Gemma2ForCausalLM, Gemma2Config(**GROUPED, head_dim=8))
    with pytest.raises(ValueError, match=r"layer range \(3, 6\).*within its 5 layers"):
        stage(LlamaForCausalLM, LlamaConfig(**GROUPED), layer_range=(3, 6))
    with pytest.raises(ValueError, match="stage 2 of 2"):
        stage(LlamaForCausalLM, LlamaConfig(**GROUPED), stage=2)


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = model_of("llama")
    stage = stages_of(model)[1]
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    missing = {name: tensor for name, tensor in state.items() if "layers.2.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        stage.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"up_proj\.weight is \[3\], the model has \[48, 32\]"):
        stage.load_state_dict({**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(3)})
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_callers_configuration_is_left_alone() -> None:
    model = model_of("qwen2 sliding")
    stages_of(model)
    assert model.config.num_hidden_layers == 5
    assert len(model.config.layer_types) == 5
