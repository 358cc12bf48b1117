"""NCCL's rules of waiting, for ranks that are threads of this process.

`FakeNccl` stands where `communication` and `optimizer_shards` of `fuse.intrastage` have torch.distributed. Of NCCL it
has that

- a group opens once all ranks of the world have come to it, and they come to groups in one order (ncclCommSplit);
- the first operation of each kind in a group blocks the host until the others who take part come to theirs, as
  connections are set up then;
- an operation takes one of a few slots of its device, as its kernel waits there for the peers', from its launch until
  it completes; a launch blocks the host while there is none;
- a group's operations complete in the order of their launches. Tags are ignored; here they are compared.

One rank runs at a time, until it must wait. What can go on can still do so whatever others have done before, so every
order of ranks ends alike: finished, or in a deadlock, which is seen when all that are left wait. No clock is looked at.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fuse.intrastage import communication, optimizer_shards

Result = TypeVar("Result")
Way = tuple[str, tuple[int, ...]]
"""What an operation is and who takes part; of a message the sender first."""


class Deadlock(Exception):
    """What every rank that is left waits for."""


@dataclass(eq=False)
class Operation:
    """A rank's part in a message or a collective."""

    rank: int
    way: Way
    tensor: Tensor
    tag: int
    world: FakeNccl
    gathered: Sequence[Tensor] = ()
    is_done: bool = False

    def __str__(self) -> str:
        kind, members = self.way
        if kind == "message":
            return f"send to {members[1]}" if self.rank == members[0] else f"receive from {members[0]}"
        return f"{kind} among {members}"

    def wait(self) -> None:
        self.world.wait(lambda: self.is_done, f"{self} to complete")


@dataclass(eq=False)
class Group:
    ranks: tuple[int, ...]
    options: Any
    opened: set[int] = field(default_factory=set)
    begun: defaultdict[Way, set[int]] = field(default_factory=lambda: defaultdict(set))
    queues: defaultdict[int, deque[Operation]] = field(default_factory=lambda: defaultdict(deque))


