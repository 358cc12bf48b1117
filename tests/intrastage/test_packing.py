"""Sequences without padding: what stages and scoring compute of them is what they compute of padded ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage import packed_attention
from fuse.intrastage.cost_profile import Shape, shape_of
from fuse.intrastage.packed_attention import PACKED_ATTENTION
from fuse.intrastage.packing import Packing, use_packing
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import MicroBatch
from fuse.training.layout import RaggedLayout
from fuse.training.reading import TokenSequence
from fuse.training.scoring import reference_logprobs, values

from .. import tiny_models
from .test_packed_attention import on_cpus

LENGTHS = (3, 9, 1, 6)


def micro_batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    for row, length in enumerate(LENGTHS):
        input_ids[row, length:] = 0
    head_index = torch.tensor([1, 9, 14, 17, 18, 27, 32])
    return MicroBatch(input_ids=input_ids, head_index=head_index, targets=None, lengths=LENGTHS)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Any:
    return head(hidden).square().sum(), {}


@pytest.mark.parametrize(
    ("architecture", "way"),
    [("llama", "each"), ("qwen2", "each"), ("qwen3", "each"), ("llama", "flex"), ("qwen3", "varlen")],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_stages_learn_the_same(architecture: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, one after the other, by every way of attention."""
    on_cpus(monkeypatch)
    monkeypatch.setattr(packed_attention, "way_of_device", lambda *_: way)
    model_class, config = tiny_models.language_model(architecture)
    state = tiny_models.spread(tiny_models.build((model_class, config))).state_dict()
    calls = []
    attention = packed_attention.sdpa_attention_forward
    monkeypatch.setattr(
        packed_attention,
        "sdpa_attention_forward",
        lambda *args, **options: calls.append(1) or attention(*args, **options),
    )
    found = []
    for batch in (micro_batch(), replace(micro_batch(), lengths=None)):
        calls.clear()
        stages = [
            TransformersStage(model_class, config, stage=stage, num_stages=2, loss=loss, split_backward=True)
            for stage in range(2)
        ]
        for one in stages:
            one.load_state_dict(state)
        hidden = stages[0].forward(0, batch, None)
        stages[1].forward(0, batch, hidden.clone())
        output_grad = stages[1].backward(0, None)
        stages[0].backward(0, output_grad)
        assert hidden.shape == stages[0].boundary(batch).shape
        real = [hidden[0]] if hidden.shape[0] == 1 else [hidden[row, :one] for row, one in enumerate(LENGTHS)]
        grads = {name: parameter.grad for one in stages for name, parameter in one.named_parameters()}
        found.append((len(calls), torch.cat(real), grads))
    assert found[0][0] == (len(LENGTHS) * found[1][0] if way == "each" else 0), "each sequence by itself"
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    for name, grad in found[1][2].items():
        torch.testing.assert_close(found[0][2][name], grad, rtol=1e-4, atol=1e-4)


def test_models_say_the_same() -> None:
    sequences = [TokenSequence((1, 2, 3), tuple(range(4, 4 + length))) for length in LENGTHS]
    for kind, read in (
        (tiny_models.language_model(), lambda model: reference_logprobs(model, sequences, 0.7)),
        (tiny_models.classifier(), lambda model: values(model, sequences)),
    ):
        model = tiny_models.spread(tiny_models.build(kind))
        packed = copy.deepcopy(model)
        use_packing(packed, "cpu")
        assert packed.config._attn_implementation == PACKED_ATTENTION
        for own, expected in zip(read(packed), read(model), strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9, 9, 9), (9, 9, 9, 8), (9,)])
def test_what_is_counted_is_what_passes(lengths: tuple[int, ...]) -> None:
    """Planner and profile count shapes; stages compute on tensors."""
    model_class, config = tiny_models.language_model()
    stage = TransformersStage(model_class, config, stage=0, num_stages=2, loss=loss)
    stage.load_state_dict(tiny_models.build((model_class, config)).state_dict())
    batch = replace(micro_batch(), input_ids=micro_batch().input_ids[: len(lengths)])
    for index, own in enumerate((replace(batch, lengths=lengths), replace(batch, lengths=None))):
        shape = shape_of(own)
        passed = stage.forward(index, own, None)
        assert passed is not None
        assert passed.shape[:2] == stage.boundary(own).shape[:2] == (shape.num_sequences, shape.num_tokens)
        assert shape == Shape.of(lengths, packs=True) or own.lengths is None


def test_a_run_packs_where_all_that_trains_can() -> None:
    llama, other = (tiny_models.build(tiny_models.language_model(name)) for name in ("llama", "gpt_neox"))
    assert RaggedLayout.of({"actor": llama, "critic": llama, "reference": other}, "transformers", "cpu").packs
    assert not RaggedLayout.of({"actor": llama, "critic": other}, "transformers", "cpu").packs
    assert not RaggedLayout.of({"actor": llama}, "megatron", "cpu").packs
    wide = tiny_models.build(tiny_models.language_model(hidden_size=32))
    assert RaggedLayout.of({"actor": wide}, "transformers", "cuda").packs
    assert not RaggedLayout.of({"actor": llama}, "transformers", "cuda").packs, "heads that its kernels do not take"


def test_what_stays_as_it_is_laid_out() -> None:
    model = tiny_models.build(tiny_models.language_model())
    assert Packing.of(micro_batch(), model) is None, "its attention would not tell sequences apart"
    use_packing(model, "cpu")
    assert Packing.of(micro_batch(), model) is not None
    full = replace(micro_batch(), lengths=(9, 9, 9, 9))
    assert Packing.of(full, model) is None
    other = tiny_models.build(tiny_models.language_model("gpt_neox"))
    use_packing(other, "cpu")
    assert other.config._attn_implementation != PACKED_ATTENTION
