"""What stages of every kind must do: chained in one process, they are the model that they were cut from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training.state import load_state, save_state

from .chains import (
    BATCHES,
    COMMON,
    EVERY,
    KINDS,
    ONE,
    TWO,
    UNEVEN,
    Ranges,
    assert_equal,
    chain_of,
    expected_of,
    exported,
    loss,
    micro_batch_of,
    model_of,
    run,
    trained,
    whole_models,
)

ATOL = {"transformers": 1e-6, "megatron": 1e-5}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    ("kind", "name", "layer_ranges"),
    [
        *((*one, UNEVEN) for one in EVERY),
        *((*one, ONE) for one in EVERY),
        *((kind, "llama", TWO) for kind in KINDS),
    ],
)
def test_losses_logits_and_gradients_are_those_of_the_whole_model(kind: str, name: str, layer_ranges: Ranges) -> None:
    model = model_of(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        value, metrics = loss(hidden, head, micro_batch)
        seen.append((head(hidden).detach(), value.detach()))
        return value, metrics

    expected, expected_seen = expected_of(name)
    got = trained(chain_of(kind, model, layer_ranges, loss=recording))
    for one, other in zip(seen, expected_seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_equal(got, expected, ATOL[kind])
    for key, gradient in expected.items():  # and as closely where gradients are small
        assert (got[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max() > 0, key


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_weights_go_in_and_come_out_bit_for_bit_and_once(kind: str, name: str) -> None:
    model = model_of(name)
    for layer_ranges in (ONE, UNEVEN):
        assert_equal(exported(chain_of(kind, model, layer_ranges)), dict(model.named_parameters()), atol=0)


STEP_ROUNDING = 3e-5
"""Of weights after steps of 1e-3: AdamW divides gradients near nothing, whose rounding is the CPU's, by their size."""


@every_kind
@pytest.mark.parametrize("name", ["llama tied", "llama classifier", "qwen2", "qwen3"])
def test_weights_after_some_steps_are_those_of_one_transformers_stage(name: str, kind: str) -> None:
    """AdamW with decay, which spares norms and biases, and a clipped norm of the whole model."""
    model = model_of(name)
    config = AdamWConfig(weight_decay=0.1, max_grad_norm=0.05)
    weights, norms = [], []
    for stages in (chain_of(kind, model), chain_of("transformers", model, ONE)):
        optimizer = ModelOptimizer(name, {(0, stage.stage): stage for stage in stages}, None, config)
        for step in range(3):
            run(stages)
            norms.append(optimizer.step(1e-3 / (step + 1)))
        weights.append(exported(stages))
    torch.testing.assert_close(norms[:3], norms[3:], rtol=1e-5, atol=0)
    assert_equal(*weights, atol=STEP_ROUNDING)
    start = dict(model.named_parameters())
    assert min((weight - start[name]).abs().max() for name, weight in weights[0].items()) > 1e-3


BOTTOM = ("embed_tokens", "layers.0.")
"""All of stage 0, where UNEVEN cuts."""


