"""A Llama over the slots of a cache, run by native code in one call per step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.models.mistral import MistralForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

from fuse.engines.few_rows import FewRowsLinear
from fuse.engines.inputs import Inputs
from fuse.engines.slot_cache import SlotCache
from fuse.engines.window import Window
from fuse.ops.native import choose

_SERVED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

_ALL = Window(first=0, last=2**62)


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


def is_served_in_place(model: PreTrainedModel) -> bool:
    """Whether native code can read this model's matrices where they are: adapters beside them are none of these."""
    return is_served(model) and all(
        type(one) in (nn.Linear, FewRowsLinear) and one.weight.dtype is torch.float32
        for one in (model.lm_head, *(own for layer in model.model.layers for own in _matrices(layer)))
    )


def _matrices(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return *projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj


class Matrix(Protocol):
    """Linear layers that take the same inputs, as native code knows them."""

    def addresses(self) -> list[int]:
        """In the order of the native code's structure."""
        ...

    @property
    def num_outs(self) -> int:
        """Of all of them."""
        ...


class MakeMatrix(Protocol):
    """Of such layers. num_outs: the first of a single one's."""

    def __call__(self, linears: Sequence[nn.Linear], num_outs: int | None = None) -> Matrix: ...


class Matrices(NamedTuple):
    """What a model's are made into, and the function of the native extension that reads them."""

    layers: MakeMatrix
    head: MakeMatrix
    function: str


class FloatMatrices:
    """Those of the layers themselves, where they are. num_outs: the first of them."""

    def __init__(self, linears: Sequence[nn.Linear], num_outs: int | None = None) -> None:
        self._weights = [one.weight.detach()[:num_outs].contiguous() for one in linears]
        self._biases = [None if one.bias is None else one.bias.detach().contiguous() for one in linears]

    def addresses(self) -> list[int]:
        return [
            word
            for weight, bias in zip(self._weights, self._biases, strict=True)
            for word in (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), len(weight))
        ]

    @property
    def num_outs(self) -> int:
        return sum(map(len, self._weights))


FLOAT = Matrices(FloatMatrices, FloatMatrices, "float_decode")


class NativeLlama:
    """What a `Decoder` of the model computes, but for rounding; a row's result does not depend on the other rows.

    To be made anew when the model's weights have changed. num_tokens: that its logits are for, the first of the
    vocabulary; None for all.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SlotCache, num_tokens: int | None, matrices: Matrices = FLOAT
    ) -> None:
        assert is_served(model), type(model).__name__
        inner, config = model.model, model.config
        self._cache, self._rotary, self._matrices = cache, inner.rotary_emb, matrices
        self._embeddings = inner.embed_tokens.weight.detach()
        self._epsilon = float(config.rms_norm_eps)
        self._held: list[Tensor | Matrix] = []  # what addresses are of
        head = matrices.head([model.lm_head], num_tokens)
        self._held.append(head)
        self._layers = [self._addresses(layer) for layer in inner.layers]
        attention = inner.layers[0].self_attn
        self._num_tokens = head.num_outs
        self._kv_heads, self._head_dim = config.num_key_value_heads, attention.head_dim
        self._shape = [
            len(self._layers),
            config.hidden_size,
            config.num_attention_heads,
            self._kv_heads,
            self._head_dim,
        ]
        self._shape += [config.intermediate_size, self._num_tokens]
        self._ends = array("q", [self._address(inner.norm.weight), *head.addresses()])

    @torch.inference_mode()
    def logits(self, inputs: Inputs, context: int, num_rows: int, window: Window | None = None) -> Tensor:
        """As those of a `Decoder`."""
        self._cache.make_layers(len(self._layers), self._embeddings.new_empty(1, self._kv_heads, 1, self._head_dim))
        buffers = self._cache.buffers(num_rows, context)
        capacity = buffers[0][0].shape[2]
        layers = array("q")
        for addresses, (keys, values) in zip(self._layers, buffers, strict=True):
            layers.extend((*addresses, keys.data_ptr(), values.data_ptr()))
        cosines, sines = self._rotary(self._embeddings, inputs.positions.unsqueeze(0))
        slots = torch.arange(num_rows) if inputs.slots is None else inputs.slots
        logits = torch.empty(len(inputs.token_ids), self._num_tokens)
        native, _ = choose(logits.device)
        window = _ALL if window is None else window
        shape = [*self._shape, window.first, window.last, capacity]
        assert native is not None
        getattr(native, self._matrices.function)(
            *(array("q", shape), layers, self._ends, self._embeddings, self._epsilon),
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
            *self._matrix(attention.q_proj, attention.k_proj, attention.v_proj),
            *(0 if norm is None else self._address(norm.weight) for norm in head_norms),
            *self._matrix(attention.o_proj),
            self._address(layer.post_attention_layernorm.weight),
            *self._matrix(mlp.gate_proj, mlp.up_proj),
            *self._matrix(mlp.down_proj),
        ]

    def _matrix(self, *linears: nn.Linear) -> list[int]:
        self._held.append(matrix := self._matrices.layers(linears))
        return matrix.addresses()

    def _address(self, weight: Tensor) -> int:
        self._held.append(weight := weight.detach().contiguous())
        return weight.data_ptr()
