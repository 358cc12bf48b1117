"""Receivers of weights that die: who is dropped with them, and who is not waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fuse.driver import weight_streams
from fuse.driver.weight_streams import _Group, _Receivers
from fuse.workers.carriers.parcel import Entry, Parcel
from fuse.workers.carriers.shared_memory import SharedPages
from fuse.workers.errors import WorkerError

DEATH = WorkerError(1, "generation worker", "its process died", is_death=True)
PARCEL = Parcel((Entry("weight", torch.Size([2]), torch.float32, 0),), SharedPages(1, 2, 8))


class Call:
    """A call that ends by an error, well, or never."""

    def __init__(self, error: WorkerError | None = None, *, ends: bool = True) -> None:
        self.error, self.ends = error, ends

    def result(self) -> None:
        if self.error is not None:
            raise self.error


class Handle:
    """Of a receiver whose calls end like this; keeps the parcels that it is given."""

    def __init__(self, call: Call) -> None:
        self.call, self.parcels = call, list[Parcel]()

    def load(self, parcel: Parcel) -> Any:
        self.parcels.append(parcel)
        return self.call


@pytest.fixture(autouse=True)
def _calls_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(calls: list[Call]) -> list[Call]:
        found = [call for call in calls if call.ends]
        assert found, "it waits for calls that never end"
        return found

    monkeypatch.setattr(weight_streams, "wait_ended", ended)


def receivers(*calls: Call, may_die: bool = True) -> _Receivers[Any]:
    return _Receivers({device: Handle(call) for device, call in enumerate(calls)}, may_die=may_die)


def group(*devices: int) -> _Group:
    return _Group("far", (), frozenset(devices))


def test_those_on_other_hosts_get_the_broadcast_and_the_rest_the_address() -> None:
    all_well = receivers(Call(), Call(), Call())
    all_well.hand_over(PARCEL, group(1, 2), Handle.load)
    given = [handle.parcels for handle in all_well.live.values()]
    assert given[0] == [PARCEL]
    assert given[1] == given[2] == [Parcel(PARCEL.bucket, None, "far")]
    assert not all_well.lost


def test_a_death_drops_those_that_waited_for_the_same_broadcast() -> None:
    """They may never get it, and are not waited for; those of the sender's host go on."""
    dying = receivers(Call(), Call(ends=False), Call(DEATH), Call())
    dying.hand_over(PARCEL, group(1, 2), Handle.load)
    assert dying.live.keys() == {0, 3}
    assert dying.lost == {1: DEATH, 2: DEATH}


def test_a_death_beside_a_broadcast_drops_nobody_else() -> None:
    dying = receivers(Call(DEATH), Call(), Call())
    dying.hand_over(PARCEL, group(1, 2), Handle.load)
    assert dying.live.keys() == {1, 2}
    dying.ask(lambda handle: handle.call)
    assert dying.lost == {0: DEATH}


@pytest.mark.parametrize(
    ("error", "may_die"), [(DEATH, False), (WorkerError(1, "generation worker", "ValueError: does not fit"), True)]
)
def test_what_is_no_bearable_death_is_raised(error: WorkerError, may_die: bool) -> None:
    failing = receivers(Call(), Call(error), may_die=may_die)
    with pytest.raises(WorkerError) as raised:
        failing.hand_over(PARCEL, None, Handle.load)
    assert raised.value is error
