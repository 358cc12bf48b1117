"""A Llama with int8 matrices over the slots of its target, run by native code in one call per step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.models.mistral import MistralForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

from fuse.engines.decoder import Inputs
from fuse.engines.slot_cache import SlotCache
from fuse.merged_weight import merged_weight
from fuse.ops.int8_linear import quantize_int8
from fuse.ops.native import choose

_SERVED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def is_served(model: PreTrainedModel) -> bool:
    """Whether native code knows this model on its device: of these very classes, in fp32, as they usually are."""
    native, _ = choose(model.device, model.dtype, (torch.float32,))
    config = model.config
    return (
        native is not None
        and type(model) in _SERVED
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


class _Matrix:
    """Linear layers that take the same inputs, as one with int8 weights."""

    def __init__(self, linears: Sequence[nn.Linear], num_outs: int | None = None) -> None:
        parts = [quantize_int8(merged_weight(linear)[:num_outs]) for linear in linears]
        self.quantized, self.scales = (
            torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)
        )
        biases = [linear.bias for linear in linears]
        self.bias = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])

    def addresses(self) -> list[int]:
        return [self.quantized.data_ptr(), self.scales.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()]


class Int8Llama:
    """What a `Decoder` of `quantized_copy(model)` computes, but for rounding.

    num_tokens: that its logits are for, the first of the vocabulary; None for all.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache, num_tokens: int | None) -> None:
        assert is_served(model), type(model).__name__
        inner, config = model.model, model.config
        self._cache, self._rotary = cache, inner.rotary_emb
        self._embeddings = inner.embed_tokens.weight.detach()
        self._epsilon = float(config.rms_norm_eps)
        self._head = _Matrix([model.lm_head], num_tokens)
        self._final_norm = inner.norm.weight
        self._held: list[Tensor | _Matrix] = []  # what addresses are of
        self._layers = [self._addresses(layer) for layer in inner.layers]
        attention = inner.layers[0].self_attn
        self._num_tokens = len(self._head.quantized)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._shape = [len(self._layers), config.hidden_size, heads, kv_heads, attention.head_dim]
        self._shape += [config.intermediate_size, self._num_tokens]
        self._ends = array("q", [self._address(self._final_norm), *self._head.addresses()])

    @torch.inference_mode()
    def logits(self, inputs: Inputs, context: int, num_rows: int) -> Tensor:
        """As those of a `Decoder`. Pre: the target has computed something, so that its cache has layers."""
        buffers = self._cache.buffers(num_rows, context)
        capacity = buffers[0][0].shape[2]
        layers = array("q")
        for addresses, (keys, values) in zip(self._layers, buffers, strict=True):
            layers.extend((*addresses, keys.data_ptr(), values.data_ptr()))
        cosines, sines = self._rotary(self._embeddings, inputs.positions.unsqueeze(0))
        slots = torch.arange(num_rows) if inputs.slots is None else inputs.slots
        logits = torch.empty(len(inputs.token_ids), self._num_tokens)
        native, _ = choose(logits.device)
        assert native is not None
        native.int8_decode(
            *(array("q", [*self._shape, capacity]), layers, self._ends, self._embeddings, self._epsilon),
            *(one.contiguous() for one in (inputs.token_ids, slots, inputs.positions, cosines[0], sines[0])),
            logits,
        )
        return logits

    def _addresses(self, layer: Any) -> list[int]:
        """Of a layer's weights, in the order of the native code's `DecoderLayer`."""
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return [
            self._address(layer.input_layernorm.weight),
            *self._quantize(attention.q_proj, attention.k_proj, attention.v_proj),
            *(0 if norm is None else self._address(norm.weight) for norm in head_norms),
            *self._quantize(attention.o_proj),
            self._address(layer.post_attention_layernorm.weight),
            *self._quantize(mlp.gate_proj, mlp.up_proj),
            *self._quantize(mlp.down_proj),
        ]

    def _quantize(self, *linears: nn.Linear) -> list[int]:
        self._held.append(matrix := _Matrix(linears))
        return matrix.addresses()

    def _address(self, weight: Tensor) -> int:
        self._held.append(weight := weight.detach().contiguous())
        return weight.data_ptr()
