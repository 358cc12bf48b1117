"""How a vLLM engine gives its memory back and takes it again, on either kind of device."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from fuse.engines.vllm_kv import MigrationConnector
from fuse.storages import Storages


class VllmSleep(Protocol):
    """What is freed loses its bits. Pre: no request is in the engine."""

    def sleep(self) -> None:
        """Free weights and cache. Pre: the engine is awake, but for the cache perhaps."""
        ...

    def wake_weights(self) -> None:
        """Have memory for the weights again."""
        ...

    def wake_cache(self) -> None:
        """Have memory for the cache again, if it has none."""
        ...


def sleep_of(is_cpu: bool, llm: Any, connector: MigrationConnector) -> VllmSleep:
    """The way of this device. llm: vLLM's engine."""
    return CpuSleep(llm, connector) if is_cpu else CudaSleep(llm)


class CpuSleep:
    """By the storages of tensors: vLLM itself does not sleep there. Weights stay that it has packed elsewhere."""

    def __init__(self, llm: Any, connector: MigrationConnector) -> None:
        self._llm, self._connector = llm, connector
        self._weights, self._cache = Storages(), Storages()

    def sleep(self) -> None:
        (model,) = self._llm.collective_rpc(_find_model)
        self._weights.release(model.parameters(), keep_bits=False)
        self._cache.release(self._connector.caches, keep_bits=False)

    def wake_weights(self) -> None:
        self._weights.restore()

    def wake_cache(self) -> None:
        if self._cache.are_released:
            self._cache.restore()


class CudaSleep:
    """By vLLM's sleep of level 2, which keeps addresses, and buffers such as rotary frequencies. Not run: no GPU."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._has_cache = True

    def sleep(self) -> None:
        self.wake_cache()  # vLLM counts on all or nothing being there
        self._llm.sleep(level=2)
        self._has_cache = False

    def wake_weights(self) -> None:
        self._llm.wake_up(["weights"])

    def wake_cache(self) -> None:
        if not self._has_cache:
            self._llm.wake_up(["kv_cache"])
            self._has_cache = True


def _find_model(worker: Any) -> nn.Module:
    model: nn.Module = worker.model_runner.get_model()
    return model
