"""How a linear layer with a LoRA adapter computes where no gradient is wanted: in few passes, or merged as it goes.

Through the adapter each row takes r (in + out) multiplications, which is little, and passes over activations of in and
out, which is more; of those PEFT's own forward takes twice as many as must be. A weight W0 + scaling * B A made for the
call takes passes over W0 and r multiplications of each of its entries, however many rows there are. So many rows are
faster merged, and few by rank r.

With gradients it is PEFT's forward, by rank r: those of A and B by way of a merged weight are B^T dW and dW A^T, and dW
is a product as large as the layer's own. So it is in narrower types than float32, in which what is merged would be
rounded to the steps of W0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fuse.merged_weight import merged_weight

_WEIGHT_PASSES = 3.5
"""Over W0, in passes over activations: what merging takes. `fuse bench kernels --kernels lora` shows both ways."""


def use_faster_way(layer: Any) -> None:
    """Have PEFT's layer around a linear one compute by whichever is faster, where no gradient is wanted."""
    layer.forward = partial(_forward, layer)


def is_faster_merged(num_rows: int, outs: int, width: int) -> bool:
    """Of a layer [outs, width] without gradients. By rank r: two passes over what comes out, one over what comes in."""
    return num_rows * (2 * outs + width) > _WEIGHT_PASSES * outs * width


def _forward(layer: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight
    is_float32 = weight.dtype == inputs.dtype == torch.float32 and not torch.is_autocast_enabled(inputs.device.type)
    output: Tensor
    if not is_float32 or layer.disable_adapters or layer.merged or torch.is_grad_enabled():
        output = type(layer).forward(layer, inputs, *args, **kwargs)
    elif is_faster_merged(inputs.numel() // inputs.shape[-1], *weight.shape):
        output = functional.linear(inputs, merged_weight(layer), layer.base_layer.bias)
    else:
        output = layer.base_layer(inputs)
        rows = output.view(-1, output.shape[-1])
        for name in (name for name in layer.active_adapters if name in layer.lora_A):
            narrow = layer.lora_A[name](inputs).view(len(rows), -1)
            rows.addmm_(narrow, layer.lora_B[name].weight.t(), alpha=layer.scaling[name])
    return output
