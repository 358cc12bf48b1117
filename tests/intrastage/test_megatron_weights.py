"""The map between Hugging Face and megatron-core weights, on weights small enough to write down."""

from __future__ import annotations

import pytest
import torch

from fuse.intrastage.megatron_weights import fused_weights, megatron_name

LAYER = "model.layers.3."


def rows(*firsts: int) -> torch.Tensor:
    """One column; each row holds its number."""
    return torch.tensor(firsts)[:, None]


def test_queries_keys_and_values_are_stacked_group_by_group() -> None:
    """Four heads of one row in two groups: queries 0 to 3, keys 10 and 11, values 20 and 21."""
    weights = {
        f"{LAYER}self_attn.q_proj.weight": rows(0, 1, 2, 3),
        f"{LAYER}self_attn.k_proj.weight": rows(10, 11),
        f"{LAYER}self_attn.v_proj.weight": rows(20, 21),
    }
    shapes = {name: weight.shape for name, weight in reversed(weights.items())}
    for num_shards, expected in ((1, [[0, 1, 10, 20, 2, 3, 11, 21]]), (2, [[0, 1, 10, 20], [2, 3, 11, 21]])):
        fused = fused_weights(shapes, num_query_groups=2, num_shards=num_shards)
        (weight,) = fused.values()
        assert list(fused) == ["decoder.layers.3.self_attention.linear_qkv.weight"]
        shards = [weight.fuse(weights, shard) for shard in range(num_shards)]
        assert [shard.flatten().tolist() for shard in shards] == expected
        split = dict(weight.split(weight.join(torch.stack(shards))))
        assert all(torch.equal(split[name], tensor) for name, tensor in weights.items())


def test_every_rank_has_gate_and_up_of_the_same_units() -> None:
    weights = {f"{LAYER}mlp.gate_proj.weight": rows(0, 1, 2, 3), f"{LAYER}mlp.up_proj.weight": rows(10, 11, 12, 13)}
    shapes = {name: weight.shape for name, weight in weights.items()}
    (weight,) = fused_weights(shapes, num_query_groups=1, num_shards=2).values()
    shards = [weight.fuse(weights, shard) for shard in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    split = dict(weight.split(weight.join(torch.stack(shards))))
    assert all(torch.equal(split[name], tensor) for name, tensor in weights.items())


def test_outputs_are_shared_out_by_columns_and_norms_and_scores_not_at_all() -> None:
    weights = {
        f"{LAYER}mlp.down_proj.weight": torch.arange(8).view(2, 4),
        f"{LAYER}input_layernorm.weight": torch.arange(3),
        "score.weight": torch.arange(4).view(1, 4),
    }
    fused = fused_weights({name: weight.shape for name, weight in weights.items()}, num_query_groups=1, num_shards=2)
    shards = {name: [weight.fuse(weights, shard).tolist() for shard in range(2)] for name, weight in fused.items()}
    assert shards == {
        "decoder.layers.3.mlp.linear_fc2.weight": [[[0, 1], [4, 5]], [[2, 3], [6, 7]]],
        "decoder.layers.3.input_layernorm.weight": [[0, 1, 2], [0, 1, 2]],
        "output_layer.weight": [[[0, 1, 2, 3]], [[0, 1, 2, 3]]],
    }


def test_refusals_name_the_weight_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.router\.weight has no place in a megatron-core"):
        megatron_name(f"{LAYER}mlp.router.weight")
    with pytest.raises(ValueError, match=r"lm_head\.weight has 7 entries along dimension 0, which 2 tensor-parallel"):
        fused_weights({"lm_head.weight": torch.Size([7, 4])}, num_query_groups=2, num_shards=2)
    with pytest.raises(ValueError, match=r"q_proj\.weight has 3 key-value heads, which 2 tensor-parallel ranks"):
        name = f"{LAYER}self_attn.q_proj.weight"
        fused_weights({name: torch.Size([12, 4])}, num_query_groups=3, num_shards=2)
