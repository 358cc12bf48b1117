"""The vLLM engine: vLLM, stepped inside this process, with this project's sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.engines.engine import (
    Evicted,
    GeneratedToken,
    GenerationRequest,
    SamplingParams,
    already_present,
    asleep,
    not_idle,
    not_present,
    still_live,
)
from fuse.engines.kv_memory import Allocate
from fuse.engines.limits import check_logprob, check_request, choose_context
from fuse.engines.lockstep import Follower, Leader, Place
from fuse.engines.vllm_setup import require_own_process, require_vllm, starting_vllm
from fuse.state_dict import WeightLayout, Weights, WeightStream

if TYPE_CHECKING:
    from fuse.engines.vllm_core import VllmCore
    from fuse.engines.vllm_shared import FollowingCore, LeadingCore

# Decoded when an engine starts, and compared with the model: one token, and several.
_CHECKED_PROMPTS = ((1,), (2, 3, 5, 7))


@dataclass(slots=True)
class _Live:
    """A sample in the engine; `internal_id` is vLLM's name of it, new each time that it enters."""

    request: GenerationRequest
    response_ids: list[int]
    logprobs: list[float]
    internal_id: str

    def append(self, token: GeneratedToken) -> None:
        check_logprob(token.sample_id, len(self.response_ids), token.logprob)
        self.response_ids.append(token.token_id)
        self.logprobs.append(token.logprob)

    def to_request(self) -> GenerationRequest:
        return replace(self.request, response_ids=tuple(self.response_ids), logprobs=tuple(self.logprobs))


class VllmEngine:
    """A `GenerationEngine` that serves `model` by vLLM, on vLLM's device (CUDA or CPU) and in the model's dtype.

    vLLM runs in the calling process and takes it over: it owns torch.distributed's default group and seeds the random
    generators. So one engine per process, and no training in it.

    The model is only read: its weights are copied. A short prompt is decoded both ways to see that vLLM computes the
    same.

    device: "cuda" or "cpu", to refuse a vLLM that was built for the other; by default either will do.
    max_batch: the most samples that run side by side.
    max_context: the most tokens of prompt and response together; by default what the model's positions allow.
    num_tokens: that a response may consist of, the first of the vocabulary; by default all.
    max_prefill_tokens: the most tokens prefilled in one step, beside the one of each running sample. A longer prompt
        takes several steps.
    kv_cache_bytes: memory for keys and values, allocated at once, on all of an engine's devices together; by default
        for a full batch of full context, at most a quarter of each device's memory. Where it runs short, vLLM puts
        samples off and computes them again.
    leader: of the processes of other devices that share the engine, which `follow`; ends with the engine.

    KV travels between vLLM engines of the same model, as whole blocks of each layer; but not of shared ones.

    Raises: ValueError when vLLM is not installed, does not serve this model or does so with other results, when the
        process already uses torch.distributed, and for limits that cannot be met.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: str | None = None,
        max_batch: int = 64,
        max_context: int | None = None,
        num_tokens: int | None = None,
        max_prefill_tokens: int = 2048,
        kv_cache_bytes: int | None = None,
        leader: Leader | None = None,
    ) -> None:
        require_vllm()
        require_own_process()
        limits = {"max_batch": max_batch, "max_prefill_tokens": max_prefill_tokens, "kv_cache_bytes": kv_cache_bytes}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self._max_context = choose_context(model, max_context)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._layout = WeightLayout.of(model)
        self._live: dict[int, _Live] = {}
        expected = _first_logprobs(
            model, self._vocab_size, num_tokens
        )  # before vLLM replaces parts of some of its classes
        with ExitStack() as on_failure:
            if leader is not None:
                on_failure.callback(leader.close)
            core = _start(
                model,
                None if leader is None else leader.place,
                device=device,
                max_batch=max_batch,
                max_context=self._max_context,
                num_tokens=num_tokens,
                max_prefill_tokens=max_prefill_tokens,
                kv_cache_bytes=kv_cache_bytes,
            )
            on_failure.callback(core.close)
            self._core: VllmCore | LeadingCore = core
            if leader is not None:
                from fuse.engines.vllm_shared import LeadingCore

                self._core = LeadingCore(core, leader)
            self.load_weights(model.state_dict())
            self._check_decoding(type(model).__name__, model.dtype, expected)
            on_failure.pop_all()

    @property
    def kv_capacity_tokens(self) -> int:
        """What the blocks of vLLM's cache hold."""
        return self._core.kv_capacity_tokens

    def submit(self, request: GenerationRequest) -> None:
        self.admit(Evicted(request))

    def admit(self, evicted: Evicted) -> None:
        request = evicted.request
        if self._core.is_asleep:
            raise asleep(request.sample_id)
        if request.sample_id in self._live:
            raise already_present(request.sample_id)
        check_request(request, max_context=self._max_context, vocab_size=self._vocab_size)
        internal_id = self._core.add(evicted)
        self._live[request.sample_id] = _Live(request, list(request.response_ids), list(request.logprobs), internal_id)

    def step(self) -> list[GeneratedToken]:
        generated: list[GeneratedToken] = []
        while self._live and not generated:  # a step that only prefills a part of a long prompt has none
            generated = self._core.step()
        for token in generated:
            self._live[token.sample_id].append(token)
            if token.finished:
                del self._live[token.sample_id]
        return generated

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        if sample_id not in self._live:
            raise not_present(sample_id)
        live = self._live[sample_id]
        kv = self._core.read_kv(live.internal_id, allocate) if with_kv else None
        del self._live[sample_id]
        self._core.abort(live.internal_id)
        return Evicted(live.to_request(), kv)

    def sleep(self) -> None:
        """Free keys, values and weights. On CPUs weights stay that vLLM has packed in a form of its own."""
        if self._live:
            raise not_idle(len(self._live))
        self._core.sleep()

    def load_weights(self, weights: Weights) -> None:
        """Copy new weights, cast to the model's dtype. A tied tensor may come under either of its names."""
        if self._live:
            raise still_live(len(self._live))
        stream = WeightStream.of(weights)
        self._layout.check(stream)
        self._core.load_weights(self._layout.under_all_names(stream.tensors))

    def close(self) -> None:
        self._live.clear()
        self._core.close()

    def _check_decoding(self, model_name: str, dtype: torch.dtype, expected: Tensor) -> None:
        """Compare a token of each prompt with the model's own log-probabilities, [prompts, vocab]."""
        params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=1)
        for sample_id, prompt_ids in enumerate(_checked_prompts(self._vocab_size)):
            self.submit(GenerationRequest(sample_id=sample_id, prompt_ids=prompt_ids, params=params))
        tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.5
        while generated := self.step():
            for token in generated:
                difference = abs(token.logprob - float(expected[token.sample_id, token.token_id]))
                if not difference <= tolerance:
                    raise ValueError(
                        f"vLLM computes {model_name} otherwise than transformers: log-probabilities differ by "
                        f"{difference:.3g}, more than {tolerance}; use the transformers engine for this model"
                    )


