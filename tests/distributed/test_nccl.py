"""Training under NCCL's rules of waiting, on 1 to 8 ranks in this process; see `fake_nccl.py` for the rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import torch

from fuse.intrastage import communication
from fuse.intrastage.communication import Communicator, PipelineCommunicators, Transfer, open_model, open_pipelines
from fuse.intrastage.executor import MOST_IN_FLIGHT
from fuse.intrastage.measure import measure_messages
from fuse.intrastage.optimizer import ModelOptimizer
from fuse.intrastage.training_schedule import unfused
from schedules import Kind, Op, Problem, Schedule
from schedules.baselines import (
    chimera,
    gpipe,
    interleaved,
    one_f_one_b,
    serial,
    zero_bubble_h1,
    zero_bubble_v,
)
from schedules.fused.greedy import greedy
from schedules.fused.solve import solve
from schedules.random_problems import random_problem, random_schedule
from schedules.walk import channel_from, channel_into

from ..examples import examples
from .fake_nccl import Deadlock, FakeNccl
from .linear import TIMEOUT_S, Training, Weights, problem_of

PLENTY = 64
SLOTS = [0, PLENTY]
"""Under the strictest rules every launch waits; under the mildest, no device is ever full."""

Placed = Sequence[tuple[str, Sequence[int], int]]


def solved(problem: Problem) -> Schedule:
    return solve(problem, time_limit_s=0.2, num_workers=1).schedule


def drawn(problem: Problem) -> Schedule:
    return random_schedule(problem, Random(0))


OPPOSITE: Placed = [("actor", range(4), 5), ("critic", range(4)[::-1], 4)]
REPLICAS: Placed = [("actor", range(4), 6), ("critic", [1, 0], 3), ("critic", [3, 2], 2)]
"""The critic with half the stages and two replicas, as the published placement has it."""
BOTH_WAYS: Placed = [("actor", range(4), 4), ("actor", range(4)[::-1], 3)]
ODD: Placed = [("actor", range(3), 3), ("actor", range(3)[::-1], 2)]
"""Opposite replicas; of the middle stage, where there is one, a rank holds both."""
PAIRS: Placed = [("actor", ranks[::step], 2) for ranks in ([0, 1, 2], [3, 4, 5]) for step in (1, -1)]
EIGHT: Placed = [("actor", range(8), 6), ("critic", range(8)[::-1], 5)]
FAMILIES: dict[str, tuple[Callable[[Problem], Schedule], Placed, bool]] = {
    "one rank": (one_f_one_b, [("actor", [0], 2)], False),
    "1F1B, two ranks": (one_f_one_b, [("actor", [0, 1], 6)], False),
    "1F1B, eight ranks": (one_f_one_b, [("actor", range(8), 9)], False),
    "GPipe": (gpipe, [("actor", range(3), 12)], False),
    "serial": (serial, OPPOSITE, False),
    "serial, eight ranks": (serial, EIGHT, False),
    "interleaved": (interleaved, [("actor", [*range(4)] * 2, 8)], False),
    "several stages per device": (unfused, [("actor", [0, 1] * 3, 4), ("critic", [1, 0] * 2, 3)], False),
    "ZB-H1": (zero_bubble_h1, [("actor", range(4), 8)], True),
    "ZB-V": (zero_bubble_v, [("actor", [0, 1, 2, 2, 1, 0], 6)], True),
    "Chimera": (chimera, [("actor", range(4), 4), ("critic", range(4)[::-1], 4)], False),
    "replicas, serial": (serial, REPLICAS, False),
    "replicas, fused": (greedy, REPLICAS, False),
    "replicas in a ring": (drawn, [("actor", [(r + s) % 3 for s in range(3)], 3) for r in range(3)], True),
    "opposite replicas": (greedy, BOTH_WAYS, True),
    "opposite replicas, serial": (serial, BOTH_WAYS, False),
    "opposite replicas, two ranks": (greedy, [("actor", [0, 1], 2), ("actor", [1, 0], 1)], True),
    "opposite replicas, odd": (solved, ODD, True),
    "opposite replicas beside one another": (drawn, PAIRS, False),
    "opposite replicas, several stages per device": (
        unfused,
        [("actor", [0, 1] * 2, 2), ("actor", [1, 0] * 2, 2)],
        False,
    ),
    "fused": (greedy, OPPOSITE, False),
    "fused, eight ranks": (greedy, EIGHT, False),
    "fused by the solver": (solved, [("actor", range(4), 4), ("critic", [3, 2, 1, 0], 4)], True),
    "fused at random": (drawn, [*OPPOSITE, ("actor", [2, 0, 3, 1], 3)], True),
}


@cache
def training_of(family: str) -> Training:
    make, placed, splits = FAMILIES[family]
    num_ranks = 1 + max(max(ranks) for _, ranks, _ in placed)
    problem, models = problem_of(num_ranks, placed, splits=splits)
    return Training(make(problem), models)


@cache
def expected_of(training: Training) -> Weights:
    """The same under all rules."""
    return training.expected()


def check(training: Training, slots: int) -> FakeNccl:
    """Have all devices profile and train; their weights are those of one process."""
    world = FakeNccl(training.num_devices, slots)
    expected = expected_of(training)
    found = world.run(training.run)
    assert {key for weights in found for key in weights} == expected.keys()
    for weights in found:
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-6)
    assert world.most_held <= MOST_IN_FLIGHT
    return world


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_schedules_trains(family: str, slots: int) -> None:
    check(training_of(family), slots)


@pytest.mark.parametrize("seed", range(examples(12)))
def test_random_schedules_train(seed: int) -> None:
    random = Random(seed)
    problem = random_problem(random, max_ranks=8, max_micro_batches=6, max_forward_only=2)
    check(Training.of_each(random_schedule(problem, random)), slots=0)


@pytest.mark.parametrize("slots", [0, 1, 3, PLENTY])
def test_devices_that_share_stages_train(slots: int) -> None:
    problem, models = problem_of(2, [("actor", [0, 1], 4), ("critic", [1, 0], 3)])
    check(Training(greedy(problem), models, tensor_parallel_size=2), slots)


@pytest.mark.parametrize("slots", SLOTS)
def test_opposite_replicas_in_lanes_train(slots: int) -> None:
    problem, models = problem_of(3, ODD)
    check(Training(greedy(problem), models, tensor_parallel_size=2), slots)


@pytest.mark.parametrize("family", ["opposite replicas", "opposite replicas, odd"])
def test_opposite_replicas_whose_gradients_are_not_added_up_train_something_else(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(ModelOptimizer, "_add_replicas", lambda *_: None)
    with pytest.raises(AssertionError, match="not close"):
        check(training_of(family), PLENTY)


def test_messages_hold_few_blocks_of_a_device_and_sums_as_many_as_nccl_likes() -> None:
    world = check(training_of("replicas, fused"), PLENTY)
    options = [group.options for group in world.groups]
    num_messages = 2 * (3 + 1 + 1)
    assert [one.config.max_ctas for one in options[:num_messages]] == [2] * num_messages
    assert options[num_messages:] == [None] * 4 * 2  # by model: replicas of two stages, ends, members


# What deadlocks


def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups open without a first message."""
    monkeypatch.setattr(Communicator, "_set_up", lambda *_: None)