@every_kind
@pytest.mark.parametrize("parts", [BOTTOM, ("mlp", "input_layernorm"), ("lm_head", "norm.", "o_proj")])
@pytest.mark.parametrize(("name", "splits"), [("qwen3", True), ("llama tied", False)])
def test_frozen_parameters_stay_and_the_others_train_as_they_do_in_torch(
    name: str, splits: bool, parts: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    """Two steps, between which the training state is saved and loaded."""
    model = copy.deepcopy(model_of(name))
    start = {key: one.detach().clone() for key, one in model.named_parameters()}
    frozen = frozenset(key for key in start if any(part in key for part in parts))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)
    adamw = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3, weight_decay=0.0)
    chains, norms, expected_norms = [], [], []
    for step in range(2):
        stages = chain_of(kind, model_of(name), split_backward=splits)
        for stage in stages:
            stage.freeze(frozen)
        keyed = {(0, stage.stage): stage for stage in stages}
        optimizer = ModelOptimizer("actor", keyed, None, AdamWConfig(max_grad_norm=0.05), frozen=frozen)
        if step > 0:
            load_state(tmp_path, {"actor": optimizer})
        run(stages, splits=splits)
        norms.append(optimizer.step(1e-3))
        save_state(tmp_path, {"actor": optimizer})
        chains.append(stages)
        for key, gradient in whole_models(model)[0].items():
            model.get_parameter(key).grad = gradient
        expected_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        adamw.step()
        adamw.zero_grad()

    weights = exported(chains[-1])
    assert_equal({key: weights[key] for key in frozen}, {key: start[key] for key in frozen}, atol=0)
    assert_equal(weights, dict(model.named_parameters()), atol=STEP_ROUNDING)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    assert min(float((weights[key] - start[key]).abs().max()) for key in weights.keys() - frozen) > 1e-3


def test_parameters_of_one_megatron_matrix_are_frozen_together() -> None:
    (stage,) = chain_of("megatron", model_of("qwen3"), ONE)
    with pytest.raises(
        ValueError, match=r"layers\.0\S+k_proj.weight is frozen and \S+ is not, .*freeze both or neither"
    ):
        stage.freeze({"model.layers.0.self_attn.k_proj.weight"})


@pytest.mark.parametrize("loading", KINDS)
@pytest.mark.parametrize("saving", KINDS)
def test_training_state_saved_on_some_stages_resumes_on_others(saving: str, loading: str, tmp_path: Path) -> None:
    model = model_of("qwen2")
    optimizers = []
    for kind, layer_ranges in ((saving, UNEVEN), (loading, ONE)):
        stages = chain_of(kind, model, layer_ranges)
        optimizer = ModelOptimizer("actor", {(0, stage.stage): stage for stage in stages}, None, AdamWConfig())
        optimizers.append((stages, optimizer))
    (saved_stages, saved), (stages, loaded) = optimizers
    run(saved_stages)
    saved.step(1e-3)
    save_state(tmp_path / "state", {"actor": saved})
    load_state(tmp_path / "state", {"actor": loaded})
    assert_equal(exported(stages), exported(saved_stages), atol=0)
    for each in (saved_stages, stages):
        run(each)
    torch.testing.assert_close(saved.step(1e-3), loaded.step(1e-3), rtol=1e-5, atol=0)
    assert_equal(exported(stages), exported(saved_stages))


@pytest.mark.parametrize("kinds", [("megatron", "transformers"), ("transformers", "megatron")])
def test_a_pipeline_may_mix_kinds_of_stages(kinds: tuple[str, str]) -> None:
    model = model_of("qwen3")
    mixed = [chain_of(kind, model, ((0, 1), (1, 4)))[stage] for stage, kind in enumerate(kinds)]
    assert_equal(trained(mixed), expected_of("qwen3")[0])


