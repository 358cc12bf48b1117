"""Runs a schedule: walks one rank's operations and messages, over all pipelines at once.

Receives are posted before what is computed while they arrive, and sends stay in flight, so a rank waits only where the
schedule makes it wait, and in no circle: `fuse.intrastage.message_order` says why. The executor knows stages and
messages; of models, losses and PPO it knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import schedules
from fuse.intrastage.cost_profile import shape_of
from fuse.intrastage.message_order import Action, rank_steps
from fuse.intrastage.observed import TRAIN, shape_arguments
from fuse.intrastage.planned_times import operation_name
from fuse.trace import SpanRecorder
from schedules import Kind, Op, Schedule

if TYPE_CHECKING:  # what computes imports torch: a schedule of other stages is walked without
    from torch import Tensor

    from fuse.intrastage.communication import Communicator, PipelineCommunicators, Transfer
    from fuse.intrastage.stage import Stage
    from fuse.micro_batch import MicroBatch

MOST_IN_FLIGHT = 8
"""Messages of a rank at once: on a GPU each may hold a kernel. Enough for both directions of two pipelines, twice."""


def execute(
    schedule: Schedule,
    rank: int,
    stages: Mapping[tuple[int, int], Stage],
    micro_batches: Sequence[Sequence[MicroBatch]],
    communicators: Sequence[PipelineCommunicators],
    trace: SpanRecorder,
    *,
    category: str = TRAIN,
    is_checked: bool = False,
) -> None:
    """Run `schedule.ranks[rank]`; afterwards the stages' parameters hold the gradients of all micro-batches, added up.

    stages: this rank's stages by (pipeline, stage).
    micro_batches, communicators: by pipeline; a data-parallel replica is a pipeline with micro-batches of its own.
    trace: gets one span per operation, which starts when its input is there; `wait_s` says how long it had to wait.
    category: of the spans.
    is_checked: whoever made the schedule has called `check_once` with it, for all ranks.

    Raises:
        ValueError: the schedule is illegal, or splits a backward of a stage that cannot; nothing has run here.
        CommunicationError: a peer died or did not answer in time.
    """
    if not is_checked:
        check_once(schedule)
    _check_splits(schedule, rank, stages)
    expected_counts = [pipeline.num_micro_batches for pipeline in schedule.problem.pipelines]
    assert [len(batches) for batches in micro_batches] == expected_counts
    run = _Run(schedule, rank, stages, micro_batches, communicators)
    for step in rank_steps(schedule, rank):
        if step.action is Action.SEND:
            run.send(step.op)
        elif step.action is Action.RECEIVE:
            run.receive(step.op)
        else:
            run.compute(step.op, trace, category)
    run.finish()


@lru_cache(maxsize=16)
def check_once(schedule: Schedule) -> None:
    """As `schedules.check`, at once for one that was accepted before."""
    schedules.check(schedule)


def _check_splits(schedule: Schedule, rank: int, stages: Mapping[tuple[int, int], Stage]) -> None:
    for op in schedule.ranks[rank]:
        if op.kind is Kind.I and not stages[op.pipeline, op.stage].can_split_backward:
            raise ValueError(
                f"schedule splits a backward ({op}) of a stage that cannot: build the stage with split_backward=True, "
                f"or leave input_grad_ticks and weight_grad_ticks out of the problem"
            )


_Message = tuple[int, int, int, bool]
"""Pipeline, receiving stage, micro-batch, and whether forward; B and I take and make the same messages."""


class _Run:
    """Messages of one walk: results that wait to be sent or used, and what is in flight, in the order it started."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[tuple[int, int], Stage],
        micro_batches: Sequence[Sequence[MicroBatch]],
        communicators: Sequence[PipelineCommunicators],
    ) -> None:
        self._problem, self._pipelines = schedule.problem, schedule.problem.pipelines
        self._stages, self._micro_batches, self._communicators = stages, micro_batches, communicators
        self._rank = rank
        self._positions = _Positions(schedule)
        self._results: dict[_Message, Tensor] = {}
        self._in_flight: dict[_Message, Transfer] = {}

    def compute(self, op: Op, trace: SpanRecorder, category: str) -> None:
        """Run the operation on its input, which it waits for, and keep its result."""
        ready = trace.mark()
        received = self._take_input(op)
        start = trace.mark()
        result = self._run_stage(op, received)
        end = trace.mark()
        if result is not None:
            self._results[_message_from(op)] = result
        arguments = shape_arguments(shape_of(self._micro_batches[op.pipeline][op.micro_batch]))
        name = operation_name(self._problem, op)
        trace.record(name, category, ready=ready, start=start, end=end, arguments=arguments)

    def send(self, op: Op) -> None:
        """Start sending what the operation made to the neighbouring stage on another rank."""
        self._make_room()
        message = _message_from(op)
        self._in_flight[message] = self._communicator(op).send(
            self._results.pop(message), stage=op.stage, micro_batch=op.micro_batch, op=operation_name(self._problem, op)
        )

    def receive(self, op: Op) -> None:
        """Post the receive of what the operation needs from a neighbouring stage on another rank."""
        self._make_room()
        buffer = self._stages[op.pipeline, op.stage].boundary(self._micro_batches[op.pipeline][op.micro_batch])
        self._in_flight[_message_into(op)] = self._communicator(op).receive(
            buffer, stage=op.stage, micro_batch=op.micro_batch, op=operation_name(self._problem, op)
        )

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        while self._in_flight:
            self._finish_oldest()
        assert not self._results

    def _make_room(self) -> None:
        """Wait for the oldest messages, where as many are in flight as may be."""
        while len(self._in_flight) >= MOST_IN_FLIGHT:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        message = next(iter(self._in_flight))
        tensor = self._in_flight.pop(message).wait()
        if self._pipelines[message[0]].ranks[message[1]] == self._rank:
            self._results[message] = tensor

    def _take_input(self, op: Op) -> Tensor | None:
        """What the operation needs from its neighbour; waits for it. None at the end of the pipeline it starts from."""
        source = self._source_stage(op)
        if source is None:
            return None
        message = _message_into(op)
        if message in self._results:
            received = self._results.pop(message)
        else:
            received = self._in_flight.pop(message).wait()
        source_rank = self._pipelines[op.pipeline].ranks[source]
        if source_rank != self._rank:
            self._release(source_rank, (op.pipeline, source, *message[2:]))
        return received

    def _run_stage(self, op: Op, received: Tensor | None) -> Tensor | None:
        stage = self._stages[op.pipeline, op.stage]
        if op.kind is Kind.F:
            return stage.forward(op.micro_batch, self._micro_batches[op.pipeline][op.micro_batch], received)
        if op.kind is Kind.W:
            stage.backward_weight(op.micro_batch)
            return None
        backward = stage.backward_input if op.kind is Kind.I else stage.backward
        return backward(op.micro_batch, received)

    def _release(self, rank: int, last: _Message) -> None:
        """Let go of what `rank` has long received: what it used before the operation `last`, whose result is here."""
        positions = self._positions.of(rank)
        for message in [one for one in self._in_flight if one in positions and positions[one] <= positions[last]]:
            self._in_flight.pop(message).wait()

    def _communicator(self, op: Op) -> Communicator:
        pair = self._communicators[op.pipeline]
        return pair.forward if op.kind is Kind.F else pair.backward

    def _source_stage(self, op: Op) -> int | None:
        """The stage whose result the operation needs; W needs its own stage's alone."""
        if op.kind is Kind.W:
            return None
        source = op.stage - 1 if op.kind is Kind.F else op.stage + 1
        return source if 0 <= source < self._pipelines[op.pipeline].num_stages else None


class _Positions:
    """Where in its rank's order an operation stands, by what it receives; halves of backwards that do not are left out.

    That is a `_Message` for operations at the end of a pipeline too, which receive nothing.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._by_rank: dict[int, dict[_Message, int]] = {}

    def of(self, rank: int) -> Mapping[_Message, int]:
        if rank not in self._by_rank:
            ops = enumerate(self._schedule.ranks[rank])
            self._by_rank[rank] = {_message_into(op): index for index, op in ops if op.kind is not Kind.W}
        return self._by_rank[rank]


def _message_into(op: Op) -> _Message:
    return op.pipeline, op.stage, op.micro_batch, op.kind is Kind.F


def _message_from(op: Op) -> _Message:
    return op.pipeline, op.stage + (1 if op.kind is Kind.F else -1), op.micro_batch, op.kind is Kind.F
