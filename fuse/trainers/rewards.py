"""Rewards from a Python callable, plain or async: one call, and what it returns is checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

RewardFunction = Callable[..., Sequence[float] | Awaitable[Sequence[float]]]
"""(prompts: list[str], responses: list[str], **columns: list) -> one finite number per response; may be `async def`.

Called with some samples of a batch at a time, from threads or in processes: a reward must not depend on what it is
called with beside it. What is awaited runs in one event loop, so that locks, semaphores and clients may outlast a call.
"""

_BEGINNING = 60
"""Characters of a text that errors show."""
_NO_MAIN_THREAD = "signal only works in main thread"
"""What Python says of `signal.signal` elsewhere."""


class RewardError(RuntimeError):
    """A reward function raised, did not return or took its process along; the message says for which samples, and what.

    The `__cause__` is what it raised.
    """


def call_reward_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Sequence[Mapping[str, Any]],
    numbers: Sequence[int] | None = None,
    result_of: Callable[[Awaitable[Any]], Any] | None = None,
) -> list[float]:
    """Call `function` with a list per dataset column and check what it returns.

    numbers: of the samples in the run, for errors to name; by default their places in the call.
    result_of: waits for what is to be awaited; by default in one event loop of this process.

    Raises:
        RewardError: it raised.
        ValueError: it returned no list, another number of rewards than responses, or one that is not a finite number.
    """
    names = columns[0].keys() if columns else ()
    try:
        returned: Any = function(prompts, responses, **{name: [row[name] for row in columns] for name in names})
        if inspect.isawaitable(returned):
            returned = result_of(returned) if result_of is not None else LOOP.begin(returned).result()
    except (Exception, SystemExit) as error:
        which = listed(numbers if numbers is not None else range(len(prompts)), prompts)
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        if _NO_MAIN_THREAD in reason:
            reason += ": set reward_workers='process', where functions run in a main thread"
        raise RewardError(f"reward function {function_name(function)} raised for {which}: {reason}") from error
    return _checked(function_name(function), returned, responses, may_abstain=getattr(function, "may_abstain", False))


def _checked(name: str, returned: Any, responses: Sequence[str], *, may_abstain: bool) -> list[float]:
    """What a reward function returned, as numbers. may_abstain: whether None is no reward, NaN here."""
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
    if may_abstain:
        rewards = [math.nan if reward is None else reward for reward in rewards]
    for index, reward in enumerate(rewards):
        if not (_is_finite_number(reward) or (may_abstain and reward is math.nan)):
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


def listed(numbers: Sequence[int], prompts: Sequence[str] = ()) -> str:
    """`samples 3, 5 ('the first prompt')`: for errors."""
    first, *others = [str(number) for number in numbers] or ["none"]
    beginning = f" ({prompts[0][:_BEGINNING]!r})" if prompts else ""
    return (f"samples {', '.join([first, *others])}" if others else f"sample {first}") + beginning


class _EventLoop:
    """An event loop in a thread of its own, from when it is first needed to the end of the process.

    All reward functions share it: what they keep at module level, such as a semaphore, belongs to the loop that it was
    first awaited in. The caller's own loop, as notebooks have one, is left alone.
    """

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, awaitable: Awaitable[Any]) -> Future[Any]:
        """Have it run; the future's `result` waits for it, and `cancel` ends it."""

        async def result() -> Any:
            return await awaitable

        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._run, args=(self._loop,), name="reward-loop", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(result(), self._loop)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with suppress(SystemExit):  # of a task, and its caller hears of it: the loop goes on for others
                loop.run_forever()


LOOP = _EventLoop()


def _is_finite_number(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]  # anything that converts: numpy and torch scalars
    except (TypeError, ValueError):
        return False
