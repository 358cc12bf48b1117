"""What a failed worker looks like to the driver: one line that names the device, the role and the cause."""

from __future__ import annotations

import re

# Ray is imported where its errors are looked at: whoever has an error of ours to raise may do without it.


class RunError(RuntimeError):
    """What ended a run that its input is not to blame for."""


class ClusterError(RunError):
    """A process of the Ray cluster itself has ended."""


class WorkerError(RunError):
    """A worker raised or its process died (`is_death`); the worker's own traceback is the `__cause__`."""

    def __init__(self, device: int, role: str, cause: str, *, is_death: bool = False) -> None:
        super().__init__(device, role, cause)
        self.is_death = is_death
        self.device = device
        self.role = role
        self.cause = cause

    @property
    def raised(self) -> BaseException | None:
        """What the worker raised, if it did."""
        from ray.exceptions import RayTaskError

        error = self.__cause__
        return error.cause if isinstance(error, RayTaskError) else None

    def __str__(self) -> str:
        return f"{self.role} on device {self.device} failed: {self.cause}"


def cause_of(error: BaseException) -> str:
    """One line that says why a call on a worker failed."""
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        raised = error.cause
        first_line = next((line for line in str(raised).splitlines() if line.strip()), "")
        return f"{type(raised).__name__}: {first_line}" if first_line else type(raised).__name__
    message = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in message:
        return "its process was ended because the node ran out of memory: use smaller batches or fewer devices per node"
    if isinstance(error, RayActorError):
        if "node has died" in message:
            return "the node it ran on died or left the Ray cluster"
        return "its process died (killed, out of memory, or crashed)"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def dead_process_id(error: BaseException) -> int | None:
    """The process whose death `error` reports, if it does; Ray tells it in the message only."""
    from ray.exceptions import RayActorError

    match = re.search(r"^\s*pid: (\d+)$", str(error), re.MULTILINE) if isinstance(error, RayActorError) else None
    return int(match[1]) if match else None
