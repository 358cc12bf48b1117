"""The real workers of one device inside the test's process: fast, and within reach of monkeypatching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import ray

from fuse.driver import (
    early_start,
    fetch,
    fleet,
    live,
    model_start,
    score_flow,
    stage_by_stage,
    tail,
    update,
    update_spans,
    weight_streams,
)
from fuse.intrastage import communication

_LOOPBACK = "127.0.0.1"


class _Future:
    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self) -> Any:
        return self._result


class _Worker:
    """What handles call; calls end before they return."""

    def __init__(self, role: str, device: int, held: Any) -> None:
        self.role, self.device, self.held = role, device, held

    def wait_started(self) -> None:
        pass

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> _Future:
        resolved = [ray.get(arg) if isinstance(arg, ray.ObjectRef) else arg for arg in args]
        return _Future(getattr(self.held, method.__name__)(*resolved, **kwargs))


class _Cluster:
    def __init__(self, num_devices: int, *, imported: Sequence[str], **options: Any) -> None:
        assert num_devices == 1, "one process holds one rank"
        assert imported, "a run's processes are to be born with what they need"
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if hasattr(worker.held, "close"):
                worker.held.close()
        communication.disconnect()

    def host(self, device: int) -> str:
        return _LOOPBACK

    def elsewhere(self) -> dict[str, _Worker]:
        return {}

    def warm(self, *arguments: object) -> None:
        """There are no processes to start."""

    def spawn(self, role: str, device: int, worker_class: type, *args: Any, **kwargs: Any) -> _Worker:
        self._workers.append(_Worker(role, device, worker_class(*args, **kwargs)))
        return self._workers[-1]


def _gather(futures: Sequence[_Future], timeout_s: float | None = None) -> list[Any]:
    return [future.result() for future in futures]


class _PendingCalls:
    """Calls have ended before they are expected."""

    def __init__(self) -> None:
        self._then: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._then)

    def expect(self, future: _Future, then: Callable[[], None]) -> None:
        self._then.append(then)

    def heard(self, timeout_s: float | None = None) -> list[Callable[[], None]]:
        heard, self._then = self._then, []
        return heard


def _wait_ended(futures: Sequence[_Future], timeout_s: float | None = None) -> list[_Future]:
    return list(futures)


def use(patch: pytest.MonkeyPatch) -> None:
    """Have runs on one device start no processes."""
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for module in (fleet, early_start):
        patch.setattr(module, "Cluster", _Cluster)
    patch.setattr(fleet, "gather", _gather)
    patch.setattr(fetch, "gather", _gather)
    patch.setattr(update, "gather", _gather)
    patch.setattr(update_spans, "gather", _gather)
    patch.setattr(tail, "gather", _gather)
    patch.setattr(model_start, "gather", _gather)
    patch.setattr(weight_streams, "gather", _gather)
    patch.setattr(weight_streams, "wait_ended", _wait_ended)
    patch.setattr(stage_by_stage, "gather", _gather)
    patch.setattr(stage_by_stage, "wait_ended", _wait_ended)
    patch.setattr(live, "PendingCalls", _PendingCalls)
    patch.setattr(score_flow, "PendingCalls", _PendingCalls)
