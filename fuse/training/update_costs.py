"""Measures what follows a step's last micro-batch: the sum of replicas' gradients, and the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fuse.intrastage.communication import all_reduce_sum
from fuse.intrastage.opposite import UpdateCosts

_NUM_PARAMETERS = 1 << 20
"""More than caches hold."""
_REPEATS = 5


def measure_update_costs(world_size: int, device: torch.device) -> UpdateCosts:
    """Seconds per parameter here, the least of several; all devices of the world call this at once.

    On CPUs, where samples are generated on the same cores meanwhile, of this process's own time, as operations are
    measured; by the wall's the exchange, which waits for peers, would count for several times what it takes.

    A sum of all devices moves 2 (n - 1) / n as many bytes of each as one of two, and is taken to last as much longer.
    """
    parameter = torch.zeros(_NUM_PARAMETERS, device=device, requires_grad=True)
    gradient = torch.ones(_NUM_PARAMETERS, device=device)
    optimizer = torch.optim.AdamW([parameter], fused=True)

    def step() -> None:
        parameter.grad = gradient
        torch._foreach_norm([gradient])
        torch._foreach_mul_([gradient], 1.0)
        optimizer.step()

    summed = torch.zeros(_NUM_PARAMETERS, device=device)

    def exchange() -> None:
        flat = summed.clone()
        all_reduce_sum(flat, None, "gradients, to measure it")
        summed.copy_(flat)

    exchange_s = _least_s(exchange, device) / (2 * (world_size - 1) / world_size)
    return UpdateCosts(_least_s(step, device) / _NUM_PARAMETERS, exchange_s / _NUM_PARAMETERS)


def _least_s(function: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + _REPEATS):  # the first warms up
        start_s = _now_s(device)
        function()
        seconds.append(_now_s(device) - start_s)
    return min(seconds[1:])


def _now_s(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
