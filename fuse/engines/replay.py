"""The replay engine: re-emits recorded responses. Deterministic, model-free, batches like a real engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fuse.engines.engine import (
    Evicted,
    GeneratedToken,
    GenerationRequest,
    already_present,
    asleep,
    not_idle,
    not_present,
    still_live,
)
from fuse.engines.kv_memory import Allocate
from fuse.state_dict import Weights, WeightStream

Recording = tuple[Sequence[int], Sequence[float]]


class ReplayEngine:
    """Emits `recordings[sample_id]` = (response ids, log-probabilities), one token per step and sample.

    A response ends where its recording ends. The stop token has no effect, so recordings that go on after it, as a
    padded generation does, are replayed in full.
    """

    def __init__(self, recordings: Mapping[int, Recording], *, max_batch: int = 64) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}: an engine runs at least one sample")
        for sample_id, (response_ids, logprobs) in recordings.items():
            if not response_ids or len(response_ids) != len(logprobs):
                raise ValueError(
                    f"the recording of sample {sample_id} has {len(response_ids)} tokens and {len(logprobs)} "
                    "log-probabilities: it needs one per token, and at least one"
                )
        self._recordings = recordings
        self._max_batch = max_batch
        self._requests: dict[int, GenerationRequest] = {}  # in order of submission: the first max_batch are running
        self._num_generated: dict[int, int] = {}
        self._is_asleep = False

    @property
    def kv_capacity_tokens(self) -> None:
        """It has room for all that its samples need."""
        return None

    def submit(self, request: GenerationRequest) -> None:
        sample_id = request.sample_id
        if self._is_asleep:
            raise asleep(sample_id)
        if sample_id in self._requests:
            raise already_present(sample_id)
        if sample_id not in self._recordings:
            raise ValueError(f"sample {sample_id} was not recorded: replay knows {len(self._recordings)} samples")
        response_ids, _ = self._recordings[sample_id]
        num_generated = len(request.response_ids)
        if len(response_ids) > request.params.max_new_tokens:
            raise ValueError(
                f"the recording of sample {sample_id} has {len(response_ids)} tokens, more than "
                f"max_new_tokens={request.params.max_new_tokens}: cut the recording or raise the limit"
            )
        if tuple(response_ids[:num_generated]) != request.response_ids or num_generated == len(response_ids):
            raise ValueError(
                f"sample {sample_id} comes with {num_generated} tokens that are not a proper beginning of its "
                "recording: replay cannot continue it"
            )
        self._requests[sample_id] = request
        self._num_generated[sample_id] = num_generated

    def step(self) -> list[GeneratedToken]:
        running = list(self._requests)[: self._max_batch]
        return [self._emit(sample_id) for sample_id in running]

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        if sample_id not in self._requests:
            raise not_present(sample_id)
        request = self._requests.pop(sample_id)
        num_generated = self._num_generated.pop(sample_id)
        response_ids, logprobs = self._recordings[sample_id]
        return Evicted(
            replace(
                request,
                response_ids=tuple(response_ids[:num_generated]),
                logprobs=tuple(logprobs[:num_generated]),
            )
        )

    def admit(self, evicted: Evicted) -> None:
        self.submit(evicted.request)

    def sleep(self) -> None:
        """Nothing is held that could be freed."""
        if self._requests:
            raise not_idle(len(self._requests))
        self._is_asleep = True

    def load_weights(self, weights: Weights) -> None:
        """Recorded tokens depend on no weights: any are taken and none kept."""
        if self._requests:
            raise still_live(len(self._requests))
        self._is_asleep = True
        for _ in WeightStream.of(weights).tensors:
            pass
        self._is_asleep = False

    def close(self) -> None:
        self._requests.clear()
        self._num_generated.clear()

    def _emit(self, sample_id: int) -> GeneratedToken:
        response_ids, logprobs = self._recordings[sample_id]
        position = self._num_generated[sample_id]
        finished = position + 1 == len(response_ids)
        if finished:
            del self._requests[sample_id], self._num_generated[sample_id]
        else:
            self._num_generated[sample_id] = position + 1
        return GeneratedToken(sample_id, response_ids[position], logprobs[position], finished)
