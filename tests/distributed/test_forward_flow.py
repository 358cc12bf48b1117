"""Forward-only pipelines under NCCL's rules of waiting, on 1 to 8 ranks in this process; see `fake_nccl.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage import forward_flow
from fuse.intrastage.communication import Communicator, open_pipelines
from fuse.intrastage.executor import MOST_IN_FLIGHT, execute
from fuse.intrastage.forward_flow import ForwardFlow, ForwardPipeline, Passage
from fuse.intrastage.program import program_of
from fuse.micro_batch import MicroBatch
from fuse.trace import SpanRecorder
from schedules.fused.greedy import greedy

from ..examples import examples
from .fake_nccl import FakeNccl
from .linear import TIMEOUT_S, Training, problem_of

PLENTY = 64
SIZE = 3


class Layer:
    """Multiplies by a matrix of its own. See `ForwardStage`."""

    def __init__(self, pipeline: int, stage: int) -> None:
        generator = torch.Generator().manual_seed(100 * pipeline + stage)
        self.weight = torch.randn(SIZE, SIZE, generator=generator)

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return torch.empty(len(micro_batch.input_ids), SIZE)

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Any) -> Tensor:
        entering = micro_batch.targets if stage_input is None else stage_input
        return torch.tanh(entering @ self.weight)


def micro_batch(key: int) -> MicroBatch:
    """Of different numbers of rows, so that a message that meets another's receive has the wrong shape."""
    rows = 1 + key % 4
    generator = torch.Generator().manual_seed(key)
    return MicroBatch(
        input_ids=torch.zeros(rows, 1, dtype=torch.int64),
        head_index=torch.tensor([0]),
        targets=torch.randn(rows, SIZE, generator=generator),
    )


def unread(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
    raise AssertionError("these stages have no head")


Ticks = Sequence[Sequence[tuple[int, int]]]
"""What enters at each tick: pipelines and keys."""


def passages(entering: Sequence[tuple[int, int]]) -> Iterator[Passage]:
    return (Passage(pipeline=one, key=key, micro_batch=micro_batch(key), sizes={}) for one, key in entering)


def flow_of(rank: int, pipelines: Sequence[Sequence[int]], communicators: Sequence[Communicator]) -> ForwardFlow:
    made = [
        ForwardPipeline(
            name=f"model{number}",
            ranks=tuple(ranks),
            stages={stage: Layer(number, stage) for stage, owner in enumerate(ranks) if owner == rank},
            communicator=communicators[number],
            read=unread,
        )
        for number, ranks in enumerate(pipelines)
    ]
    return ForwardFlow(rank, made, SpanRecorder())


def run_ticks(flow: ForwardFlow, ticks: Ticks) -> dict[int, Tensor]:
    found: dict[Any, Tensor] = {}
    for entering in ticks:
        found |= dict(flow.tick(passages(entering)))
    while not flow.is_empty:
        found |= dict(flow.tick())
    return found


def check(num_ranks: int, pipelines: Sequence[Sequence[int]], ticks: Ticks, slots: int) -> FakeNccl:
    """Every micro-batch comes out of its last stage's rank, as it does in one process, and of no other."""

    def body(rank: int) -> dict[int, Tensor]:
        communicators = [Communicator(f"model{n}", r, step=1, timeout_s=TIMEOUT_S) for n, r in enumerate(pipelines)]
        return run_ticks(flow_of(rank, pipelines, communicators), ticks)

    world = FakeNccl(num_ranks, slots)
    found = world.run(body)
    for number, key in [one for entering in ticks for one in entering]:
        expected: Tensor | None = None
        for stage in range(len(pipelines[number])):
            expected = Layer(number, stage).infer(micro_batch(key), expected, unread)
        assert [key in of_rank for of_rank in found] == [rank == pipelines[number][-1] for rank in range(num_ranks)]
        assert torch.equal(found[pipelines[number][-1]][key], expected)  # type: ignore[arg-type]
    assert world.most_held <= MOST_IN_FLIGHT
    return world


@pytest.mark.parametrize("slots", [0, 1, PLENTY])
@pytest.mark.parametrize(
    ("num_ranks", "pipelines"),
    [
        (1, [[0], [0, 0]]),
        (2, [[0, 1], [1, 0]]),
        (4, [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]]),
        (4, [[0, 1, 2, 3], [1, 0], [3, 2], [2], [0, 1] * 3]),
        (8, [range(8), range(8)[::-1], [4, 0, 6, 2]]),
        (4, [[0, 1, 2, 3]] * 6 + [[3, 2, 1, 0]] * 6),
    ],
)
def test_what_flows_comes_out_right(num_ranks: int, pipelines: Sequence[Sequence[int]], slots: int) -> None:
    together = [[(number, 50 * tick + number) for number in range(len(pipelines))] for tick in range(5)]
    alone = [[(number, 1000 + number)] for number in range(len(pipelines))]
    gaps: Ticks = [[], *alone[:1], [], [], *alone[1:], []]
    check(num_ranks, pipelines, [*together, *gaps], slots)


