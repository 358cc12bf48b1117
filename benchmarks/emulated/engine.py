"""A generation engine that takes its time and computes nothing, and the real worker around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.engines.engine import (
    Evicted,
    GeneratedToken,
    GenerationRequest,
    already_present,
    not_idle,
    not_present,
    still_live,
)
from fuse.interstage.speculation import Drafting
from fuse.workers.generation_worker import GenerationWorker

if TYPE_CHECKING:
    from fuse.workers.weight_inbox import WeightInbox

_FIRST_TOKEN, _NUM_TOKENS = 2, 97
"""Tokens that are not special, whose number has no factor in common with any batch: neighbours get others."""
_CHANCES = 1_000_003


@dataclass(slots=True)
class _Live:
    """A sample in the engine. is_new: its context is yet to be computed."""

    request: GenerationRequest
    response_ids: list[int] = field(default_factory=list)
    is_new: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.response_ids)


class EmulatedEngine:
    """Decodes samples to their `max_new_tokens`, as `fuse.engines.engine.GenerationEngine` says, in emulated time.

    A token follows from sample and position alone, and so does whether a draft would have been right; engines draft as
    many as are best for the batch. There is no KV: a sample that moves is computed again.
    """

    kv_capacity_tokens = None

    def __init__(self, costs: EmulatedCosts, max_batch: int, device: EmulatedDevice | None = None) -> None:
        self._costs, self._rollout, self._max_batch = costs, costs.rollout, max_batch
        self._device = device or EmulatedDevice()
        self._live: dict[int, _Live] = {}  # in order of submission: the first max_batch are running

    def submit(self, request: GenerationRequest) -> None:
        if request.sample_id in self._live:
            raise already_present(request.sample_id)
        if not self._live:
            self._device.resume()
        self._live[request.sample_id] = _Live(request, list(request.response_ids))

    def step(self) -> list[GeneratedToken]:
        running = list(self._live.values())[: self._max_batch]
        if not running:
            return []
        new = sum(sample.num_tokens for sample in running if sample.is_new)
        drafting, draft_s, model_s = self._step_s(len(running), sum(sample.num_tokens for sample in running))
        self._device.work(draft_s + model_s + (self._rollout.prefill(new) if new else 0.0))
        tokens = [token for sample in running for token in self._emit(sample, drafting)]
        if not drafting.num_drafts:
            return tokens
        return [replace(tokens[0], draft_s=draft_s, drafted_in_window=drafting.in_window), *tokens[1:]]

    def _step_s(self, batch: int, context_tokens: int) -> tuple[Drafting, float, float]:
        """How each sample is drafted for, and the seconds that drafts take, and the model."""
        costs, draft = self._rollout, self._rollout.speculation
        plain, size = costs.plain_step, (batch, context_tokens)
        drafting = Drafting(0, 0.0, plain) if draft is None else draft.best(plain, *size)
        model_s = plain.seconds(*size) + drafting.num_drafts * plain.sample_s * batch
        if not drafting.num_drafts:
            return drafting, 0.0, model_s
        return drafting, drafting.tokens * drafting.per_token.seconds(*size) - model_s, model_s

    def _emit(self, sample: _Live, drafting: Drafting) -> list[GeneratedToken]:
        """A token, after those of its drafts that are right; none is drafted beyond the response."""
        sample_id, first = sample.request.sample_id, len(sample.response_ids)
        last = sample.request.params.max_new_tokens - 1
        num_drafted = min(drafting.num_drafts, last - first)
        tokens = []
        for position in range(first, first + num_drafted + 1):
            token = _FIRST_TOKEN + (sample_id + position) % _NUM_TOKENS
            sample.response_ids.append(token)
            tokens.append(GeneratedToken(sample_id, token, 0.0, position == last))
            if not _is_drafted_right(sample_id, position, drafting.acceptance):
                break
        sample.is_new = False
        if tokens[-1].finished:
            del self._live[sample_id]
        return [replace(tokens[0], drafted_tokens=num_drafted), *tokens[1:]] if num_drafted else tokens

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Any = None) -> Evicted:
        if sample_id not in self._live:
            raise not_present(sample_id)
        sample = self._live.pop(sample_id)
        tokens = tuple(sample.response_ids)
        return Evicted(replace(sample.request, response_ids=tokens, logprobs=(0.0,) * len(tokens)))

    def admit(self, evicted: Evicted) -> None:
        self.submit(evicted.request)

    def sleep(self) -> None:
        """Nothing is held that could be freed."""
        if self._live:
            raise not_idle(len(self._live))

    def load_weights(self, weights: Any) -> None:
        """Takes as long as new weights take; none come."""
        if self._live:
            raise still_live(len(self._live))
        self._device.resume()
        self._device.work(self._costs.weights_s)

    def close(self) -> None:
        self._live.clear()


class NoKV:
    """A `fuse.workers.kv.transfer.KVTransfer` between engines that have none."""

    allocate: Any = None

    def offer(self, kv: Sequence[Any]) -> None:
        """There is no room for any."""

    def fetch(self, ref: Any) -> None:
        """None was offered."""

    def release(self, kv: Sequence[Any]) -> None:
        pass

    def recall(self) -> None:
        pass

    def close(self) -> None:
        pass


class EmulatedGenerationWorker(GenerationWorker):
    """The real worker of an emulated engine, to which weights come as nothing but the time they take.

    Decode steps are told as long as the device takes for them, however late the host is: costs are learnt from that.
    """

    def __init__(self, costs: EmulatedCosts, max_batch: int) -> None:
        device = EmulatedDevice()
        super().__init__(partial(EmulatedEngine, costs, max_batch, device), NoKV, device)

    def _take(self, shapes: Any, inbox: WeightInbox) -> None:
        def load() -> None:
            self._engine.load_weights({})
            for _ in inbox:
                pass

        self._command(load)


def _is_drafted_right(sample_id: int, position: int, acceptance: float) -> bool:
    return hash((sample_id, position)) % _CHANCES / _CHANCES < acceptance