class FakeNccl:
    """A world. slots: operations that a device holds at once; with 0 every launch waits for its operation as well, as
    any CUDA call may.

    most_held: operations that any device held at once. groups: in the order they were opened.
    """

    def __init__(self, num_ranks: int, slots: int) -> None:
        self.num_ranks, self.slots = num_ranks, slots
        self.groups: list[Group] = []
        self.most_held = 0
        self.group = SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=None))
        self.ProcessGroupNCCL = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace(max_ctas=None)))
        self._world_group = Group(tuple(range(num_ranks)), None)
        self._num_opened = [0] * num_ranks
        self._held: list[list[Operation]] = [[] for _ in range(num_ranks)]
        self._waiting: dict[int, tuple[Callable[[], bool], str]] = {}
        self._turns = [threading.Semaphore(0) for _ in range(num_ranks)]
        self._thread = threading.local()
        self._error: BaseException | None = None

    def run(self, body: Callable[[int], Result]) -> list[Result]:
        """What `body` returns on each rank.

        Raises: Deadlock, or what the body raised first.
        """
        results: dict[int, Result] = {}

        def run_rank(rank: int) -> None:
            self._thread.rank = rank
            try:
                self._take_turn(rank)
                results[rank] = body(rank)
            except BaseException as error:  # noqa: BLE001  (raised again below)
                self._error = self._error or error
            self._hand_on()

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.num_ranks)]
        self._waiting = {rank: (lambda: True, "its start") for rank in range(self.num_ranks)}
        kept = communication.dist
        communication.dist = optimizer_shards.dist = self  # type: ignore[assignment]
        try:
            for thread in threads:
                thread.start()
            self._hand_on()
            for thread in threads:
                thread.join()
        finally:
            communication.dist = optimizer_shards.dist = kept
        if self._error is not None:
            raise self._error
        return [results[rank] for rank in range(self.num_ranks)]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Let others run until the condition holds."""
        if not condition():
            rank = self.get_rank()
            self._waiting[rank] = condition, what
            self._hand_on()
            self._take_turn(rank)

    def _take_turn(self, rank: int) -> None:
        self._turns[rank].acquire()
        if self._error is not None:
            raise self._error

    def _hand_on(self) -> None:
        """Have the first rank go on that can; where none can, or one has failed, all end."""
        if self._error is None:
            for rank, (condition, _) in self._waiting.items():
                if condition():
                    del self._waiting[rank]
                    self._turns[rank].release()
                    return
            if not self._waiting:
                return
            waiting = sorted(self._waiting)
            self._error = Deadlock("; ".join(f"rank {rank} waits for {self._what(rank)}" for rank in waiting))
        for turn in self._turns:
            turn.release()

    def _what(self, rank: int) -> str:
        held = ", ".join(map(str, self._held[rank]))
        return f"{self._waiting[rank][1]} and holds [{held}]"

    # What torch.distributed has

    def get_rank(self, group: Group | None = None) -> int:
        rank: int = self._thread.rank
        return rank if group is None else group.ranks.index(rank)

    def get_world_size(self, group: Group | None = None) -> int:
        return len((group or self._world_group).ranks)

    def get_backend(self) -> str:
        return "nccl"

    def new_group(self, ranks: Sequence[int], timeout: object, pg_options: Any) -> Group | None:
        rank = self.get_rank()
        number = self._num_opened[rank]
        self._num_opened[rank] += 1
        if number == len(self.groups):
            self.groups.append(Group(tuple(sorted(ranks)), pg_options))
        group = self.groups[number]
        assert group.ranks == tuple(sorted(ranks)), "ranks open groups in different orders"
        group.opened.add(rank)
        self.wait(lambda: len(group.opened) == self.num_ranks, f"group {number} of {group.ranks} to open")
        return group if rank in group.ranks else None

    def isend(self, tensor: Tensor, dst: int, group: Group, tag: int) -> Operation:
        return self._launch(group, ("message", (self.get_rank(), dst)), tensor, tag)

    def irecv(self, tensor: Tensor, src: int, group: Group, tag: int) -> Operation:
        return self._launch(group, ("message", (src, self.get_rank())), tensor, tag)

    def all_reduce(self, tensor: Tensor, group: Group | None, async_op: bool = False) -> Operation | None:
        group = group or self._world_group
        operation = self._launch(group, ("sum", group.ranks), tensor)
        if async_op:
            return operation
        operation.wait()
        return None

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor, group: Group) -> None:
        self._launch(group, ("gather", group.ranks), tensor, gathered=gathered).wait()

    def broadcast(self, tensor: Tensor, group: Group, group_src: int) -> None:
        self._launch(group, (f"copies of {group_src}", group.ranks), tensor).wait()

    # Operations

    def _launch(
        self, group: Group, way: Way, tensor: Tensor, tag: int = 0, gathered: Sequence[Tensor] = ()
    ) -> Operation:
        rank, members = self.get_rank(), set(way[1])
        assert members <= set(group.ranks), f"{way} is outside of {group.ranks}"
        operation = Operation(rank, way, tensor.detach(), tag, self, gathered)
        group.begun[way].add(rank)
        self.wait(lambda: group.begun[way] == members, f"the peers' first part in a {operation}")
        self.wait(lambda: len(self._held[rank]) < max(1, self.slots), f"a slot for a {operation}")
        self._held[rank].append(operation)
        self.most_held = max(self.most_held, len(self._held[rank]))
        group.queues[rank].append(operation)
        self._complete_heads(group)
        if self.slots == 0:
            operation.wait()
        return operation

    def _complete_heads(self, group: Group) -> None:
        """Complete what all who take part have come to."""
        while True:
            heads = {rank: queue[0] for rank, queue in group.queues.items() if queue}
            complete = [
                head
                for head in heads.values()
                if all(rank in heads and heads[rank].way == head.way for rank in head.way[1])
            ]
            if not complete:
                return
            parts = [heads[rank] for rank in complete[0].way[1]]
            _move(parts)
            for part in parts:
                group.queues[part.rank].popleft()
                self._held[part.rank].remove(part)
                part.is_done = True


def _move(parts: Sequence[Operation]) -> None:
    """parts: in the order of those who take part."""
    kind = parts[0].way[0]
    if kind == "message":
        sent, received = parts
        assert sent.tag == received.tag, f"{sent} of micro-batch {sent.tag} meets that of {received.tag}"
        received.tensor.copy_(sent.tensor)
    elif kind == "sum":
        total = torch.stack([part.tensor for part in parts]).sum(0)
        for part in parts:
            part.tensor.copy_(total)
    elif kind.startswith("copies of "):
        source = parts[int(kind.removeprefix("copies of "))].tensor.clone()
        for part in parts:
            part.tensor.copy_(source)
    else:
        for part in parts:
            for target, origin in zip(part.gathered, parts, strict=True):
                target.copy_(origin.tensor)
