"""One chunk of logits: reduced to four numbers per row, or turned into its own gradient. Native code, and references.

The statistics of a row are float64: the greatest logit m, the sum of w = exp((x - m) / temperature), the sum of
w (x - m) / temperature, and the target's logit; as in kernels/tensor/linear_logprob.h.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fuse.ops.native import choose, current, queue

NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16),
}

# Below every logit; finite, so that no arithmetic on it is undefined.
LOWEST = torch.finfo(torch.float32).min


def choose_for(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """The native code if it serves logits of this type and device, and in words what serves."""
    return choose(device, dtype, NATIVE_DTYPES.get(device.type, ()), has_cuda=True)


def accumulate(logits: Tensor, targets: Tensor, first_token: int, temperature: float, statistics: Tensor) -> None:
    """Add a chunk [rows, columns] to the statistics [4, rows]."""
    native, _ = choose_for(logits.device, logits.dtype)
    if native is not None:
        with current(logits.device):
            native.accumulate_logprob(logits, targets, first_token, temperature, statistics, *queue(logits.device))
    else:
        accumulate_reference(logits, targets, first_token, temperature, statistics)


def differentiate(
    logits: Tensor, targets: Tensor, first_token: int, temperature: float, statistics: Tensor, grads: Tensor
) -> None:
    """Turn a chunk [rows, columns] into its gradient; grads [2, rows] are those of log-probabilities and entropies."""
    native, _ = choose_for(logits.device, logits.dtype)
    if native is not None:
        with current(logits.device):
            native.logprob_gradient(logits, targets, first_token, temperature, statistics, grads, *queue(logits.device))
    else:
        differentiate_reference(logits, targets, first_token, temperature, statistics, grads)


def accumulate_reference(
    logits: Tensor, targets: Tensor, first_token: int, temperature: float, statistics: Tensor
) -> None:
    """What the native code does with a chunk [rows, columns] and the statistics float64 [4, rows], in place."""
    maximum, total, moment, target = statistics
    highest = torch.maximum(maximum, logits.amax(1))
    rescale(total, moment, (maximum - highest) / temperature)
    shift = _shift(logits, highest, temperature)
    weights = shift.exp()
    total += weights.sum(1)
    moment += weights.mul_(shift).sum(1)
    maximum.copy_(highest)
    column = targets - first_token
    is_here = (column >= 0) & (column < logits.shape[1])
    found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    target.copy_(torch.where(is_here, found.double(), target))


def differentiate_reference(
    logits: Tensor, targets: Tensor, first_token: int, temperature: float, statistics: Tensor, grads: Tensor
) -> None:
    """What the native code does with a chunk [rows, columns] in place, given statistics [4, rows] and grads [2, rows].

    dx[v] = (g ([v = target] - p[v]) - h p[v] (log p[v] + entropy)) / temperature
    """
    maximum, total, moment, _ = statistics
    shift = _shift(logits, maximum, temperature)
    logprob_grad, entropy_grad = grads / temperature
    slope = -entropy_grad / total
    constant = -logprob_grad / total - slope * moment / total
    result = (shift * slope[:, None].to(shift.dtype)).add_(constant[:, None].to(shift.dtype)).mul_(shift.exp())
    column = targets - first_token
    is_here = (column >= 0) & (column < logits.shape[1])
    index = column.clamp(0, logits.shape[1] - 1)[:, None]
    result.scatter_add_(1, index, (logprob_grad * is_here)[:, None].to(result.dtype))
    logits.copy_(result)


def _shift(logits: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    """(logits - maximum) / temperature, no lower than where exp is next to nothing: -inf would become a NaN."""
    dtype = accumulation_dtype(logits.dtype)
    shift = (logits.to(dtype) - maximum[:, None].to(dtype)).div_(temperature)
    return shift.clamp_(min=-700.0 if dtype == torch.float64 else -87.0)


def rescale(total: Tensor, moment: Tensor, shift: Tensor) -> None:
    """Make sums relative to a maximum that is `shift` higher, in units of the temperature; shift <= 0."""
    moment.add_(shift * total).mul_(shift.exp())
    total.mul_(shift.exp())


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a type are added up in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
