"""A reward function called in the calling thread, as `reward_process` calls it in a process of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from fuse.trainers.rewards import LOOP, RewardFunction, call_reward_function


class RewardThread:
    """Calls in the calling thread, which nobody can end, but for what it awaits."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._awaited: Future[Any] | None = None
        self._is_killed = False

    def call(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
    ) -> list[float]:
        """As `call_reward_function`."""
        return call_reward_function(self._function, prompts, responses, columns, numbers, result_of=self._result_of)

    def _result_of(self, awaitable: Awaitable[Any]) -> Any:
        awaited = self._awaited = LOOP.begin(awaitable)
        if self._is_killed:  # before there was anything to cancel
            awaited.cancel()
        return awaited.result()

    def kill(self) -> None:
        """End the call under way, if it awaits something or does later. Another thread makes the calls to come."""
        self._is_killed = True
        if (awaited := self._awaited) is not None:
            awaited.cancel()

    def close(self) -> None: ...

    def end(self) -> None: ...