def message(pair: PipelineCommunicators, forward: bool) -> Communicator:
    return pair.forward if forward else pair.backward


def ping_pong(rank: int) -> None:
    """A measurement that posts the receive of its answer first."""
    (pair,) = open_pipelines([("actor", (0, 1))], TIMEOUT_S)
    one: Any = {"micro_batch": 0, "op": "a measurement"}
    if rank == 0:
        answer = pair.backward.receive(torch.zeros(1), stage=0, **one)
        pair.forward.send(torch.zeros(1), stage=0, **one).wait()
        answer.wait()
    else:
        pair.forward.receive(torch.zeros(1), stage=1, **one).wait()
        pair.backward.send(torch.zeros(1), stage=1, **one).wait()


def walk_with_receives_ahead(schedule: Schedule, rank: int) -> None:
    """The messages of a walk that has two receives posted in each channel from its start on, whatever others do."""
    problem = schedule.problem
    communicators = open_pipelines([(one.name, one.ranks) for one in problem.pipelines], TIMEOUT_S)
    unposted: dict[tuple[int, int, bool], deque[Op]] = {}
    posted: dict[Op, Transfer] = {}

    def post(channel: tuple[int, int, bool]) -> None:
        if unposted[channel]:
            op = unposted[channel].popleft()
            communicator = message(communicators[op.pipeline], op.kind is Kind.F)
            posted[op] = communicator.receive(torch.zeros(1), stage=op.stage, micro_batch=op.micro_batch, op=str(op))

    for op in schedule.ranks[rank]:
        if channel_into(problem, op) is not None:
            unposted.setdefault((op.pipeline, op.stage, op.kind is Kind.F), deque()).append(op)
    for channel in unposted:
        post(channel)
        post(channel)
    sent = []
    for op in schedule.ranks[rank]:
        if op in posted:
            posted[op].wait()
            post((op.pipeline, op.stage, op.kind is Kind.F))
        if channel_from(problem, op) is not None:
            communicator = message(communicators[op.pipeline], op.kind is Kind.F)
            sent.append(communicator.send(torch.zeros(1), stage=op.stage, micro_batch=op.micro_batch, op=str(op)))
    for transfer in sent:
        transfer.wait()


