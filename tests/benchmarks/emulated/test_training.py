"""Emulated ranks walk real schedules in the time that the planner says, on a clock that nobody waits for."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.h100 import costs_named
from fuse.benchmarks.emulated.messages import Key, Mailbox, latest
from fuse.benchmarks.emulated.training import EmulatedRound, train
from fuse.benchmarks.emulated.training import walk as piece_of
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.observed import ObservedCosts
from fuse.intrastage.placement import place
from fuse.intrastage.program import program_of
from fuse.intrastage.training_schedule import halved_serial_schedule, serial_schedule
from fuse.trace import Span, SpanRecorder
from schedules import Schedule
from schedules.fused.greedy import greedy

COSTS = costs_named("h100-13b-33b")
NUM_RANKS, NUM_MICRO_BATCHES = 4, 6
REPLICAS = (*place("actor", NUM_RANKS, NUM_RANKS), *place("critic", NUM_RANKS, NUM_RANKS, reverse=True))


class ThreadPost:
    """Of a rank, within this process."""

    def __init__(self, rank: int, queues: defaultdict[tuple[int, Key], queue.SimpleQueue[float]]) -> None:
        self._rank, self._queues = rank, queues

    def send(self, rank: int, key: Key, value: float) -> None:
        self._queues[rank, key].put(value)

    def receive(self, key: Key) -> float:
        return self._queues[self._rank, key].get(timeout=60)


class Queues(defaultdict[tuple[int, Key], "queue.SimpleQueue[float]"]):
    """One for each key, made by whoever comes first."""

    def __init__(self) -> None:
        super().__init__(queue.SimpleQueue)
        self._lock = threading.Lock()

    def __missing__(self, key: tuple[int, Key]) -> queue.SimpleQueue[float]:
        with self._lock:
            return self[key] if key in self else super().__missing__(key)


def made_round(
    schedule: Schedule, *, stepping: tuple[str, ...] = ("actor", "critic"), more_tokens: int = 0
) -> EmulatedRound:
    """more_tokens: of each micro-batch than of the one before."""
    shapes = tuple(Shape(4, 600 + more_tokens * number) for number in range(NUM_MICRO_BATCHES))
    return EmulatedRound(
        program=program_of(schedule),
        roles=("actor", "critic"),
        shapes=(shapes, shapes),
        is_observed=True,
        stepping=stepping,
    )


def walk(*rounds: EmulatedRound) -> tuple[list[float], list[list[Span]]]:
    """All ranks' times after the rounds, and their spans."""
    queues = Queues()

    def rank_of(rank: int) -> tuple[float, list[Span]]:
        device = EmulatedDevice(now=lambda: 0.0, sleep=lambda seconds: None)
        recorder = SpanRecorder(device)
        for one in rounds:
            train(one, rank, COSTS, device, ThreadPost(rank, queues), recorder)
        return device.free_s, recorder.drain()

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        times, spans = zip(*pool.map(rank_of, range(NUM_RANKS)), strict=True)
    return list(times), list(spans)


