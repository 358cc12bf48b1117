"""Where each weight of a Hugging Face Llama, Qwen2 or Qwen3 lies in a megatron-core GPTModel, and the way back.

megatron-core keeps query, key and value in one matrix, and gate and up projection in another, and gives each
tensor-parallel rank a shard of most. The same map serves whatever goes with a weight element by element: its gradient
and AdamW's moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS_PREFIX = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"

_MODULES = {
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
    "score": "output_layer",
}
_LAYER_MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "self_attention.linear_qkv",
    "self_attn.k_proj": "self_attention.linear_qkv",
    "self_attn.v_proj": "self_attention.linear_qkv",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate_proj": "mlp.linear_fc1",
    "mlp.up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
}
"""In the order in which megatron-core stacks what shares a matrix."""

_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedWeight:
    """One megatron-core parameter and the Hugging Face parameters it is made of.

    sources: their names, in the order in which they are stacked.
    shapes: of each source.
    num_blocks: every source is cut into this many blocks of rows; the first blocks of all sources come first, then
        the second ones, and so on.
    shard_dim: the dimension that tensor-parallel ranks share out; None where each has the whole.
    num_shards: tensor-parallel ranks.
    """

    sources: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    num_blocks: int
    shard_dim: int | None
    num_shards: int

    def fuse(self, state_dict: Mapping[str, Tensor], shard: int) -> Tensor:
        """Shard number `shard` of the parameter, from a state dict that has all sources."""
        blocks = [state_dict[name].unflatten(0, (self.num_blocks, -1)) for name in self.sources]
        whole = torch.cat(blocks, dim=1).flatten(0, 1)
        return whole if self.shard_dim is None else whole.chunk(self.num_shards, self.shard_dim)[shard]

    def join(self, shards: Tensor) -> Tensor:
        """The whole parameter from all ranks' shards, [ranks, *shard]; a view where rows are shared out."""
        if self.shard_dim is None:
            return shards[0]
        return shards.flatten(0, 1) if self.shard_dim == 0 else torch.cat(shards.unbind(), self.shard_dim)

    def split(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The sources by name, made one by one from the whole parameter; views of it where it has one block."""
        sizes = [shape[0] // self.num_blocks for shape in self.shapes]
        parts = whole.unflatten(0, (self.num_blocks, -1)).split(sizes, dim=1)
        for name, part in zip(self.sources, parts, strict=True):
            yield name, part.flatten(0, 1)


def fused_weights(
    shapes: Mapping[str, torch.Size], *, num_query_groups: int, num_shards: int
) -> dict[str, FusedWeight]:
    """Every parameter of the whole model by its megatron-core name; layers have their number in the whole model.

    shapes: of the Hugging Face model's parameters by name, a tied head left out.

    Raises: ValueError when one has no place in a GPTModel, or does not divide among the shards.
    """
    sources: dict[str, list[str]] = {}
    for name in sorted(shapes, key=_stacking_order):
        sources.setdefault(megatron_name(name), []).append(name)
    weights = {}
    for name, parts in sources.items():
        if "linear_qkv" in name:
            num_blocks = num_query_groups  # [queries of the group, its key, its value], group after group
        elif "linear_fc1" in name:
            num_blocks = num_shards  # each rank's activation needs gate and up rows of the same units
        else:
            num_blocks = 1
        shard_dim = 1 if name.endswith(_ROW_PARALLEL) else 0
        is_whole = "layernorm" in name or parts == ["score.weight"]
        for part in parts:
            size = num_query_groups if "linear_qkv" in name else shapes[part][shard_dim]
            if not is_whole and size % num_shards:
                what = "key-value heads" if "linear_qkv" in name else f"entries along dimension {shard_dim}"
                raise ValueError(
                    f"{part} has {size} {what}, which {num_shards} tensor-parallel ranks cannot share evenly: "
                    f"use a number of ranks that divides them"
                )
        weights[name] = FusedWeight(
            sources=tuple(parts),
            shapes=tuple(shapes[part] for part in parts),
            num_blocks=num_blocks,
            shard_dim=None if is_whole else shard_dim,
            num_shards=num_shards,
        )
    return weights


def megatron_name(name: str) -> str:
    """The megatron-core name of a Hugging Face parameter, both numbering layers in the whole model.

    Raises: ValueError when it has no place in a GPTModel.
    """
    module, _, kind = name.rpartition(".")
    target, prefix = _MODULES.get(module), ""
    if module.startswith("model.layers."):
        layer, _, module = module.removeprefix("model.layers.").partition(".")
        target, prefix = _LAYER_MODULES.get(module), f"{LAYERS_PREFIX}{layer}."
    if target is None:
        raise ValueError(f"{name} has no place in a megatron-core GPTModel: use a Llama, Qwen2 or Qwen3 model")
    return f"{prefix}{target}.{kind}"


def _stacking_order(name: str) -> tuple[str, int]:
    module = name.rpartition(".")[0].removeprefix("model.layers.").partition(".")[2]
    return megatron_name(name), list(_LAYER_MODULES).index(module) if module in _LAYER_MODULES else 0