def test_a_measurement_that_posts_its_answer_first_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNccl(2, PLENTY).run(ping_pong)
    cold(monkeypatch)
    with pytest.raises(Deadlock) as caught:
        FakeNccl(2, PLENTY).run(ping_pong)
    assert str(caught.value) == (
        "rank 0 waits for the peers' first part in a receive from 1 and holds []; "
        "rank 1 waits for the peers' first part in a receive from 0 and holds []"
    )


def test_receives_posted_ahead_wait_for_ever_where_connections_are_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = training_of("serial").schedule
    FakeNccl(4, PLENTY).run(lambda rank: walk_with_receives_ahead(schedule, rank))
    cold(monkeypatch)
    circle = r"rank 0 waits for the peers' first part in a receive from 1 .* rank 1 waits for .* a receive from 0"
    with pytest.raises(Deadlock, match=circle):
        FakeNccl(4, PLENTY).run(lambda rank: walk_with_receives_ahead(schedule, rank))


@pytest.mark.parametrize(("family", "slots"), [("1F1B, two ranks", 2), ("fused", 0), ("fused", 1), ("fused", 4)])
def test_receives_posted_ahead_wait_for_ever_where_they_fill_the_device(family: str, slots: int) -> None:
    schedule = training_of(family).schedule
    with pytest.raises(Deadlock, match="rank 1 waits for "):
        FakeNccl(schedule.problem.num_ranks, slots).run(lambda rank: walk_with_receives_ahead(schedule, rank))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    "family", ["1F1B, eight ranks", "fused", "ZB-V", "several stages per device", "opposite replicas, odd"]
)
def test_messages_in_order_need_no_connection_set_up(monkeypatch: pytest.MonkeyPatch, family: str, slots: int) -> None:
    cold(monkeypatch)
    check(training_of(family), slots)


@pytest.mark.parametrize("slots", SLOTS)
def test_measurements_need_no_connection_set_up(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Of pipelines that cross one another's ranks in both directions."""
    cold(monkeypatch)
    training = training_of("fused at random")
    pipelines = [(one.name, one.ranks) for one in training.pipelines]

    def measured(rank: int) -> list[tuple[str, int]]:
        stages: dict[tuple[int, int], Any] = {
            (number, stage): training.stage(number, stage)
            for number, (_, ranks) in enumerate(pipelines)
            for stage, owner in enumerate(ranks)
            if owner == rank
        }
        communicators = open_pipelines(pipelines, TIMEOUT_S)
        batches = [own[:2] for own in training.micro_batches()]
        messages = measure_messages(rank, pipelines, stages, batches, communicators, repeats=2)
        return [(name, stage) for name, stage, _, seconds in messages if seconds > 0]

    found = FakeNccl(4, slots).run(measured)
    assert sorted(one for of_rank in found for one in of_rank) == sorted(
        (name, stage) for name, ranks in pipelines for stage in range(len(ranks) - 1) for _ in range(2)
    )


def test_groups_that_ranks_open_in_different_orders_are_seen() -> None:
    replicas = [(0, 1), (1, 2)]

    def opened(rank: int) -> None:
        for one in replicas if rank < 2 else replicas[::-1]:
            open_model([one], TIMEOUT_S)

    with pytest.raises(AssertionError, match="different orders"):
        FakeNccl(3, PLENTY).run(opened)


def test_sums_of_opposite_replicas_in_each_ones_own_order_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's stage of the one replica first, and then of the other: ranks 0 and 3 begin with different stages."""
    construct = ModelOptimizer.__init__

    def by_replica(self: ModelOptimizer, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        self._parameters = dict(sorted(self._parameters.items()))

    monkeypatch.setattr(ModelOptimizer, "__init__", by_replica)
    for slots in SLOTS:
        with pytest.raises(Deadlock, match=r"sum among \(0, 3\)"):
            check(training_of("opposite replicas"), slots)


def test_the_world_is_torchs_again_afterwards() -> None:
    with pytest.raises(Deadlock):
        FakeNccl(2, 0).run(ping_pong)
    assert communication.dist is torch.distributed
