"""Sampling inside vLLM by this project's own noise, so that tokens equal those of every other engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from fuse.engines.engine import GenerationRequest
from fuse.engines.filters import row_filters, see
from fuse.ops.logit_filters import Filters, sample_filtered_tokens
from fuse.ops.sampling import sample_tokens

_KEY = "fuse"


def as_extra_args(request: GenerationRequest) -> dict[str, Any]:
    """What a vLLM request carries, as `SamplingParams.extra_args`, for its tokens to be drawn here."""
    return {_KEY: request}


@dataclass(frozen=True, slots=True)
class _Row:
    """A request in vLLM's batch. `output_ids` is vLLM's own list: it grows by each token generated here."""

    request: GenerationRequest
    output_ids: Sequence[int]

    @property
    def position(self) -> int:
        """In the response, of the next token."""
        return len(self.request.response_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and response so far."""
        return (*self.request.prompt_ids, *self.request.response_ids, *self.output_ids)

    @property
    def last_token_id(self) -> int:
        return next(ids[-1] for ids in (self.output_ids, self.request.response_ids, self.request.prompt_ids) if ids)


class CounterSampling(LogitsProcessor):  # type: ignore[misc]  # vLLM has no types
    """A logits processor that draws each row's token itself and leaves vLLM's greedy sampling no choice.

    vLLM's log-probabilities would be those of the altered logits: `drawn` has the true ones.

    num_tokens: only the first so many of the vocabulary are drawn; None for all.
    """

    num_tokens: int | None = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._keys: Tensor | None = None  # seeds, sample ids; int64 [2, rows]
        self._temperatures: Tensor | None = None
        self._filters: Filters | None = None
        self._drawn: tuple[list[int], Tensor, Tensor] | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def drawn(self) -> dict[int, tuple[int, float]]:
        """Token and log-probability that each sample drew in the last step."""
        if self._drawn is None:
            return {}
        sample_ids, tokens, logprobs = self._drawn
        # One transfer to the host: float64 holds token ids and fp32 exactly.
        token_ids, values = torch.stack((tokens.double(), logprobs.double())).tolist()
        return {
            sample_id: (int(token_id), logprob)
            for sample_id, token_id, logprob in zip(sample_ids, token_ids, values, strict=True)
        }

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            rows[index] = _Row(params.extra_args[_KEY], output_ids)
        for first, second, direction in batch_update.moved:
            moved, replaced = rows.pop(first), rows.pop(second, None)
            rows[second] = moved
            if direction == MoveDirectionality.SWAP:
                assert replaced is not None
                rows[first] = replaced
        self._keys = None

    def apply(self, logits: Tensor) -> Tensor:
        rows = [self._rows[index] for index in range(len(logits))]
        allowed = logits[:, : self.num_tokens]
        if self._keys is None or self._temperatures is None:
            params = [row.request.params for row in rows]
            keys = [[one.seed for one in params], [row.request.sample_id for row in rows]]
            self._keys = torch.tensor(keys, dtype=torch.int64, device=self._device)
            self._temperatures = torch.tensor([one.temperature for one in params], device=self._device)
            token_ids = (row.token_ids for row in rows)
            self._filters = row_filters(params, token_ids, allowed.shape[1], self._device)
        positions = torch.tensor([row.position for row in rows], device=self._device)
        how = self._temperatures, self._keys[0], self._keys[1], positions
        if self._filters is None:
            tokens, logprobs = sample_tokens(allowed, *how)
        else:
            see(self._filters, torch.tensor([[row.last_token_id] for row in rows], device=self._device))
            tokens, logprobs = sample_filtered_tokens(allowed, *how, self._filters)
        if (group := get_tp_group()).world_size > 1:  # sums may be rounded otherwise elsewhere
            tokens = group.broadcast(tokens.contiguous())
        self._drawn = [row.request.sample_id for row in rows], tokens, logprobs
        return logits.zero_().scatter_(1, tokens.unsqueeze(1), 1.0)
