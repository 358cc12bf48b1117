"""What the processes of an engine have in common: they are given weights, some parcels at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fuse.workers.calls import Future, Worker
from fuse.workers.weight_inbox import WeightInbox

if TYPE_CHECKING:
    import torch

    from fuse.workers.carriers.parcel import Parcel
    from fuse.workers.weight_port import Membership, WeightPort


class WeightTaker:
    """A worker that takes weights in: call `begin_weights`, `load` until all have come, and `end_weights`."""

    def __init__(self) -> None:
        self._inbox = WeightInbox()

    @cached_property
    def _port(self) -> WeightPort:
        from fuse.workers.weight_port import WeightPort  # imports torch, which processes without weights do without

        return WeightPort()

    def begin_weights(self, shapes: Mapping[str, torch.Size]) -> None:
        """Have the engine, which must be empty, wait for new weights; what it objects to is raised by the next call."""
        self._inbox = WeightInbox()
        self._take(shapes, self._inbox)

    def load(self, parcels: Sequence[Parcel]) -> None:
        """Give the engine some of its weights; returns when it needs the parcels no more."""
        self._inbox.put(self._port.receive(parcels))

    def end_weights(self) -> None:
        """The engine has got all of its weights."""
        self._inbox.end()

    def join(self, own: Membership) -> None:
        """Become a member of a group to which weights are broadcast; all members do at once."""
        self._port.join(own)

    def leave(self, group: str) -> None:
        """Leave such a group."""
        self._port.leave(group)

    def _take(self, shapes: Mapping[str, torch.Size], inbox: WeightInbox) -> None:
        """Have another thread load what will come into the inbox."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class WeightTakerHandle:
    """A `WeightTaker` in a process of its own, which has these methods under the same names."""

    worker: Worker[Any]

    def begin_weights(self, shapes: Mapping[str, torch.Size]) -> Future[None]:
        return self.worker.call(WeightTaker.begin_weights, shapes)

    def load(self, parcels: Sequence[Parcel]) -> Future[None]:
        return self.worker.call(WeightTaker.load, parcels)

    def end_weights(self) -> Future[None]:
        return self.worker.call(WeightTaker.end_weights)

    def join(self, own: Membership) -> Future[None]:
        return self.worker.call(WeightTaker.join, own)

    def leave(self, group: str) -> Future[None]:
        return self.worker.call(WeightTaker.leave, group)
