"""megatron-core stages chained in one process are the transformers stages of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fuse.intrastage.megatron_stage import MegatronStage
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training.state import load_state, save_state

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rms_norm_eps=0.1)),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama classifier": (LlamaForSequenceClassification, LlamaConfig(**SIZES, num_labels=1)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}
ONE = (None,)
UNEVEN = ((0, 1), (1, 4), (4, 5))
Chain = Sequence[MegatronStage | TransformersStage]


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return (head(hidden).float() * micro_batch.targets).square().mean(), {}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config).float().eval()
    for parameter in model.parameters():  # norms start at 1 and biases at 0: make every parameter count
        nn.init.normal_(parameter, std=0.2)
    return model


def chain_of(
    stage_class: type[Any], model: PreTrainedModel, layer_ranges: Sequence[tuple[int, int] | None], **options: Any
) -> list[Any]:
    options = {"loss": loss, **options}
    stages = [
        stage_class(
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


BATCHES = [micro_batch_of(7), micro_batch_of(5), micro_batch_of(12)]


def run(stages: Chain, micro_batches: Sequence[MicroBatch]) -> None:
    """All forwards before all backwards."""
    for index, micro_batch in enumerate(micro_batches):
        hidden = None
        for stage in stages:
            hidden = stage.forward(index, micro_batch, hidden)
    for index in range(len(micro_batches)):
        grad = None
        for stage in reversed(stages):
            grad = stage.backward(index, grad)


def gradients(stages: Chain) -> dict[str, Tensor]:
    """By Hugging Face name; tied copies are summed."""
    total: dict[str, Tensor] = {}
    for stage in stages:
        own: dict[str, Any] = {name: parameter.grad for name, parameter in stage.named_parameters()}
        for name, gradient in (stage.to_hugging_face(own) if isinstance(stage, MegatronStage) else own).items():
            total[name] = total.get(name, 0) + gradient
    return total


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_ranges", [ONE, UNEVEN], ids=["one", "uneven"])
def test_losses_logits_and_gradients_are_those_of_transformers_stages(name: str, layer_ranges: Any) -> None:
    model = model_of(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        value, metrics = loss(hidden, head, micro_batch)
        seen.append((head(hidden).detach(), value.detach()))
        return value, metrics

    megatron = chain_of(MegatronStage, model, layer_ranges, loss=recording)
    run(megatron, BATCHES)
    transformers = chain_of(TransformersStage, model, ONE, loss=recording)
    run(transformers, BATCHES)
    for got, expected in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    got, expected = gradients(megatron), gradients(transformers)
    assert_equal(got, expected)
    for key, gradient in expected.items():  # and as closely where gradients are small
        assert (got[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max() > 0, key


def exported(stages: Chain) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for stage in stages:
        part = stage.export_state_dict()
        assert not weights.keys() & part.keys()
        weights |= part
    return weights


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [MegatronStage, TransformersStage])
def test_weights_go_in_and_come_out_bit_for_bit_and_once(name: str, kind: type[Any]) -> None:
    model = model_of(name)
    for layer_ranges in (ONE, UNEVEN):
        assert_equal(exported(chain_of(kind, model, layer_ranges)), dict(model.named_parameters()), atol=0)


@pytest.mark.parametrize("name", ["llama tied", "llama classifier", "qwen2", "qwen3"])
def test_weights_after_some_steps_are_those_of_transformers_stages(name: str) -> None:
    """AdamW with decay, which spares norms and biases, and a clipped norm of the whole model."""
    model = model_of(name)
    config = AdamWConfig(weight_decay=0.1, max_grad_norm=0.05)
    weights, norms = [], []
    for stage_class, layer_ranges in ((MegatronStage, UNEVEN), (TransformersStage, ONE)):
        stages = chain_of(stage_class, model, layer_ranges)
        optimizer = ModelOptimizer(name, {(0, stage.stage): stage for stage in stages}, None, config)
        for step in range(3):
            run(stages, BATCHES)
            norms.append(optimizer.step(1e-3 / (step + 1)))
        weights.append(exported(stages))
    torch.testing.assert_close(norms[:3], norms[3:], rtol=1e-5, atol=0)
    assert_equal(*weights)
    start = dict(model.named_parameters())
    assert min((weight - start[name]).abs().max() for name, weight in weights[0].items()) > 1e-3


KINDS = [(MegatronStage, MegatronStage), (MegatronStage, TransformersStage), (TransformersStage, MegatronStage)]


@pytest.mark.parametrize("kinds", KINDS)
def test_training_state_saved_on_some_stages_resumes_on_others(kinds: Any, tmp_path: Path) -> None:
    model = model_of("qwen2")
    optimizers = []
    for kind, layer_ranges in zip(kinds, (UNEVEN, ONE), strict=True):
        stages = chain_of(kind, model, layer_ranges)
        optimizer = ModelOptimizer("actor", {(0, stage.stage): stage for stage in stages}, None, AdamWConfig())
        optimizers.append((stages, optimizer))
    (saved_stages, saved), (stages, loaded) = optimizers
    run(saved_stages, BATCHES)
    saved.step(1e-3)
    save_state(tmp_path / "state", {"actor": saved})
    load_state(tmp_path / "state", {"actor": loaded})
    assert_equal(exported(stages), exported(saved_stages), atol=0)
    for each in (saved_stages, stages):
        run(each, BATCHES)
    torch.testing.assert_close(saved.step(1e-3), loaded.step(1e-3), rtol=1e-5, atol=0)
    assert_equal(exported(stages), exported(saved_stages))


@pytest.mark.parametrize("order", [(MegatronStage, TransformersStage), (TransformersStage, MegatronStage)])
def test_a_pipeline_may_mix_both_kinds_of_stages(order: Any) -> None:
    model = model_of("qwen3")
    mixed = [chain_of(stage_class, model, ((0, 1), (1, 5)))[stage] for stage, stage_class in enumerate(order)]
    run(mixed, BATCHES)
    whole = chain_of(TransformersStage, model, ONE)
    run(whole, BATCHES)
    assert_equal(gradients(mixed), gradients(whole))


def test_rows_padded_inside_use_their_mask_and_positions() -> None:
    model = model_of("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    padded = MicroBatch(
        input_ids=BATCHES[0].input_ids,
        head_index=torch.tensor([3, 6, 8, 12]),
        targets=BATCHES[0].targets,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - mask),
    )
    megatron, transformers = (chain_of(kind, model, UNEVEN) for kind in (MegatronStage, TransformersStage))
    run(megatron, [padded])
    run(transformers, [padded])
    assert_equal(gradients(megatron), gradients(transformers))


def test_right_padding_changes_nothing_before_it() -> None:
    model = model_of("qwen3")
    whole = micro_batch_of(7)
    longer = MicroBatch(
        input_ids=torch.cat([whole.input_ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1),
        head_index=torch.tensor([1, 3, 10, 12]),
        targets=whole.targets,
    )
    first, second = chain_of(MegatronStage, model, UNEVEN), chain_of(MegatronStage, model, UNEVEN)
    run(first, [whole])
    run(second, [longer])
    assert_equal(gradients(second), gradients(first), atol=1e-6)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model = model_of("qwen2")
    plain = chain_of(MegatronStage, model, UNEVEN)
    recomputed = chain_of(MegatronStage, model, UNEVEN, gradient_checkpointing=True)
    run(plain, BATCHES)
    run(recomputed, BATCHES)
    assert_equal(gradients(recomputed), gradients(plain), atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers_stages(name: str) -> None:
    model = model_of(name)
    stages = chain_of(MegatronStage, model, UNEVEN, autocast=torch.bfloat16)
    hidden = stages[0].forward(7, BATCHES[0], None)
    assert hidden.dtype == stages[0].boundary(BATCHES[0]).dtype == torch.bfloat16
    stages[0].backward(7, torch.zeros_like(hidden))
    run(stages, BATCHES)
    exact = chain_of(TransformersStage, model, ONE)
    run(exact, BATCHES)
    expected = gradients(exact)
    for gradient_name, gradient in gradients(stages).items():
        assert gradient.dtype == torch.float32
        assert nn.functional.cosine_similarity(gradient.flatten(), expected[gradient_name].flatten(), dim=0) > 0.99


def test_names_are_the_whole_models_and_tied_copies_carry_one() -> None:
    for name, tied in (("qwen3", set()), ("qwen2", {"embedding.word_embeddings.weight"})):
        stages = chain_of(MegatronStage, model_of(name), UNEVEN)
        names = [parameter for stage in stages for parameter, _ in stage.named_parameters()]
        assert {parameter for parameter in names if names.count(parameter) > 1} == tied
        assert [stage.tied_names for stage in stages] == [tied, set(), tied]
        for stage in stages:
            assert stage.model_shapes == {key: one.shape for key, one in model_of(name).named_parameters()}
            own = stage.to_hugging_face(dict(stage.named_parameters()))
            assert stage.stage_shapes == {key: tensor.shape for key, tensor in own.items()}
    assert chain_of(MegatronStage, model_of("qwen2"), ONE)[0].tied_names == set()


def test_refusals_name_the_setting_and_the_remedy() -> None:
    def stage(model_class: type[PreTrainedModel], config: PretrainedConfig, **options: Any) -> MegatronStage:
        return MegatronStage(model_class, config, **{"stage": 0, "num_stages": 2, "loss": loss, **options})

    with pytest.raises(ValueError, match=r"'gpt_neox'.*llama, qwen2, qwen3; train others with transformers stages"):
        stage(GPTNeoXForCausalLM, GPTNeoXConfig())
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        stage(LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu"))
    with pytest.raises(ValueError, match="attention_bias True"):
        stage(LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True))
    with pytest.raises(ValueError, match=r"layer_types \['sliding_attention'\]"):
        sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
        stage(Qwen2ForCausalLM, Qwen2Config(**SIZES, **sliding))
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        stage(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=dynamic))
    with pytest.raises(ValueError, match=r"layer range \(3, 6\).*within its 5 layers"):
        stage(LlamaForCausalLM, LlamaConfig(**SIZES), layer_range=(3, 6))
    with pytest.raises(ValueError, match=r"layer range \(3, 3\).*at least 1"):
        stage(LlamaForCausalLM, LlamaConfig(**SIZES), layer_range=(3, 3))
    with pytest.raises(ValueError, match="stage 2 of 2"):
        stage(LlamaForCausalLM, LlamaConfig(**SIZES), stage=2)


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = model_of("llama")
    stage = chain_of(MegatronStage, model, UNEVEN)[1]
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    missing = {name: tensor for name, tensor in state.items() if "layers.2.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        stage.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"up_proj\.weight is \[3\], the model has \[48, 32\]"):
        stage.load_state_dict({**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(3)})
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, before[name])
