"""Runs a schedule: walks one rank's operations and messages, over all pipelines at once.

Receives are posted before what is computed while they arrive, and sends stay in flight, so a rank waits only where the
schedule makes it wait, and in no circle: `fuse.intrastage.message_order` says why. The executor knows stages and
messages; of models, losses and PPO it knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fuse.intrastage.cost_profile import shape_of
from fuse.intrastage.message_order import Action, Message, Step, message_from, message_into
from fuse.intrastage.observed import TRAIN, shape_arguments
from fuse.intrastage.planned_times import operation_name
from fuse.intrastage.program import Program
from fuse.trace import SpanRecorder
from schedules import Kind, Op, Problem

if TYPE_CHECKING:  # what computes imports torch: a schedule of other stages is walked without
    from torch import Tensor

    from fuse.intrastage.communication import Communicator, PipelineCommunicators, Transfer
    from fuse.intrastage.stage import Stage
    from fuse.micro_batch import MicroBatch

MOST_IN_FLIGHT = 8
"""Messages of a rank at once: on a GPU each may hold a kernel. Enough for both directions of two pipelines, twice."""


def execute(
    program: Program,
    rank: int,
    stages: Mapping[tuple[int, int], Stage],
    micro_batches: Sequence[Sequence[MicroBatch]],
    communicators: Sequence[PipelineCommunicators],
    trace: SpanRecorder,
    *,
    category: str = TRAIN,
) -> None:
    """Run a rank's steps; afterwards the stages' parameters hold the gradients of all micro-batches, added up.

    stages: this rank's stages by (pipeline, stage).
    micro_batches, communicators: by pipeline; a data-parallel replica is a pipeline with micro-batches of its own.
    trace: gets one span per operation, which starts when its input is there; `wait_s` says how long it had to wait.
    category: of the spans.

    Raises:
        ValueError: the schedule splits a backward of a stage that cannot; nothing has run here.
        CommunicationError: a peer died or did not answer in time.
    """
    steps = program.steps(rank)
    _check_splits(steps, stages)
    expected_counts = [pipeline.num_micro_batches for pipeline in program.problem.pipelines]
    assert [len(batches) for batches in micro_batches] == expected_counts
    run = _Run(program.problem, rank, stages, micro_batches, communicators)
    for step in steps:
        if step.action is Action.SEND:
            run.send(step.op)
        elif step.action is Action.RECEIVE:
            run.receive(step.op)
        else:
            run.compute(step, trace, category)
    run.finish()


def _check_splits(steps: Sequence[Step], stages: Mapping[tuple[int, int], Stage]) -> None:
    for _, op, _ in steps:
        if op.kind is Kind.I and not stages[op.pipeline, op.stage].can_split_backward:
            raise ValueError(
                f"schedule splits a backward ({op}) of a stage that cannot: build the stage with split_backward=True, "
                f"or leave input_grad_ticks and weight_grad_ticks out of the problem"
            )


class _Run:
    """Messages of one walk: results that wait to be sent or used, and what is in flight, in the order it started."""

    def __init__(
        self,
        problem: Problem,
        rank: int,
        stages: Mapping[tuple[int, int], Stage],
        micro_batches: Sequence[Sequence[MicroBatch]],
        communicators: Sequence[PipelineCommunicators],
    ) -> None:
        self._problem, self._pipelines = problem, problem.pipelines
        self._stages, self._micro_batches, self._communicators = stages, micro_batches, communicators
        self._rank = rank
        self._results: dict[Message, Tensor] = {}
        self._in_flight: dict[Message, Transfer] = {}

    def compute(self, step: Step, trace: SpanRecorder, category: str) -> None:
        """Run the operation on its input, which it waits for, and keep its result."""
        op, ready = step.op, trace.mark()
        received = self._take_input(op)
        for message in step.used:
            if message in self._in_flight:
                self._in_flight.pop(message).wait()
        start = trace.mark()
        result = self._run_stage(op, received)
        end = trace.mark()
        if result is not None:
            self._results[message_from(op)] = result
        arguments = shape_arguments(shape_of(self._micro_batches[op.pipeline][op.micro_batch]))
        name = operation_name(self._problem, op)
        trace.record(name, category, ready=ready, start=start, end=end, arguments=arguments)

    def send(self, op: Op) -> None:
        """Start sending what the operation made to the neighbouring stage on another rank."""
        self._make_room()
        message = message_from(op)
        self._in_flight[message] = self._communicator(op).send(
            self._results.pop(message), stage=op.stage, micro_batch=op.micro_batch, op=operation_name(self._problem, op)
        )

    def receive(self, op: Op) -> None:
        """Post the receive of what the operation needs from a neighbouring stage on another rank."""
        self._make_room()
        buffer = self._stages[op.pipeline, op.stage].boundary(self._micro_batches[op.pipeline][op.micro_batch])
        self._in_flight[message_into(op)] = self._communicator(op).receive(
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
        if op.kind is Kind.W or op.stage == self._first_stage(op):
            return None
        message = message_into(op)
        return self._results.pop(message) if message in self._results else self._in_flight.pop(message).wait()

    def _run_stage(self, op: Op, received: Tensor | None) -> Tensor | None:
        stage = self._stages[op.pipeline, op.stage]
        if op.kind is Kind.F:
            return stage.forward(op.micro_batch, self._micro_batches[op.pipeline][op.micro_batch], received)
        if op.kind is Kind.W:
            stage.backward_weight(op.micro_batch)
            return None
        backward = stage.backward_input if op.kind is Kind.I else stage.backward
        return backward(op.micro_batch, received)

    def _communicator(self, op: Op) -> Communicator:
        pair = self._communicators[op.pipeline]
        return pair.forward if op.kind is Kind.F else pair.backward

    def _first_stage(self, op: Op) -> int:
        """At which operations like this one take no input."""
        return 0 if op.kind is Kind.F else self._pipelines[op.pipeline].num_stages - 1
