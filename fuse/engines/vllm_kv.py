"""Keys and values that come to vLLM with a request, from the engine that the sample left; and leave with it.

vLLM asks a connector how much of a request's KV is to be had elsewhere, allocates blocks for it, and has the connector
fill them before the next forward pass. It makes two connectors: the scheduler's knows requests and blocks, the worker's
the memory. KV travels as whole blocks of each layer, [blocks, ...]: how a block is laid out inside is the attention
backend's business, and the same in every engine of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from fuse.engines.kv_memory import Allocate, num_bytes, views


@dataclass(frozen=True, slots=True)
class _Load:
    """KV to copy into blocks of the cache, block by block."""

    kv: tuple[Tensor, ...]
    blocks: Sequence[int]


@dataclass
class _Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types
    """What the scheduler's connector tells the worker's before a step."""

    loads: list[_Load] = field(default_factory=list)


class MigrationConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads what requests bring, before their first step."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._arriving: dict[str, tuple[Tensor, ...]] = {}
        self._loads: list[_Load] = []
        self.caches: tuple[Tensor, ...] = ()

    @classmethod
    def config(cls) -> KVTransferConfig:
        """What makes vLLM use it."""
        return KVTransferConfig(kv_connector=cls.__name__, kv_connector_module_path=cls.__module__, kv_role="kv_both")

    # The scheduler's side

    def expect(self, request_id: str, kv: tuple[Tensor, ...]) -> None:
        """A request that has not run yet brings the KV of its prompt, but for the last token."""
        self._arriving[request_id] = kv

    def expected(self, request_id: str) -> tuple[Tensor, ...] | None:
        """What a request brought, as long as it has not run."""
        return self._arriving.get(request_id)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id not in self._arriving:
            return 0, False
        return max(0, request.num_prompt_tokens - 1 - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        kv = self._arriving.pop(request.request_id, None)  # once: preempted, it is computed again
        if kv is None or not num_external_tokens:
            return
        first = (request.num_prompt_tokens - 1 - num_external_tokens) // self._block_tokens
        (block_ids,) = blocks.get_block_ids()
        self._loads.append(_Load(tuple(layer[first:] for layer in kv), block_ids[first : len(kv[0])]))

    def build_connector_meta(self, scheduler_output: Any) -> _Loads:
        loads, self._loads = self._loads, []
        return _Loads(loads)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._arriving.pop(request.request_id, None)
        return False, None

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.caches = tuple(kv_caches.values())

    def read(self, blocks: Sequence[int], allocate: Allocate | None = None) -> tuple[Tensor, ...]:
        """A copy of these blocks of every layer, on the host, or in the memory that `allocate` gives."""
        index = torch.tensor(blocks)
        if allocate is None:
            return tuple(cache[index.to(cache.device)].cpu() for cache in self.caches)
        layout = [(cache.dtype, (len(blocks), *cache.shape[1:])) for cache in self.caches]
        kv = views(allocate(num_bytes(layout)), layout)
        for cache, layer in zip(self.caches, kv, strict=True):
            torch.index_select(cache, 0, index.to(cache.device), out=layer)
        return kv

    def fits(self, kv: Sequence[Tensor], num_tokens: int) -> bool:
        """Whether KV is that of so many tokens, in blocks like ours."""
        num_blocks = -(-num_tokens // self._block_tokens)
        return [(layer.dtype, layer.shape) for layer in kv] == [
            (cache.dtype, (num_blocks, *cache.shape[1:])) for cache in self.caches
        ]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            index = torch.tensor(load.blocks)
            for cache, layer in zip(self.caches, load.kv, strict=True):
                cache[index.to(cache.device)] = layer.to(cache.device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