def follow(
    follower: Follower,
    make_model: Callable[[], PreTrainedModel],
    next_weights: Callable[[], Iterable[tuple[str, Tensor]]],
    *,
    max_context: int | None = None,
    max_prefill_tokens: int = 2048,
    **limits: Any,
) -> None:
    """Do as a `VllmEngine` of the same model and limits that leads, until it is closed.

    make_model: called once; the model is only read, and not for long. next_weights: gives what is loaded next.

    Raises: as `VllmEngine`.
    """
    require_vllm()
    require_own_process()

    def make(place: Place) -> FollowingCore:
        model = make_model()
        layout, first = WeightLayout.of(model), [model.state_dict().items()]
        context = choose_context(model, max_context)
        core = _start(model, place, max_context=context, max_prefill_tokens=max_prefill_tokens, **limits)
        from fuse.engines.vllm_shared import FollowingCore

        return FollowingCore(core, lambda: layout.under_all_names(first.pop() if first else next_weights()))

    follower.follow(make)


def _start(model: PreTrainedModel, place: Place | None, **options: Any) -> VllmCore:
    """vLLM in this process. options: of `VllmCore`."""
    with starting_vllm() as directory:
        from fuse.engines.vllm_core import VllmCore

        return VllmCore(model, directory, place=place, **options)


def _checked_prompts(vocab_size: int) -> list[tuple[int, ...]]:
    return [tuple(token % vocab_size for token in prompt_ids) for prompt_ids in _CHECKED_PROMPTS]


@torch.inference_mode()
def _first_logprobs(model: PreTrainedModel, vocab_size: int, num_tokens: int | None) -> Tensor:
    """The model's log-probabilities of the token after each checked prompt, float32 [prompts, num_tokens]."""
    plain: Any = model
    rows = []
    for prompt_ids in _checked_prompts(vocab_size):
        input_ids = torch.tensor([prompt_ids], device=model.device)
        rows.append(plain(input_ids, use_cache=False).logits[0, -1, :num_tokens].float().log_softmax(0).cpu())
    return torch.stack(rows)
