"""A linear layer with a LoRA adapter: through rank r, and through the merged weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from fuse.benchmarks.kernels.rows import Case
from fuse.intrastage.adapted_linear import is_faster_merged, use_faster_way
from fuse.intrastage.adapters import base_of, lora, with_adapter
from fuse.merged_weight import merged_weight

_RANK = 8
_TRAINED_ROWS = 512


def lora_cases(hidden_size: int = 576, intermediate_size: int = 1536) -> Iterator[Case]:
    """Two layers of SmolLM2-135M: without gradients by 8 to 4,096 tokens, then a forward and backward of 512."""
    torch.manual_seed(0)
    size: Any = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=1, **size))
    mlp: Any = base_of(with_adapter(model, lora(_RANK, 2 * _RANK, None), "adapter")).model.layers[0].mlp
    for layer in (mlp.up_proj, mlp.down_proj):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        outs, width = layer.base_layer.weight.shape
        by_rank = layer.forward
        use_faster_way(layer)
        for rows in (8, 64, 256, 512, 1024, 4096):
            inputs = torch.randn(rows, width)
            ways = {"rank r": _without_gradient(by_rank, inputs), "merged": _without_gradient(_merged(layer), inputs)}
            way = "merged" if is_faster_merged(rows, outs, width) else "rank r"
            yield _case("forward", layer, rows, f"chosen: {way}", _without_gradient(layer.forward, inputs), ways)
        inputs = torch.randn(_TRAINED_ROWS, width, requires_grad=True)
        ways = {"merged": _step(layer, inputs, _merged_with_gradients(layer))}
        yield _case("step", layer, _TRAINED_ROWS, "rank r", _step(layer, inputs, layer.forward), ways)


def _case(
    name: str, layer: Any, rows: int, way: str, function: Callable[[], object], references: dict[str, Any]
) -> Case:
    outs, width = layer.base_layer.weight.shape
    return Case(
        kernel="lora",
        pass_name=name,
        shape=[rows, outs, width],
        bytes_moved=4 * (rows * (outs + width) + outs * width),
        result_bytes=4 * rows * outs,
        flops=2 * rows * outs * width * (1 if name == "forward" else 2),
        implementation=way,
        function=function,
        references=references,
    )


def _without_gradient(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], object]:
    return torch.inference_mode()(lambda: forward(inputs))


def _merged(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda inputs: functional.linear(inputs, merged_weight(layer))


def _merged_with_gradients(layer: Any) -> Callable[[Tensor], Any]:
    apply: Any = _Merged.apply
    return lambda inputs: apply(inputs, *_factors(layer), layer)


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _step(layer: Any, inputs: Tensor, forward: Callable[[Tensor], Any]) -> Callable[[], object]:
    output_grad = torch.randn(len(inputs), layer.base_layer.out_features)

    def run() -> None:
        for one in (inputs, *_factors(layer)):
            one.grad = None
        forward(inputs).backward(output_grad)

    return run


class _Merged(torch.autograd.Function):
    """Gradients of A and B by way of the merged weight's."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, a: Tensor, b: Tensor, layer: Any) -> Tensor:
        weight = merged_weight(layer)
        ctx.scaling = layer.scaling["default"]
        ctx.save_for_backward(inputs, weight, a, b)
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, a, b = ctx.saved_tensors
        weight_grad = output_grad.t() @ inputs
        return output_grad @ weight, ctx.scaling * (b.t() @ weight_grad), ctx.scaling * (weight_grad @ a.t()), None