@pytest.mark.parametrize("seed", range(examples(25)))
def test_whatever_pipelines_and_whenever_something_enters(seed: int) -> None:
    random = Random(seed)
    num_ranks = random.randint(1, 6)
    pipelines = [
        [random.randrange(num_ranks) for _ in range(random.randint(1, 6))] for _ in range(random.randint(1, 5))
    ]
    ticks, key = [], 0
    for _ in range(random.randint(1, 12)):
        entering = [number for number in range(len(pipelines)) if random.random() < 0.6]
        ticks.append([(number, key + index) for index, number in enumerate(entering)])
        key += len(entering)
    check(num_ranks, pipelines, ticks, slots=random.choice([0, 0, 1, 3, PLENTY]))


@pytest.mark.parametrize("slots", [0, PLENTY])
def test_training_and_scoring_take_turns_on_the_same_connections(slots: int) -> None:
    problem, models = problem_of(4, [("actor", range(4), 5), ("critic", range(4)[::-1], 4)])
    training = Training(greedy(problem), models)
    placed = [tuple(pipeline.ranks) for pipeline in training.pipelines]

    def body(rank: int) -> tuple[list[str], dict[int, Tensor]]:
        pipelines = [(pipeline.name, pipeline.ranks) for pipeline in training.pipelines]
        communicators = open_pipelines(pipelines, TIMEOUT_S)
        stages: dict[tuple[int, int], Any] = {
            (number, ranks.index(rank)): training.stage(number, ranks.index(rank))
            for number, ranks in enumerate(placed)
        }
        flow = flow_of(rank, placed, [pair.forward for pair in communicators])
        gradients, found = [], {}
        for turn in range(2):
            ticks = [[(number, 20 * turn + 2 * tick + number) for number in range(2)] for tick in range(5)]
            found |= run_ticks(flow, ticks)
            execute(
                program_of(training.schedule), rank, stages, training.micro_batches(), communicators, SpanRecorder()
            )
            gradients += [str(parameter.grad) for stage in stages.values() for _, parameter in stage.named_parameters()]
        return gradients, found

    results = FakeNccl(4, slots).run(body)
    assert sorted(key for _, found in results for key in found) == [*range(10), *range(20, 30)]
    assert all(gradients and "None" not in gradients for gradients, _ in results)


def test_ticks_that_ranks_see_in_different_orders_are_seen() -> None:
    """Messages then meet other micro-batches' receives: the order of entries decides, and must be the driver's."""

    def body(rank: int) -> None:
        communicator = Communicator("model", (0, 1), step=1, timeout_s=TIMEOUT_S)
        run_ticks(flow_of(rank, [(0, 1)], [communicator]), [[(0, 0)], [(0, 1)]][:: 1 if rank else -1])

    with pytest.raises((AssertionError, RuntimeError)):
        FakeNccl(2, PLENTY).run(body)


def test_few_messages_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_flow, "MOST_IN_FLIGHT", 2)
    pipelines = [[0, 1, 2, 3]] * 3 + [[3, 2, 1, 0]] * 3
    assert check(4, pipelines, [[(number, number) for number in range(6)]], PLENTY).most_held == 2
