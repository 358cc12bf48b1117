"""Who sends weights when, and receivers that die: who is dropped with them, and who is not waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fuse.driver import weight_streams
from fuse.driver.weight_streams import Stream, WeightStreams, _Group, _Receivers, after_a_turn
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

    def load(self, parcels: Sequence[Parcel]) -> Any:
        self.parcels += parcels
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
    all_well.hand_over([(PARCEL, group(1, 2))], Handle.load)
    all_well.wait()
    given = [handle.parcels for handle in all_well.live.values()]
    assert given[0] == [PARCEL]
    assert given[1] == given[2] == [Parcel(PARCEL.bucket, None, "far")]
    assert not all_well.lost


def test_a_death_drops_those_that_waited_for_the_same_broadcast() -> None:
    """They may never get it, and are not waited for; those of the sender's host go on."""
    dying = receivers(Call(), Call(ends=False), Call(DEATH), Call())
    dying.hand_over([(PARCEL, group(1, 2))], Handle.load)
    dying.wait()
    assert dying.live.keys() == {0, 3}
    assert dying.lost == {1: DEATH, 2: DEATH}


def test_a_death_beside_a_broadcast_drops_nobody_else() -> None:
    dying = receivers(Call(DEATH), Call(), Call())
    dying.hand_over([(PARCEL, group(1, 2))], Handle.load)
    dying.wait()
    assert dying.live.keys() == {1, 2}
    dying.ask(lambda handle: handle.call)
    dying.wait()
    assert dying.lost == {0: DEATH}


@pytest.mark.parametrize(
    ("error", "may_die"), [(DEATH, False), (WorkerError(1, "generation worker", "ValueError: does not fit"), True)]
)
def test_what_is_no_bearable_death_is_raised(error: WorkerError, may_die: bool) -> None:
    failing = receivers(Call(), Call(error), may_die=may_die)
    with pytest.raises(WorkerError) as raised:
        failing.hand_over([(PARCEL, None)], Handle.load)
        failing.wait()
    assert raised.value is error


class Sender:
    """A device that sends one weight in a bucket of its own, and writes down what it is asked."""

    def __init__(self, device: int, said: list[str]) -> None:
        self.device, self.said = device, said

    def begin_export(self, role: str, to: str, dtype: torch.dtype, most_bytes: int, part: str) -> Any:
        return Value({f"weight {self.device}": torch.Size([2])})

    def export_next(self, to: str, group: str | None) -> Any:
        self.said.append(f"export {self.device}")
        return Value(replace(PARCEL, group=f"of {self.device}"))

    def end_export(self, to: str) -> None:
        self.said.append(f"end {self.device}")


class Engine:
    """Writes down which sender's weights it is given."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def begin_weights(self, shapes: Mapping[str, torch.Size]) -> Call:
        assert [*shapes] == ["weight 0", "weight 1"]
        return Call()

    def load(self, parcels: Sequence[Parcel]) -> Call:
        self.said.append(f"load {' and '.join(str(parcel.group) for parcel in parcels)}")
        return Call()

    def end_weights(self) -> Call:
        return Call()


@dataclass
class Value:
    """Of a call that has ended."""

    value: Any

    def result(self) -> Any:
        return self.value


def streams_of_two(*, is_far: bool) -> WeightStreams:
    """Of two devices, the second of which is on another host or not."""
    training = SimpleNamespace(tensor_parallel_size=1)
    cluster: Any = SimpleNamespace(host=lambda device: "far" if is_far and device else "near")
    settings = SimpleNamespace(training=training, accelerator="cpu", generation_dtype=torch.float32, num_devices=2)
    return WeightStreams(cluster, cast("Any", settings))


@pytest.mark.parametrize("is_far", [False, True])
def test_streams_go_on_in_turn_unless_they_may_broadcast(is_far: bool) -> None:
    said: list[str] = []

    def stream(name: str) -> Stream:
        for number in range(2):
            said.append(f"{name}{number}")
            yield
        return {1: DEATH} if name == "a" else {}

    lost = streams_of_two(is_far=is_far).run(
        stream("a"), stream("b"), beside=[after_a_turn(lambda: said.append("report"))]
    )
    assert lost == {1: DEATH}
    assert said == (["a0", "report", "a1", "b0", "b1"] if is_far else ["a0", "b0", "report", "a1", "b1"])


def test_streams_are_closed_where_one_raises() -> None:
    ends: list[str] = []

    def failing() -> Stream:
        yield
        raise DEATH

    def other() -> Stream:
        try:
            yield
            yield
        finally:
            ends.append("closed")
        return {}

    with pytest.raises(WorkerError):
        streams_of_two(is_far=False).run(failing(), other())
    assert ends == ["closed"]


@pytest.mark.parametrize("is_far", [False, True])
def test_devices_of_one_host_send_side_by_side_and_others_in_turn(
    is_far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_streams, "gather", lambda futures: [future.result() for future in futures])
    said: list[str] = []
    streams = streams_of_two(is_far=is_far)
    monkeypatch.setattr(WeightStreams, "_group", lambda *arguments: None)
    senders: Any = [Sender(device, said) for device in range(2)]
    engines: Any = {0: Engine(said)}
    assert not streams.run(streams.to_engines(senders, "actor", "whole", engines))
    in_turn = ["export 0", "load of 0", "export 1", "load of 1"]
    side_by_side = ["export 0", "export 1", "load of 0 and of 1"]
    assert said == [*(in_turn if is_far else side_by_side), "end 0", "end 1"]
