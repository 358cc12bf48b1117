"""Calls of a reward function beside the rest of a run: who makes them, how long they may take, what failures score."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from fuse.sample import Sample
from fuse.trace import Span, now_s
from fuse.trainers.reward_process import RewardProcess, pickled
from fuse.trainers.reward_thread import RewardThread
from fuse.trainers.rewards import RewardError, RewardFunction, function_name, listed

_logger = logging.getLogger(__name__)

ERRORS = "rewards/errors"
"""The metric that counts samples whose reward is `error_score`."""
_NUM_THREADS = 8
_MOST_PROCESSES = 4
_TICK_S = 0.25
_FIRST_WARNING_S = 60.0
"""A call that takes so long is warned of; and again whenever it has taken twice as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How a reward function is called.

    workers: in threads of this process, or in processes. timeout_s: the longest that a call may take.
    error_score: of samples for which it raises, takes too long or ends its process; None: these end the run.
    """

    workers: Literal["thread", "process"] = "thread"
    timeout_s: float = 3600.0
    error_score: float | None = None


class _Caller(Protocol):
    """Makes one call at a time."""

    def call(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
    ) -> list[float]:
        """As `call_reward_function`."""

    def kill(self) -> None:
        """End the call under way, if that can be done."""

    def close(self) -> None:
        """As `kill`; calls none again."""

    def end(self) -> None:
        """There will be no more calls."""


@dataclass(slots=True, eq=False)
class _Call:
    """What is to be rewarded, and how far that is. begin_s: when the function was called; None before."""

    samples: Sequence[Sample]
    future: Future[tuple[list[float], list[RewardError]]] = field(default_factory=Future)
    prompts: Sequence[str] = ()
    begin_s: float | None = None
    warn_after_s: float = _FIRST_WARNING_S
    is_late: bool = False
    caller: _Caller | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def which(self) -> str:
        return listed([sample.id for sample in self.samples], self.prompts)

    def end(self) -> None:
        """Have the caller come back from it, if it is still at it."""
        with self.lock:
            if self.caller is not None:
                self.caller.kill()


def _write_score(sample: Sample, score: float) -> None:
    sample.score = score


class RewardCalls:
    """Calls a reward function while the caller goes on, for as long as a run lasts.

    A context manager: it drops what is under way; a function that never returns keeps neither it nor the interpreter
    from ending. function: None where a model rewards; then nothing is called. decode: token ids to texts, special
    tokens left out. columns_of: what the function is given of a sample beside its texts. write: what is done with a
    score. clock: seconds.

    Raises:
        ValueError: a function that cannot be sent to a process.
    """

    def __init__(
        self,
        function: RewardFunction | None,
        decode: Callable[[Sequence[Sequence[int]]], list[str]],
        settings: RewardSettings | None = None,
        *,
        columns_of: Callable[[Sample], Mapping[str, Any]] = attrgetter("columns"),
        write: Callable[[Sample, float], None] = _write_score,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._columns_of, self._write = columns_of, write
        self._function, self._decode, self._clock = function, decode, clock
        self._settings = settings or RewardSettings()
        self._decoding = threading.Lock()  # tokenizers are not made for threads
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._calls: list[_Call] = []
        self._late: list[_Call] = []
        self._rewarded: set[int] = set()  # since the last `finish`, by id
        self._threads: list[threading.Thread] = []
        self._callers: list[_Caller] = []
        self._spans: list[Span] = []
        self._in_processes = self._settings.workers == "process"
        self._pickled = pickled(function) if function is not None and self._in_processes else b""

    def __enter__(self) -> RewardCalls:
        if self._function is not None:
            num_processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
            for _ in range(num_processes if self._in_processes else _NUM_THREADS):
                self._start_thread()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        if self._calls or not all(call.future.done() for call in self._late):
            for caller in self._callers:
                caller.close()
        if self._in_processes:
            for thread in self._threads:
                thread.join()

    def prepare(self, samples: Sequence[Sample]) -> None: ...

    def submit(self, samples: Sequence[Sample]) -> None:
        """Have generated samples rewarded."""
        if self._function is None:
            return
        call = _Call(tuple(samples))
        self._calls.append(call)
        self._queue.put(call)

    def finish(self) -> dict[str, float]:
        """Wait for all calls, write the scores, and return metrics: `rewards/errors` where failures have a score.

        What takes minutes is warned of.

        Raises:
            RewardError: it raised, took too long or ended its process, and such samples have no score.
            ValueError: see `call_reward_function`.
        """
        failures: list[RewardError] = []
        num_failed = 0
        while self._calls:
            wait([call.future for call in self._calls], timeout=_TICK_S, return_when=FIRST_EXCEPTION)
            for call in tuple(self._calls):
                if call.future.done():
                    scores, errors = call.future.result()
                    num_failed += len(errors)
                elif self._taken_s(call) >= self._settings.timeout_s:
                    scores, errors = self._given_up(call)
                    num_failed += len(scores)
                else:
                    continue
                failures += errors
                self._write_scores(call, scores)
            self._warn_of_waiting()
        self._rewarded.clear()
        if self._function is None or self._settings.error_score is None:
            return {}
        if failures:
            score = self._settings.error_score
            _logger.warning("%d samples are scored reward_error_score=%g: %s", num_failed, score, failures[0])
        return {ERRORS: float(num_failed)}

    def drain_spans(self) -> list[Span]:
        """Of calls that have ended since the last time."""
        spans, self._spans = self._spans, []
        return spans

    def rewarded(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of these whose scores are there, which are written. What has failed is left to `finish`."""
        if self._function is None:
            return list(samples)
        for call in tuple(self._calls):
            if call.future.done() and call.future.exception() is None:
                scores, errors = call.future.result()
                if not errors:
                    self._write_scores(call, scores)
        return [sample for sample in samples if sample.id in self._rewarded]

    def _write_scores(self, call: _Call, scores: Sequence[float]) -> None:
        self._calls.remove(call)
        for sample, score in zip(call.samples, scores, strict=True):
            self._write(sample, score)
            self._rewarded.add(sample.id)

    # Calls that take long

    def _taken_s(self, call: _Call) -> float:
        return 0.0 if call.begin_s is None else self._clock() - call.begin_s

    def _given_up(self, call: _Call) -> tuple[list[float], list[RewardError]]:
        """Scores of a call that has run out of time. Raises: RewardError where it has none."""
        assert self._function is not None
        error = RewardError(
            f"reward function {function_name(self._function)} has not returned for {call.which} within "
            f"reward_timeout_s={self._settings.timeout_s:g}: have it give up earlier, or set reward_error_score"
        )
        if self._settings.error_score is None:
            raise error
        call.is_late = True
        self._late.append(call)
        call.end()
        if not self._in_processes:
            self._start_thread()  # in place of the one that is lost
        return [self._settings.error_score] * len(call.samples), [error]

    def _warn_of_waiting(self) -> None:
        assert self._function is not None
        due = [call for call in self._calls if self._taken_s(call) >= call.warn_after_s]
        if not due:
            return
        oldest = max(due, key=self._taken_s)
        _logger.warning(
            "waiting for reward function %s, which has not returned for %s in %.0f s%s: reward_timeout_s=%g ends it",
            function_name(self._function),
            oldest.which,
            self._taken_s(oldest),
            f" (nor for {len(due) - 1} more)" if len(due) > 1 else "",
            self._settings.timeout_s,
        )
        for call in due:
            while call.warn_after_s <= self._taken_s(call):
                call.warn_after_s *= 2

    # In threads

    def _start_thread(self) -> None:
        assert self._function is not None
        caller: _Caller
        if self._in_processes:
            caller = RewardProcess(function_name(self._function), self._pickled)
        else:
            caller = RewardThread(self._function)
        # A daemon, unlike threads of `concurrent.futures`: the interpreter does not wait for it.
        thread = threading.Thread(target=self._serve, args=(caller,), name="reward", daemon=True)
        self._callers.append(caller)
        self._threads.append(thread)
        thread.start()

    def _serve(self, caller: _Caller) -> None:
        while (call := self._queue.get()) is not None:
            try:
                outcome = self._outcome(call, caller)
            except BaseException as error:  # noqa: BLE001  (the end of a thread's call: whoever waits raises it)
                call.future.set_exception(error)
            else:
                call.future.set_result(outcome)
            if call.is_late and not self._in_processes:
                return  # another thread has taken its place
        caller.end()

    def _outcome(self, call: _Call, caller: _Caller) -> tuple[list[float], list[RewardError]]:
        """Scores, and the errors in place of which some of these stand."""
        assert self._function is not None
        samples = call.samples
        with self._decoding:
            prompts = self._decode([list(sample.prompt_ids) for sample in samples])
            responses = self._decode([sample.response_ids[: sample.length] for sample in samples])
        call.prompts, call.caller, call.begin_s = prompts, caller, self._clock()
        start_s, ids = now_s(), [sample.id for sample in samples]
        try:
            return self._scores(call, caller, samples, prompts, responses)
        finally:
            self._spans.append(Span(function_name(self._function), "reward", start_s, now_s(), {"sample_ids": ids}))
            with call.lock:
                call.caller = None

    def _scores(
        self, call: _Call, caller: _Caller, samples: Sequence[Sample], prompts: list[str], responses: list[str]
    ) -> tuple[list[float], list[RewardError]]:
        """Where samples together fail they are rewarded one by one, so that each fails for itself."""
        score = self._settings.error_score
        try:
            columns, numbers = [self._columns_of(sample) for sample in samples], [sample.id for sample in samples]
            return caller.call(prompts, responses, columns, numbers), []
        except RewardError as error:
            if score is None or call.is_late:
                raise
            if len(samples) == 1:
                return [score], [error]
        scores: list[float] = []
        errors: list[RewardError] = []
        for sample, prompt, response in zip(samples, prompts, responses, strict=True):
            score_of_one, error_of_one = self._scores(call, caller, [sample], [prompt], [response])
            scores += score_of_one
            errors += error_of_one
        return scores, errors