SCHEDULES = {
    "serial": serial_schedule(REPLICAS, NUM_MICRO_BATCHES),
    "halves": halved_serial_schedule(REPLICAS, NUM_MICRO_BATCHES),
    "fused": greedy(serial_schedule(REPLICAS, NUM_MICRO_BATCHES).problem),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_take_what_the_plan_says(name: str) -> None:
    one = made_round(SCHEDULES[name], more_tokens=90)
    times, _ = walk(one)
    assert times == pytest.approx([one.predicted_s(COSTS)] * NUM_RANKS, rel=1e-5)


def test_a_pipeline_trains_a_piece_alone() -> None:
    """Before the update, on two of four ranks; nobody waits for the others."""
    (_, replica) = place("critic", NUM_RANKS, 2)
    alone = replace(replica, index=0)
    one = EmulatedRound(
        program=program_of(serial_schedule((alone,), (("critic", 3),))),
        roles=("critic",),
        shapes=((Shape(4, 600),) * 3,),
        is_observed=False,
        stepping=(),
    )
    queues, recorder = Queues(), SpanRecorder(EmulatedDevice(now=lambda: 0.0, sleep=lambda seconds: None))
    devices = {rank: EmulatedDevice(now=lambda: 0.0, sleep=lambda seconds: None) for rank in replica.ranks}
    with ThreadPoolExecutor(2) as pool:
        pieces = [
            pool.submit(piece_of, one, rank, COSTS, device, ThreadPost(rank, queues), recorder, "tail")
            for rank, device in devices.items()
        ]
        for piece in pieces:
            piece.result()
    assert max(device.free_s for device in devices.values()) == pytest.approx(one.predicted_s(COSTS), rel=1e-3)
    assert {span.category for span in recorder.drain()} == {"tail"}


def test_rounds_follow_one_another_and_an_optimizer_steps_when_it_is_due() -> None:
    first, last = made_round(SCHEDULES["fused"], stepping=()), made_round(SCHEDULES["fused"])
    times, spans = walk(first, last)
    assert times == pytest.approx([first.predicted_s(COSTS) + last.predicted_s(COSTS)] * NUM_RANKS, rel=1e-3)
    assert [span.name for span in spans[0] if span.category == "optimizer"] == ["step actor", "step critic"]


def test_spans_tell_the_planner_what_operations_and_messages_cost() -> None:
    one = made_round(SCHEDULES["halves"])
    observed = ObservedCosts({"actor": "actor.0", "critic": "critic.0"})
    for spans in walk(one)[1]:
        observed.add(spans)
    shape = one.shapes[0][0]
    profile = observed.profile([shape])
    assert profile is not None
    for stage in profile.stages:
        costs = COSTS.training[stage.pipeline.partition(".")[0]]
        assert stage.forward_ticks * profile.tick_s == pytest.approx(costs.forward(shape.size) / NUM_RANKS, rel=0.01)
        assert stage.weight_grad_ticks is not None
        expected = costs.weight_grad(shape.size) / NUM_RANKS
        assert stage.weight_grad_ticks * profile.tick_s == pytest.approx(expected, rel=0.01)
    message_s = profile.tick_s * profile.transfer_ticks("critic.0", shape)
    assert message_s == pytest.approx(COSTS.message(shape.size), abs=profile.tick_s)


def test_messages_go_through_pipes_in_order(tmp_path: Path) -> None:
    boxes = [Mailbox(tmp_path, rank, timeout_s=60) for rank in range(2)]
    try:
        for number in range(100):
            boxes[0].send(1, (0, 1, 2, 3), float(number))
        boxes[0].send(1, (4,), 0.5)
        assert boxes[1].receive((4,)) == 0.5
        assert [boxes[1].receive((0, 1, 2, 3)) for _ in range(100)] == [float(number) for number in range(100)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda rank: latest(float(rank), rank, 2, boxes[rank]), range(2)))
        assert found == [1.0, 1.0]
    finally:
        for box in boxes:
            box.close()
    assert not list(tmp_path.iterdir())


def test_what_does_not_come_is_named(tmp_path: Path) -> None:
    box = Mailbox(tmp_path, 0, timeout_s=0)
    with pytest.raises(TimeoutError, match=r"rank 0: no message \(1, 2\) within 0 s"):
        box.receive((1, 2))
    box.close()


def test_what_is_queued_ends_when_it_should_and_wakes_the_host_seldom() -> None:
    now_s, slept = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now_s
        slept.append(seconds)
        now_s += seconds

    device = EmulatedDevice(now=lambda: now_s, sleep=sleep)
    for number in range(1, 101):
        device.queue(0.01)
        assert device.free_s == pytest.approx(0.01 * number)
        assert now_s < device.free_s <= now_s + 0.1 + 1e-9
    device.finish()
    assert now_s == pytest.approx(1.0)
    assert len(slept) < 25
