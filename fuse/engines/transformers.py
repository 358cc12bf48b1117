"""The embedded engine: continuous batching over a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.engines.attention import use_slot_attention
from fuse.engines.captured_decode import CapturedSteps
from fuse.engines.decoder import Decoder
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
from fuse.engines.few_rows import use_few_rows
from fuse.engines.kv_memory import Allocate
from fuse.engines.limits import check_request, choose_context
from fuse.engines.rows import Rows
from fuse.engines.slot_cache import SlotCache, round_up
from fuse.engines.speculation import Speculation, SpeculationKind, choose_speculation
from fuse.state_dict import WeightLayout, Weights, WeightStream, adopt_tensors, release_weights
from fuse.storages import Storages


class TransformersEngine:
    """A `GenerationEngine` around `model`, on the model's device and in its dtype; it takes the model over.

    Each step first fills free slots from the queue (all tokens but the last go into the cache: prefilled, or copied
    from the KV that came along), then feeds one token per live row and samples the next. A new sample whose prompt is
    in a slot already, or comes in at the same time, has it copied from there.

    max_batch: slots, the most samples that run side by side.
    max_context: the most tokens of prompt and response together; by default what the model's positions allow.
    num_tokens: that a response may consist of, the first of the vocabulary; by default all.
    max_prefill_tokens: the most tokens prefilled in one step, so that admission does not stall the running rows.
        A longer prompt is prefilled alone; one that is copied counts for nothing.
    captures_decode: decode steps are CUDA graphs where that pays; not run on a GPU yet, so not by default.
    speculation: what drafts tokens, as many as pay, for a step of several: "int8" or "int4", the model itself with such
        matrices; "ngram", the texts of the prompt; "auto", "int8" where it is native code in one call, else "ngram".
    frozen: names of weights that stay as they are: later ones come without them, and sleep keeps them, on the host.

    In fp32 a sample's tokens do not depend on the batch. Below fp32 the order of rounding does, so they may.

    Raises: ValueError for limits the model cannot serve, and for models whose cached decoding differs from their
        plain forward: a short sample is decoded both ways.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch: int = 64,
        max_context: int | None = None,
        num_tokens: int | None = None,
        max_prefill_tokens: int = 2048,
        captures_decode: bool = False,
        speculation: SpeculationKind = "off",
        frozen: Collection[str] = (),
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if captures_decode and model.device.type != "cuda":
            raise ValueError(f"captures_decode: the model is on {model.device}, and graphs are CUDA's: leave it out")
        self._captured = CapturedSteps() if captures_decode else None
        self._max_context = check_context(model, max_context)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._max_batch = max_batch
        self._max_prefill_tokens = max_prefill_tokens
        self._model = model.eval()
        has_slot_attention = use_slot_attention(model)
        if model.device.type == "cpu" and speculation != "off":
            use_few_rows(model)  # which rounds otherwise, as steps that verify drafts do anyway
        self._cache = SlotCache(max_rows=max_batch, max_context=self._max_context, device=model.device)
        self._decoder = Decoder(model, self._cache, has_slot_attention=has_slot_attention, num_tokens=num_tokens)
        self._positions = torch.arange(round_up(self._max_context), device=model.device)
        self._rows = Rows(max_batch, model.device)
        self._queue: dict[int, Evicted] = {}  # by sample id, in order of submission
        self._is_asleep = False
        self._frozen, self._kept = frozenset(frozen), Storages()
        self._speculation: Speculation | None = None  # until it is seen to decode without
        self._check_that_it_decodes()
        self._speculation = choose_speculation(speculation, self._decoder)

    @property
    def kv_capacity_tokens(self) -> None:
        """It has room for all that its samples need."""
        return None

    def submit(self, request: GenerationRequest) -> None:
        self.admit(Evicted(request))

    def admit(self, evicted: Evicted) -> None:
        request = evicted.request
        if self._is_asleep:
            raise asleep(request.sample_id)
        if request.sample_id in self._queue or request.sample_id in self._rows:
            raise already_present(request.sample_id)
        check_request(request, max_context=self._max_context, vocab_size=self._vocab_size)
        if evicted.kv is not None and evicted.kv[0].shape[1] != request.num_tokens - 1:
            raise ValueError(
                f"sample {request.sample_id} has {request.num_tokens} tokens but brings the KV of "
                f"{evicted.kv[0].shape[1]}: it must cover all but the last; admit it without KV to recompute"
            )
        self._queue[request.sample_id] = evicted

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        self._fill_slots()
        if not len(self._rows):
            return []
        generated = self._generate()
        # From the back: the last row, which fills a freed slot, is then never a finished one itself.
        for row in reversed([self._rows.index(token.sample_id) for token in generated if token.finished]):
            self._remove(row)
        return generated

    @torch.inference_mode()
    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        if sample_id in self._queue:
            evicted = self._queue.pop(sample_id)
            return evicted if with_kv else Evicted(evicted.request)
        if sample_id not in self._rows:
            raise not_present(sample_id)
        index = self._rows.index(sample_id)
        row = self._rows[index]
        kv = self._cache.read(index, row.num_cached, allocate) if with_kv else None
        request = row.to_request()
        self._remove(index)
        return Evicted(request, kv)

    def sleep(self) -> None:
        """Free keys, values and weights. Buffers stay: they are no weights, and few; and on a host what is frozen."""
        if self._num_samples:
            raise not_idle(self._num_samples)
        self._is_asleep = True
        self._clear_cache()
        release_weights(self._model, kept=self._frozen)
        if self._model.device.type == "cuda":
            frozen = [one for name, one in self._model.named_parameters() if name in self._frozen]
            self._kept.release(frozen, keep_bits=True)

    def load_weights(self, weights: Weights) -> None:
        """Take new weights; a tied tensor may come under either of its names. See `adopt_state_dict`."""
        if self._num_samples:
            raise still_live(self._num_samples)
        stream = WeightStream.of(weights)
        WeightLayout.of(self._model).check(stream, kept=self._frozen)
        self._is_asleep = True
        self._kept.restore()
        self._forget()
        adopt_tensors(self._model, stream.tensors)
        self._is_asleep = False

    @property
    def _num_samples(self) -> int:
        return len(self._rows) + len(self._queue)

    def close(self) -> None:
        self._queue.clear()
        self._rows = Rows(0, self._model.device)
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._forget()
        self._cache.clear()

    def _forget(self) -> None:
        """What was made of weights and cache, which are going to change."""
        self._decoder.forget()
        if self._captured is not None:
            self._captured.clear()
        if self._speculation is not None:
            self._speculation.draft.forget()

    def _fill_slots(self) -> None:
        """Give free slots to the queue's first samples, within the prefill budget."""
        computed: list[GenerationRequest] = []
        shared: list[GenerationRequest] = []
        for evicted, is_shared in self._next_samples():
            request = evicted.request
            del self._queue[request.sample_id]
            if evicted.kv is not None:
                self._cache.write(len(self._rows), evicted.kv, dtype=self._model.dtype)
                self._rows.extend([request])
            else:
                (shared if is_shared else computed).append(request)
        for requests in _batches_by_length(computed):
            self._prefill(requests)
            self._rows.extend(requests)
        self._share(shared)

    def _next_samples(self) -> list[tuple[Evicted, bool]]:
        """The queue's first that find a slot within the budget, and whether their prompts are in another's slot."""
        if not self._queue:
            return []
        chosen: list[tuple[Evicted, bool]] = []
        num_free, budget = self._max_batch - len(self._rows), self._max_prefill_tokens
        prompts = {row.request.prompt_ids for row in self._rows}
        for evicted in self._queue.values():
            request = evicted.request
            is_shared = not request.response_ids and request.prompt_ids in prompts
            cost = 0 if is_shared or evicted.kv is not None else request.num_tokens - 1
            if len(chosen) == num_free or (cost > budget and chosen):
                break
            chosen.append((evicted, is_shared))
            prompts.add(request.prompt_ids)
            budget -= cost
        return chosen

    def _share(self, requests: Sequence[GenerationRequest]) -> None:
        """Copy the prompts of new rows, but for their last token, from rows that have them."""
        siblings: dict[tuple[int, ...], list[GenerationRequest]] = {}
        for request in requests:
            siblings.setdefault(request.prompt_ids, []).append(request)
        row_of = {row.request.prompt_ids: index for index, row in enumerate(self._rows)} if siblings else {}
        for prompt_ids, group in siblings.items():
            num_tokens = len(prompt_ids) - 1
            self._cache.copy(row_of[prompt_ids], len(self._rows), len(group), num_tokens)
            self._rows.extend(group, shared_tokens=num_tokens)

    def _prefill(self, requests: Sequence[GenerationRequest]) -> None:
        """Cache all tokens but the last of new rows, right-padded: what pads writes, later tokens overwrite."""
        width = max(request.num_tokens for request in requests) - 1
        if width == 0:
            return
        padded = [(*request.prompt_ids, *request.response_ids)[:-1] for request in requests]
        input_ids = torch.tensor([ids + (0,) * (width - len(ids)) for ids in padded], device=self._model.device)
        self._cache.begin_prefill(len(self._rows), len(requests), width)
        self._model.base_model(
            input_ids=input_ids,
            position_ids=self._positions[:width].expand(len(requests), width),
            past_key_values=self._cache,
            use_cache=True,
        )

    def _generate(self) -> list[GeneratedToken]:
        """One token of each row, and what drafts got right beside it."""
        if self._speculation is None:
            return self._rows.sample(self._decode())
        drafts = self._speculation.propose(self._rows)
        generated = self._verify(drafts) if any(drafts) else self._rows.sample(self._decode())
        self._speculation.learn(generated)
        first = replace(
            generated[0],
            draft_s=self._speculation.proposing_s,
            drafted_in_window=self._speculation.draft.reads_window,
        )
        return [first, *generated[1:]]

    def _verify(self, drafts: Sequence[Sequence[int]]) -> list[GeneratedToken]:
        context = round_up(max(row.num_cached + 1 + len(draft) for row, draft in zip(self._rows, drafts, strict=True)))
        verification = self._rows.verification(drafts)
        return self._rows.verify(self._decoder.logits(verification.inputs, context, len(self._rows)), verification)

    def _decode(self) -> Tensor:
        """Feed every row's last token; the logits of the next one, [rows, vocab]."""
        context = round_up(max(row.num_cached for row in self._rows) + 1)
        step = partial(self._decoder.logits, self._rows.inputs, context, len(self._rows))
        if self._captured is None:
            return step()
        return self._captured.run((len(self._rows), context, self._cache.num_allocations), step)

    def _check_that_it_decodes(self) -> None:
        """Raises: ValueError for a model with which a short decoding fails, by whatever error, or goes wrong."""
        try:
            self._check_decoding()
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{type(self._model).__name__} does not decode from slots ({reason}): use another engine for this model"
            ) from error

    @torch.inference_mode()
    def _check_decoding(self) -> None:
        """Decode two samples side by side and compare with the plain forward; leaves no trace."""
        params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=3)
        prompts = ((1 % self._vocab_size,), tuple(token % self._vocab_size for token in (2, 3, 5, 7)))
        for sample_id, prompt_ids in enumerate(prompts):
            self.submit(GenerationRequest(sample_id=sample_id, prompt_ids=prompt_ids, params=params))
        tokens = [list(prompt_ids) for prompt_ids in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        while generated := self.step():
            for token in generated:
                tokens[token.sample_id].append(token.token_id)
                logprobs[token.sample_id].append(token.logprob)
        self._clear_cache()
        tolerance = 1e-3 if self._model.dtype in (torch.float32, torch.float64) else 0.5
        for prompt_ids, token_ids, decoded in zip(prompts, tokens, logprobs, strict=True):
            first = len(prompt_ids)
            input_ids = torch.tensor([token_ids], device=self._model.device)
            plain = self._model(input_ids=input_ids, use_cache=False).logits[
                0, first - 1 : -1, : self._decoder.num_tokens
            ]
            expected = plain.float().log_softmax(1).gather(1, input_ids[0, first:, None]).squeeze(1).tolist()
            difference = max(abs(one - other) for one, other in zip(decoded, expected, strict=True))
            if not difference <= tolerance:
                raise ValueError(
                    f"{type(self._model).__name__} does not decode from slots: its log-probabilities differ from a "
                    f"plain forward by {difference:.3g}, more than {tolerance}; use another engine for this model"
                )

    def _remove(self, row: int) -> None:
        if self._speculation is not None:
            self._speculation.draft.release(self._rows[row])
        last = self._rows.remove(row)
        if row != last:
            self._cache.move(last, row, self._rows[row].num_cached)


def _batches_by_length(requests: Sequence[GenerationRequest]) -> Iterator[list[GenerationRequest]]:
    """Groups of similar length, longest first. Lengths in a group share their power of two: padding at most doubles."""
    ordered = sorted(requests, key=lambda request: request.num_tokens, reverse=True)
    for _, group in groupby(ordered, key=lambda request: (request.num_tokens - 1).bit_length()):
        yield list(group)


def check_context(model: PreTrainedModel, max_context: int | None) -> int:
    """The context to serve. Raises: ValueError where the model has less, or attention that slots do not hold."""
    max_context = choose_context(model, max_context)
    config = model.config.get_text_config()
    name = type(model).__name__
    window = getattr(config, "sliding_window", None)
    declared = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    layer_types = set(declared)
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"{name} has layers of type {', '.join(sorted(unknown))}: the engine serves attention layers")
    if window is not None and window < max_context and layer_types != {"full_attention"}:
        raise ValueError(
            f"{name} attends to the last {window} tokens only, and prompts and responses may have {max_context} "
            "together: shorten prompts or lower the most tokens of a response"
        )
    return max_context
