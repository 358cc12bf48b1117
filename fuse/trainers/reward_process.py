"""A process of its own in which a reward function runs, as the trainer's process sees it; `reward_server` is inside.

The process leads a group, to which all belong that the function starts. One more process of the group waits for the end
of its standard input, which is the end of the trainer however it ends, and then kills the group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pickle import PicklingError
from typing import Any

from fuse.trainers.rewards import RewardError, RewardFunction, function_name, listed

_START = (
    "import sys; descriptor, *sys.path = sys.argv[1:]; "
    "from fuse.trainers.reward_server import serve; serve(int(descriptor))"
)
_GRACE_S = 5.0
"""For what a function has registered to be done at the end of its process."""


def pickled(function: RewardFunction) -> bytes:
    """The function as processes get it: by its module and name if it has these, else by value.

    Raises:
        ValueError: it holds what cannot leave this process.
    """
    from ray import cloudpickle  # takes a second, and threads do not need it

    try:
        content: bytes = cloudpickle.dumps(function)
    except (PicklingError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"reward function {function_name(function)} cannot be sent to a process ({' '.join(str(error).split())}): "
            f"make what it uses inside of it, or set reward_workers='thread'"
        ) from error
    return content


class _RemoteError(Exception):
    """What was raised in the process, as its traceback tells."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    connection: Connection

    def end(self, grace_s: float) -> int:
        """Wait, kill what is left of the group, and return the exit status."""
        descriptor = os.pidfd_open(self.process.pid)
        try:
            wait([descriptor], grace_s)
        finally:
            os.close(descriptor)
        self.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait()

    def kill(self) -> None:
        """The group has its number until `end` has asked for the exit status of its leader."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class RewardProcess:
    """Calls a reward function in a process, one call at a time, from one thread; started with the first call, and again
    after a death.

    name: of the function. function: as `pickled`.
    """

    def __init__(self, name: str, function: bytes) -> None:
        self._name, self._function = name, function
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._is_closed = False

    def call(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
    ) -> list[float]:
        """As `call_reward_function`.

        Raises:
            RewardError: also where the process died.
            ValueError: also where it cannot load the function.
        """
        from ray import cloudpickle

        request = cloudpickle.dumps((prompts, responses, columns, numbers))
        try:
            running = self._started()
            running.connection.send_bytes(request)
            kind, content, trace = running.connection.recv()
        except (EOFError, OSError) as error:
            raise RewardError(
                f"reward function {self._name}: its process {self._ended()} while it rewarded "
                f"{listed(numbers, prompts)}: have it survive such samples, or set reward_error_score"
            ) from error
        if kind == "raised":
            raise RewardError(content) from _RemoteError(trace)
        if kind == "unusable":
            raise ValueError(content)
        rewards: list[float] = content
        return rewards

    def kill(self) -> None:
        """End a call under way."""
        with self._lock:
            if self._running is not None:
                self._running.kill()

    def close(self) -> None:
        """End a call under way, and start none again."""
        self._is_closed = True
        self.kill()

    def end(self) -> None:
        """Between calls: let the process end by itself."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.connection.close()
            running.end(_GRACE_S)

    def _started(self) -> _Running:
        with self._lock:
            if self._is_closed:
                raise EOFError("the run has ended")
            if self._running is not None:
                return self._running
            ours, its = Pipe()
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(its.fileno()), *sys.path],
                stdin=subprocess.PIPE,
                pass_fds=[its.fileno()],
                process_group=0,  # Ctrl-C is the trainer's alone
            )
            its.close()
            running = self._running = _Running(process, ours)
        running.connection.send_bytes(self._function)
        refusal = running.connection.recv()
        if refusal is not None:
            self.end()
            raise ValueError(
                f"reward function {self._name} cannot be loaded in a process of its own ({refusal}): put its module "
                f"on the Python path, or set reward_workers='thread'"
            )
        return running

    def _ended(self) -> str:
        with self._lock:
            running, self._running = self._running, None
        if running is None:
            return "was ended with the run" if self._is_closed else "did not start"
        running.connection.close()
        status = running.end(_GRACE_S)
        return f"died ({signal.Signals(-status).name})" if status < 0 else f"exited (status {status})"