@every_kind
@pytest.mark.parametrize(("end", "last"), [((1, 1), 6), ((0, 0), 4)], ids=["left", "both sides"])
def test_rows_padded_inside_use_their_mask_and_positions(end: tuple[int, int], last: int, kind: str) -> None:
    model = model_of("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, *end], [1, 1, 1, 1, 1, 1, 1]])
    plain = replace(micro_batch_of(7), head_index=torch.tensor([3, last, 8, 12]))
    padded = replace(plain, attention_mask=mask, position_ids=mask.cumsum(1) - mask)
    expected, _ = whole_models(model, [padded])
    assert_equal(trained(chain_of(kind, model), [padded]), expected, ATOL[kind])
    without = trained(chain_of(kind, model), [plain])
    assert (without["lm_head.weight"] - expected["lm_head.weight"]).abs().max() > 1e-3


@every_kind
def test_right_padding_changes_nothing_before_it(kind: str) -> None:
    model = model_of("qwen3")
    whole = micro_batch_of(7)
    longer = replace(
        whole,
        input_ids=torch.cat([whole.input_ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1),
        head_index=torch.tensor([1, 3, 10, 12]),
    )
    assert_equal(trained(chain_of(kind, model), [longer]), trained(chain_of(kind, model), [whole]), atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("transformers", "neox"), *((kind, "qwen2") for kind in KINDS)])
def test_recomputed_layers_give_the_same_gradients_and_keep_fewer_activations(kind: str, name: str) -> None:
    model = model_of(name)
    saved_bytes, found = [], []
    for checkpointing in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        stages = chain_of(kind, model, gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = stages[0].forward(7, BATCHES[0], None)
            stages[1].forward(7, BATCHES[0], hidden)  # layers alone
        saved_bytes.append(sum(sizes))
        found.append(trained(chain_of(kind, model, gradient_checkpointing=checkpointing)))
    assert saved_bytes[1] < saved_bytes[0] / 5
    assert_equal(found[1], found[0], atol=0)


@pytest.mark.parametrize(("kind", "name"), [one for one in EVERY if one[1] in ("llama", "qwen2", "qwen3", "neox")])
def test_bfloat16_keeps_float32_parameters_and_comes_close(kind: str, name: str) -> None:
    model = model_of(name)
    stages = chain_of(kind, model, autocast=torch.bfloat16)
    hidden = stages[0].forward(7, BATCHES[0], None)
    assert hidden.dtype == stages[0].boundary(BATCHES[0]).dtype == torch.bfloat16
    stages = chain_of(kind, model, autocast=torch.bfloat16)
    expected, _ = expected_of(name)
    found = trained(stages)
    for gradient_name, gradient in found.items():
        assert gradient.dtype == torch.float32
        exact = expected[gradient_name].flatten()
        assert nn.functional.cosine_similarity(gradient.flatten(), exact, dim=0) > 0.99
    assert any((found[name] != expected[name]).any() for name in expected)


@pytest.mark.parametrize(
    ("kind", "tied_name"),
    [("transformers", "model.embed_tokens.weight"), ("megatron", "embedding.word_embeddings.weight")],
)
def test_every_parameter_lives_on_one_stage_except_tied_ones(kind: str, tied_name: str) -> None:
    for name, tied in (("qwen3", set()), ("llama", set()), ("qwen2", {tied_name})):
        model = model_of(name)
        stages = chain_of(kind, model)
        names = [parameter for stage in stages for parameter, _ in stage.named_parameters()]
        assert {parameter for parameter in names if names.count(parameter) > 1} == tied
        assert [stage.tied_names for stage in stages] == [tied, set(), tied]
        for stage in stages:
            assert stage.model_shapes == {key: one.shape for key, one in model.named_parameters()}
    assert chain_of(kind, model_of("qwen2"), ONE)[0].tied_names == set()


@every_kind
def test_a_stage_that_cannot_be_is_refused(kind: str) -> None:
    def stage(**options: Any) -> Any:
        return KINDS[kind](*COMMON["llama"], **{"stage": 0, "num_stages": 2, "loss": loss, **options})

    with pytest.raises(ValueError, match=r"layer range \(3, 5\).*within its 4 layers"):
        stage(layer_range=(3, 5))
    with pytest.raises(ValueError, match="stage 2 of 2"):
        stage(stage=2)


@every_kind
def test_a_state_dict_that_does_not_fit_changes_nothing(kind: str) -> None:
    model = model_of("llama")
    stage = chain_of(kind, model)[1]
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    missing = {name: tensor for name, tensor in state.items() if "layers.2.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        stage.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"up_proj\.weight is \[3\], the model has \[48, 32\]"):
        stage.load_state_dict({**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(3)})
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, before[name])


@every_kind
def test_the_callers_configuration_is_left_alone(kind: str) -> None:
    model = model_of("qwen2")
    before = model.config.to_dict()
    chain_of(kind, model)
    assert model.config.to_dict() == before
