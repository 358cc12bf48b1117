"""Rewards from a Python callable, plain or async: called as samples finish, and checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fuse.sample import Sample

RewardFunction = Callable[..., Sequence[float] | Awaitable[Sequence[float]]]
"""(prompts: list[str], responses: list[str], **columns: list) -> one finite number per response; may be `async def`.

Called with some samples of a batch at a time, from threads: a reward must not depend on what it is called with beside
it. What is awaited runs in one event loop, so that locks, semaphores and clients may outlast a call.
"""

_NUM_THREADS = 8
_BEGINNING = 60
"""Characters of a text that errors show."""


class RewardError(RuntimeError):
    """A reward function raised; the message says for which samples, and what; that error is the `__cause__`."""


def call_reward_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Sequence[Mapping[str, Any]],
    numbers: Sequence[int] | None = None,
) -> list[float]:
    """Call `function` with a list per dataset column and check what it returns.

    numbers: of the samples in the run, for errors to name; by default their places in the call.

    Raises:
        RewardError: it raised.
        ValueError: it returned no list, another number of rewards than responses, or one that is not a finite number.
    """
    names = columns[0].keys() if columns else ()
    try:
        returned: Any = function(prompts, responses, **{name: [row[name] for row in columns] for name in names})
        if inspect.isawaitable(returned):
            returned = _LOOP.result_of(returned)
    except (Exception, SystemExit) as error:
        which = _listed(numbers if numbers is not None else range(len(prompts)))
        beginning = f" ({prompts[0][:_BEGINNING]!r})" if prompts else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise RewardError(
            f"reward function {function_name(function)} raised for {which}{beginning}: {reason}"
        ) from error
    return _checked(function_name(function), returned, responses)


def _checked(name: str, returned: Any, responses: Sequence[str]) -> list[float]:
    """What a reward function returned, as numbers."""
    try:
        is_list = not isinstance(returned, (str, bytes, Mapping, Set, Iterator)) and len(returned) >= 0
    except TypeError:  # numbers, None, tensors and arrays without dimensions
        is_list = False
    if not is_list:
        raise ValueError(
            f"reward function {name} returned {_described(returned)} for {len(responses)} responses: "
            "return a list of one number per response, in their order"
        )
    rewards = list(returned)
    if len(rewards) != len(responses):
        raise ValueError(
            f"reward function {name} returned {len(rewards)} rewards for {len(responses)} responses: "
            f"return one number per response, in their order"
        )
    for index, reward in enumerate(rewards):
        if not _is_finite_number(reward):
            raise ValueError(
                f"reward function {name} returned {_shortened(reward)} for response {index} "
                f"({responses[index][:_BEGINNING]!r}): return a finite number"
            )
    return [float(reward) for reward in rewards]


def function_name(function: RewardFunction) -> str:
    """What errors call it."""
    return getattr(function, "__name__", type(function).__name__)


def _described(returned: object) -> str:
    if returned is None:
        return "None"
    kind = type(returned).__name__
    return f"{kind} {_shortened(returned)}" if isinstance(returned, (int, float, str, bytes)) else kind


def _shortened(value: object) -> str:
    """On one line."""
    return " ".join(repr(value).split())[:_BEGINNING]


def _listed(numbers: Sequence[int]) -> str:
    first, *others = [str(number) for number in numbers] or ["none"]
    return f"samples {', '.join([first, *others])}" if others else f"sample {first}"


class _EventLoop:
    """An event loop in a thread of its own, from when it is first needed to the end of the process.

    All reward functions share it: what they keep at module level, such as a semaphore, belongs to the loop that it was
    first awaited in. The caller's own loop, as notebooks have one, is left alone.
    """

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def result_of(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for it in the calling thread. Raises: what it raises."""

        async def result() -> Any:
            return await awaitable

        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._run, args=(self._loop,), name="reward-loop", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(result(), self._loop).result()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with suppress(SystemExit):  # of a task, and its caller hears of it: the loop goes on for others
                loop.run_forever()


_LOOP = _EventLoop()


class RewardCalls:
    """Calls a reward function in threads, while the caller goes on; what is to be awaited, in one event loop.

    A context manager: it waits for calls under way, and drops those that have not begun. function: None where a model
    rewards; then nothing is called. decode: token ids to texts, special tokens left out.
    """

    def __init__(self, function: RewardFunction | None, decode: Callable[[Sequence[Sequence[int]]], list[str]]) -> None:
        self._function, self._decode = function, decode
        self._decoding = threading.Lock()  # tokenizers are not made for threads
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="reward")
        self._calls: list[tuple[Sequence[Sample], Future[list[float]]]] = []

    def __enter__(self) -> RewardCalls:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def submit(self, samples: Sequence[Sample]) -> None:
        """Have generated samples rewarded."""
        if self._function is None:
            return
        self._calls.append((tuple(samples), self._threads.submit(self._rewards, tuple(samples))))

    def finish(self) -> None:
        """Wait for all calls and write the scores.

        Raises:
            RewardError, ValueError: see `call_reward_function`.
        """
        for samples, call in self._calls:
            for sample, score in zip(samples, call.result(), strict=True):
                sample.score = score
        self._calls.clear()

    def _rewards(self, samples: Sequence[Sample]) -> list[float]:
        assert self._function is not None
        with self._decoding:
            prompts = self._decode([list(sample.prompt_ids) for sample in samples])
            responses = self._decode([sample.response_ids[: sample.length] for sample in samples])
        return call_reward_function(
            self._function,
            prompts,
            responses,
            [sample.columns for sample in samples],
            [sample.id for sample in samples],
        )


def _is_finite_number(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]  # anything that converts: numpy and torch scalars
    except (TypeError, ValueError):
        return False
