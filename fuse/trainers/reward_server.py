"""The inside of a process that calls a reward function: in its main thread, one call after the other.

It reads the pickled function from a connection and answers None, or why it cannot be loaded; then it answers requests,
each the arguments of `call_reward_function`, until the connection ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import traceback
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from fuse.trainers.rewards import RewardError, RewardFunction, call_reward_function

_STANDARD_INPUT = 0


def serve(descriptor: int) -> None:
    """Answer what comes through the connection with this descriptor."""
    with _ending_with_the_trainer(descriptor), Connection(descriptor) as connection, asyncio.Runner() as runner:
        try:
            function: RewardFunction = connection.recv()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a module raises: the trainer tells of it)
            connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
            return
        connection.send(None)
        result_of = partial(_result_of, runner)
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send(_answer(function, request, result_of))


def _answer(function: RewardFunction, request: tuple[Any, ...], result_of: Any) -> tuple[str, Any, str]:
    """What came of a call, its rewards or a message, and the traceback of an error."""
    try:
        prompts, responses, columns, numbers = request
        return "rewards", call_reward_function(function, prompts, responses, columns, numbers, result_of), ""
    except RewardError as error:
        return "raised", str(error), traceback.format_exc()
    except ValueError as error:
        return "unusable", str(error), ""


def _result_of(runner: asyncio.Runner, awaitable: Awaitable[Any]) -> Any:
    """Wait in the main thread, in the process's one event loop."""

    async def result() -> Any:
        return await awaitable

    return runner.run(result())


@contextmanager
def _ending_with_the_trainer(descriptor: int) -> Iterator[None]:
    """Until the body ends, a process waits for the end of standard input and then kills the group.

    A thread would wait in vain for the interpreter's lock where a function's native code holds it.
    """
    watch = os.fork()
    if watch == 0:
        os.close(descriptor)  # whose end tells the trainer of this process's
        while os.read(_STANDARD_INPUT, 1):
            pass
        os.killpg(0, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _STANDARD_INPUT)
    os.close(null)
    try:
        yield
    finally:
        os.kill(watch, signal.SIGKILL)
        os.waitpid(watch, 0)
