"""A megatron-core GPTModel of some layers of a Hugging Face Llama, Qwen2 or Qwen3, on any device.

Each stage is a GPTModel of its own with as many layers as it keeps, so megatron-core knows of no pipeline; its process
groups are explicit (no `parallel_state`). Deviations from a stock GPTModel, so that one code path serves CPU and CUDA:

- core attention is torch's scaled_dot_product_attention;
- rotary angles come from the Hugging Face model's frequencies (`RotaryAngles`), not from megatron-core's module, which
  moves to CUDA by itself; they are handed to the decoder;
- a classifier's head takes the place of the output layer, whole on every tensor-parallel rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fuse.head_dim import head_dim


def build_model(
    config: PretrainedConfig,
    *,
    num_layers: int,
    has_embedding: bool,
    has_head: bool,
    num_labels: int | None,
    is_tied: bool,
    tensor_group: dist.ProcessGroup,
    device: torch.device,
) -> Any:
    """A GPTModel in evaluation mode, its parameters uninitialised float32.

    num_labels: width of a classifier's head; None for a vocabulary head.
    is_tied: embedding and head, both here, are one tensor.
    tensor_group: the tensor-parallel ranks.
    """
    untyped: Any = config
    num_shards = tensor_group.size()
    transformer_config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=untyped.hidden_size,
        num_attention_heads=untyped.num_attention_heads,
        num_query_groups=untyped.num_key_value_heads,
        kv_channels=head_dim(config),
        ffn_hidden_size=untyped.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=untyped.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=untyped.model_type == "qwen2",
        qk_layernorm=untyped.model_type == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        tensor_model_parallel_size=num_shards,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=transformer_config.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    with torch.device("meta"):
        model = GPTModel(
            transformer_config,
            spec,
            untyped.vocab_size,
            untyped.max_position_embeddings,
            pre_process=has_embedding,
            post_process=has_head,
            position_embedding_type="none",
            share_embeddings_and_output_weights=is_tied,
            pg_collection=_groups(tensor_group),
        )
        if has_head and num_labels is not None:
            model.output_layer = nn.Linear(untyped.hidden_size, num_labels, bias=False)
    for module in model.modules():
        if hasattr(module, "tp_group"):  # megatron-core drops it where torch.distributed is not initialised
            module.tp_group = tensor_group
    return model.to_empty(device=device).train(False)


def lone_group() -> dist.ProcessGroup:
    """A group of this rank alone: it has a rank and a size, and nothing to communicate through."""
    process_group: Any = dist.ProcessGroup  # its stub knows only the constructor that takes a store
    group: dist.ProcessGroup = process_group(0, 1)
    return group


def _groups(tensor_group: dist.ProcessGroup) -> Any:
    groups = ProcessGroupCollection()
    groups.tp = tensor_group
    groups.pp, groups.cp = lone_group(), lone_group()
    groups.embd = None  # must exist: absent, megatron-core asks parallel_state
    return groups


class RotaryAngles:
    """The angles by which a Hugging Face model turns queries and keys, in megatron-core's layout."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        untyped: Any = model.base_model
        with torch.device("cpu"):
            rotary = type(untyped.rotary_emb)(copy.deepcopy(model.config))
        assert rotary.attention_scaling == 1.0  # as in all of _ROPE_TYPES
        self._frequencies: Tensor = rotary.inv_freq.float().to(device)

    def __call__(self, num_tokens: int, position_ids: Tensor | None) -> Tensor:
        """[tokens, 1 or batch, 1, head_dim] float32; `position_ids` [batch, tokens], 0 to tokens - 1 by default."""
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=self._frequencies.device)[None]
        angles = position_ids.t()[:, :, None, None] * self._frequencies
        return torch.cat([angles, angles], dim=-1)


class SdpaAttention(nn.Module):
    """Core attention of a megatron-core layer, by torch's scaled_dot_product_attention; without dropout."""

    def __init__(self, *, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object) -> Tensor:
        """query [tokens, batch, heads, head_dim], key and value with key-value heads -> [tokens, batch, -1].

        attention_mask: bool, broadcast to [batch, heads, tokens, tokens], True where attention goes, as torch has it
        (megatron-core's own attention inverts this); plain causal attention without it.
        """
        query, key, value = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self._scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def attention_mask(present: Tensor | None) -> Tensor | None:
    """Causal attention to the tokens `present` [batch, tokens] marks, as `SdpaAttention` takes it.

    A token with none to attend to attends to itself, for a softmax over nothing would be NaN.
    """
    if present is None:
        return None
    num_tokens = present.size(1)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=present.device).tril()
    itself = torch.eye(num_tokens, dtype=torch.bool, device=present.device)
    allowed = causal & present.bool()[:, None, None, :]
    return allowed | (itself & ~allowed.any(-1, keepdim=True))
