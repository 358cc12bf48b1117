"""Rewards from a Python callable, plain or async: called as samples finish, and checked."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fuse.sample import Sample

RewardFunction = Callable[..., Sequence[float] | Coroutine[Any, Any, Sequence[float]]]
"""(prompts: list[str], responses: list[str], **columns: list) -> one finite number per response; may be `async def`.

Called with some samples of a batch at a time, from threads: a reward must not depend on what it is called with beside
it.
"""

_NUM_THREADS = 8


def call_reward_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Call `function` with a list per dataset column and check what it returns.

    Raises:
        ValueError: another number of rewards than responses, or one that is not a finite number.
    """
    names = columns[0].keys() if columns else ()
    returned = function(prompts, responses, **{name: [row[name] for row in columns] for name in names})
    rewards = list(asyncio.run(returned) if asyncio.iscoroutine(returned) else returned)
    name = getattr(function, "__name__", type(function).__name__)
    if len(rewards) != len(responses):
        raise ValueError(
            f"reward function {name} returned {len(rewards)} rewards for {len(responses)} responses: "
            f"return one number per response, in their order"
        )
    for index, reward in enumerate(rewards):
        if not _is_finite_number(reward):
            raise ValueError(
                f"reward function {name} returned {reward!r} for response {index} ({responses[index][:60]!r}): "
                f"return a finite number"
            )
    return [float(reward) for reward in rewards]


class RewardCalls:
    """Calls a reward function in threads, while the caller goes on; `async def` functions run in loops of their own.

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
            ValueError: rewards that are unusable; see `call_reward_function`.
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
        return call_reward_function(self._function, prompts, responses, [sample.columns for sample in samples])


def _is_finite_number(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]  # anything that converts: numpy and torch scalars
    except (TypeError, ValueError):
        return False
