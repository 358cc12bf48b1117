"""The process that owns a generation engine and steps it, whatever the controller is doing meanwhile."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fuse.engines.engine import Evicted, GeneratedToken, GenerationEngine, GenerationRequest
from fuse.memory_use import usage_spans
from fuse.trace import Clock, Span, SpanRecorder, now_s
from fuse.workers.step_sizes import step_sizes
from fuse.workers.unreported import Unreported
from fuse.workers.weight_inbox import WeightInbox
from fuse.workers.weight_taker import WeightTaker

if TYPE_CHECKING:  # torch is imported by what computes: a worker whose engine does not has a light process
    import torch
    from torch import Tensor

    from fuse.workers.kv.transfer import KVRef, KVTransfer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """A sample's tokens since the last poll: those from `position` of its response on.

    The position makes it safe to apply a report late: tokens already known from elsewhere are overwritten by the same.
    """

    sample_id: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Departure:
    """A sample that left an engine, on its way to another; its KV, if any, waits to be fetched."""

    request: GenerationRequest
    kv: KVRef | None = None


class _Closed(RuntimeError):
    """By which an engine ends that still waits for weights."""


class GenerationWorker(WeightTaker):
    """Steps an engine in a thread of its own, which waits only when the engine is empty.

    Commands take effect between two steps. An exception of the engine ends the thread, and every later call raises it.

    make_kv_transfer: carries the KV of samples that move; the same for all engines between which they do.
    clock: tells when decode steps begin and end; by default the host's, for a step is over when it returns.
    """

    concurrent_methods: ClassVar[frozenset[str]] = frozenset({"poll"})

    def __init__(
        self,
        make_engine: Callable[[], GenerationEngine],
        make_kv_transfer: Callable[[], KVTransfer],
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self._engine = make_engine()
        self._kv_transfer = make_kv_transfer()
        self._fetched: dict[int, tuple[Tensor, ...]] = {}  # KV, until the engine has copied it
        self._recorder = SpanRecorder(clock)
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._samples: dict[int, Unreported] = {}  # live ones, and finished ones until they are reported
        self._num_live = 0
        self._num_entering = 0  # samples of commands that the loop has not come to
        self._changed = threading.Condition()  # guards what the loop shares with poll: samples, spans, failure
        self._has_finished = False
        self._failure: BaseException | None = None
        self._closing = False
        self._loop = threading.Thread(target=self._run, name="decode", daemon=True)
        self._loop.start()

    # Called by the controller

    def kv_capacity_tokens(self) -> int | None:
        """As of the engine."""
        return self._engine.kv_capacity_tokens

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue samples; returns at once, so what the engine objects to is raised by a later call."""
        self._expect(len(requests))
        self._command(lambda: self._enter(requests, self._engine.submit, requests))

    def admit(self, departures: Sequence[Departure]) -> None:
        """Continue samples that left another engine; returns at once, as `submit` does."""
        self._expect(len(departures))
        self._command(lambda: self._admit(departures))

    def evict(self, sample_ids: Sequence[int], with_kv: bool = False) -> list[Departure]:
        """Take samples out, between two steps; those that have finished meanwhile are left out.

        The evicted samples carry all their tokens, and no later poll reports them.
        """
        departures: list[Departure] = self._command(lambda: self._evict(sample_ids, with_kv)).result()
        return departures

    def poll(self, timeout_s: float, gather_s: float = 0.0) -> list[Progress]:
        """The tokens since the last poll, by sample: `gather_s` after a sample has finished, else after `timeout_s`.

        At once when one sample is left, for there is no more to gather that could be done without it; and when the
        engine is empty, so that no poll outlives the samples it was meant for.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_finished or self._has_ended, timeout_s)
            if self._has_finished:
                self._changed.wait_for(lambda: self._has_ended or self._num_live + self._num_entering == 1, gather_s)
            self._raise_failure()
            self._has_finished = False
            return self._take_progress()

    def sleep(self) -> None:
        """Free the memory of the engine, which must be empty, until it gets weights."""
        self._command(self._sleep).result()

    def end_weights(self) -> None:
        """The engine has got all of its weights, and works by them when this returns."""
        super().end_weights()
        self._command(lambda: None).result()

    def drain_spans(self) -> list[Span]:
        """One span per decode step, migration, sample and weight load since the last call.

        A step says what `step_sizes` does. An "admit" says of how many samples the KV was lost with the process that
        they left, or found no memory (`lost`): they are computed anew. A "sample" tells when one was in the engine
        (`sample`, of which response tokens, `first` to `tokens`) and how long it had waited (`wait_s`), and the last
        span tells memory.
        """
        with self._changed:
            self._raise_failure()
            return [*self._recorder.drain(), *usage_spans()]

    def close(self) -> None:
        """Stop stepping and close the engine; live samples are dropped, and weights that have come in part.

        Raises: what the engine has ended by.
        """
        if not self._closing:
            self._inbox.fail(_Closed("the worker is closed before its engine has got all weights"))
            with suppress(_Closed):
                self._command(self._stop).result()
            self._loop.join()
            self._closing = True
            self._engine.close()
            self._fetched.clear()
            self._kv_transfer.close()

    # The decode loop

    def _run(self) -> None:
        try:
            while not self._closing:
                self._execute_commands()
                if self._num_live:
                    start = self._recorder.mark()
                    self._publish(self._engine.step(), start)
        except BaseException as failure:  # noqa: BLE001  (the end of a thread: the next call raises it)
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
            while not self._commands.empty():
                self._commands.get()[1].set_exception(failure)

    def _execute_commands(self) -> None:
        """Execute what is queued, in order; with no sample to decode, wait until there is something."""
        while not self._closing and (not self._num_live or not self._commands.empty()):
            command, done = self._commands.get()
            try:
                result = command()
            except BaseException as failure:
                done.set_exception(failure)
                raise
            done.set_result(result)

    def _publish(self, tokens: Sequence[GeneratedToken], start: Any) -> None:
        with self._changed:
            sizes = step_sizes(tokens, self._samples)
            for token in tokens:
                sample = self._samples[token.sample_id]
                sample.add(token, start)
                self._release(token.sample_id)
                if token.finished:
                    self._has_finished = True
                    self._num_live -= 1
                    sample.record_stay(token.sample_id, self._recorder)
            end = self._recorder.mark()
            self._recorder.record("decode", "generate", ready=None, start=start, end=end, arguments=sizes)
            if self._has_finished:
                self._changed.notify_all()

    def _take_progress(self) -> list[Progress]:
        progress = []
        for sample_id, sample in list(self._samples.items()):
            if sample.token_ids:
                progress.append(Progress(sample_id, *sample.take(), sample.finished))
                if sample.finished:
                    del self._samples[sample_id]
        return progress

    # Commands, executed in the loop

    def _enter(
        self, requests: Sequence[GenerationRequest], enter: Callable[[Any], None], arguments: Sequence[Any]
    ) -> None:
        for request, argument in zip(requests, arguments, strict=True):
            enter(argument)
            has_kv = isinstance(argument, Evicted) and argument.kv is not None
            with self._changed:
                self._samples[request.sample_id] = Unreported(
                    len(request.response_ids),
                    request.num_tokens,
                    0 if has_kv else request.num_tokens,
                    prompt_tokens=len(request.prompt_ids),
                    first=len(request.response_ids),
                    entered=self._recorder.mark(),
                )
                self._num_live += 1
                self._num_entering -= 1

    def _admit(self, departures: Sequence[Departure]) -> None:
        start_s = now_s()
        arrivals, num_bytes, num_lost = [], 0, 0
        for departure in departures:
            request, ref = departure.request, departure.kv
            kv = None if ref is None else self._kv_transfer.fetch(ref)
            if ref is not None and kv is None:
                num_lost += 1
            elif ref is not None and kv is not None:
                num_bytes += ref.num_bytes
                self._fetched[request.sample_id] = kv
            arrivals.append(Evicted(request, kv))
        self._enter([one.request for one in departures], self._engine.admit, arrivals)
        self._add_transfer("admit", start_s, {"samples": len(departures), "bytes": num_bytes, "lost": num_lost})

    def _add_transfer(self, name: str, start_s: float, sizes: dict[str, object]) -> None:
        with self._changed:
            self._recorder.add(Span(name, "transfer", start_s, now_s(), sizes))

    def _evict(self, sample_ids: Sequence[int], with_kv: bool) -> list[Departure]:
        start_s = now_s()
        with self._changed:
            live = [one for one in sample_ids if one in self._samples and not self._samples[one].finished]
            departures = [self._depart(sample_id, with_kv) for sample_id in live]
            for sample_id in live:
                self._samples.pop(sample_id).record_stay(sample_id, self._recorder)
            self._num_live -= len(live)
            self._changed.notify_all()
        num_bytes = sum(one.kv.num_bytes for one in departures if one.kv is not None)
        self._add_transfer("evict", start_s, {"samples": len(departures), "bytes": num_bytes})
        return departures

    def _depart(self, sample_id: int, with_kv: bool) -> Departure:
        try:
            evicted = self._engine.evict(sample_id, with_kv=with_kv, allocate=self._kv_transfer.allocate)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            _logger.warning("no memory for the KV of sample %d, which moves without it: %s", sample_id, error)
            evicted = self._engine.evict(sample_id)
        kv = None if evicted.kv is None else self._kv_transfer.offer(evicted.kv)
        self._release(sample_id)
        return Departure(evicted.request, kv)

    def _release(self, sample_id: int) -> None:
        """The engine has copied the KV that a sample brought, if it brought any, or never will."""
        if (kv := self._fetched.pop(sample_id, None)) is not None:
            self._kv_transfer.release(kv)

    def _sleep(self) -> None:
        import torch

        self._engine.sleep()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the device's other process

    def _take(self, shapes: Mapping[str, torch.Size], inbox: WeightInbox) -> None:
        self._command(lambda: self._load_weights(shapes, inbox))

    def _load_weights(self, shapes: Mapping[str, torch.Size], inbox: WeightInbox) -> None:
        from fuse.state_dict import WeightStream

        start_s = now_s()
        try:
            self._engine.load_weights(WeightStream(shapes, inbox))
        except BaseException as failure:
            inbox.fail(failure)
            raise
        self._fetched.clear()
        self._kv_transfer.recall()
        with self._changed:
            self._recorder.add(Span("load weights", "weights", start_s, now_s()))

    def _stop(self) -> None:
        self._closing = True

    @property
    def _has_ended(self) -> bool:
        """Whether no sample is left, or the engine has failed."""
        return self._num_live + self._num_entering == 0 or self._failure is not None

    def _expect(self, num_samples: int) -> None:
        with self._changed:
            self._num_entering += num_samples

    def _command(self, command: Callable[[], Any]) -> Future[Any]:
        """Queue a command for the loop."""
        assert not self._closing, "the worker is closed"
        done: Future[Any] = Future()
        self._commands.put((command, done))
        self._raise_failure()  # after queueing: a loop that fails later fails this command itself
        return done

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
