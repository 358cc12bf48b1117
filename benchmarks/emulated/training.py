"""Training that takes its time and computes nothing: real schedules, walked by the real executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.messages import EmulatedCommunicator, Post, latest
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.executor import execute
from fuse.intrastage.observed import MESSAGE, TRAIN, shape_arguments
from fuse.intrastage.program import Program
from fuse.trace import Span, SpanRecorder, now_s
from schedules import Kind, Op, Pipeline, evaluate

_TICK_S = 1e-7
"""Of predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedRound:
    """What trains at once, by sizes. roles, shapes: by pipeline, and by micro-batch.

    is_observed: nothing is known yet of what its operations take. stepping: roles whose optimizers step after it.
    """

    program: Program
    roles: tuple[str, ...]
    shapes: tuple[tuple[Shape, ...], ...]
    is_observed: bool
    stepping: tuple[str, ...]

    @property
    def pipelines(self) -> tuple[Pipeline, ...]:
        """Of its program."""
        return self.program.problem.pipelines

    def operation_s(self, costs: EmulatedCosts, op: Op) -> float:
        """Seconds of an operation of its schedule."""
        num_stages = self.pipelines[op.pipeline].num_stages
        shape = self.shapes[op.pipeline][op.micro_batch]
        return costs.training[self.roles[op.pipeline]].operation_s(op.kind, shape.size, num_stages)

    def optimizer_s(self, costs: EmulatedCosts, role: str) -> float:
        """Seconds of an optimizer step on each device: of its stage."""
        num_stages = max(
            pipeline.num_stages for pipeline, of in zip(self.pipelines, self.roles, strict=True) if of == role
        )
        return costs.training[role].optimizer_s / num_stages

    def predicted_s(self, costs: EmulatedCosts) -> float:
        """Seconds that it should take: the schedule's, timed by the costs, and the optimizer steps after it."""
        schedule, rank_of = self.program.schedule(), self.program.problem.rank_of

        def transfer_ticks(source: Op, target: Op) -> int:
            if rank_of(source) == rank_of(target):
                return 0
            return round(costs.message(self.shapes[source.pipeline][source.micro_batch].size) / _TICK_S)

        timing = evaluate(schedule, lambda op: round(self.operation_s(costs, op) / _TICK_S), transfer_ticks)
        return timing.makespan * _TICK_S + sum(self.optimizer_s(costs, role) for role in self.stepping)


class EmulatedStage:
    """Is busy as long as each operation takes, and passes the moment of its end on; see `fuse.intrastage.stage.Stage`.

    Operations are queued, and messages sent before that moment has come.

    seconds: of an operation on a micro-batch.
    """

    can_split_backward = True

    def __init__(
        self, device: EmulatedDevice, seconds: Callable[[Kind, int], float], *, is_first: bool, is_last: bool
    ) -> None:
        self._device, self._seconds = device, seconds
        self._is_first, self._is_last = is_first, is_last

    def boundary(self, micro_batch: Any) -> None:
        return None

    def forward(self, index: int, micro_batch: Any, stage_input: float | None) -> float | None:
        return self._run(Kind.F, index, self._is_last)

    def backward(self, index: int, output_grad: float | None) -> float | None:
        return self._run(Kind.B, index, self._is_first)

    def backward_input(self, index: int, output_grad: float | None) -> float | None:
        return self._run(Kind.I, index, self._is_first)

    def backward_weight(self, index: int) -> None:
        self._run(Kind.W, index, True)

    def _run(self, kind: Kind, index: int, is_end: bool) -> float | None:
        self._device.queue(self._seconds(kind, index))
        return None if is_end else self._device.free_s


def train(
    one: EmulatedRound, rank: int, costs: EmulatedCosts, device: EmulatedDevice, post: Post, recorder: SpanRecorder
) -> None:
    """Take a rank's part of a round; all ranks do at once. recorder: gets the spans of a real rank."""
    walk(one, rank, costs, device, post, recorder, TRAIN)
    device.reach(latest(device.free_s, rank, one.program.problem.num_ranks, post))  # the gradients' norm
    for role in one.stepping:
        with recorder.span(f"step {role}", "optimizer"):
            device.work(one.optimizer_s(costs, role))


def walk(
    one: EmulatedRound,
    rank: int,
    costs: EmulatedCosts,
    device: EmulatedDevice,
    post: Post,
    recorder: SpanRecorder,
    category: str,
) -> None:
    """The operations of it; all ranks that have some take theirs at once. category: of their spans."""
    pipelines = one.pipelines
    stages: dict[tuple[int, int], Any] = {
        (number, stage): EmulatedStage(
            device,
            partial(_operation_s, one, costs, number, stage),
            is_first=stage == 0,
            is_last=stage == pipeline.num_stages - 1,
        )
        for number, pipeline in enumerate(pipelines)
        for stage, owner in enumerate(pipeline.ranks)
        if owner == rank
    }
    # Of a micro-batch the executor looks at nothing but its shape.
    micro_batches: list[Any] = [
        [
            SimpleNamespace(lengths=None, input_ids=SimpleNamespace(shape=(shape.num_sequences, shape.num_tokens)))
            for shape in shapes
        ]
        for shapes in one.shapes
    ]
    communicators: list[Any] = [
        SimpleNamespace(
            forward=_communicator(one, number, 1, costs, device, post),
            backward=_communicator(one, number, -1, costs, device, post),
        )
        for number in range(len(pipelines))
    ]
    if one.is_observed:
        _record_messages(one, stages, costs, recorder)
    execute(one.program, rank, stages, micro_batches, communicators, recorder, category=category)
    device.finish()


def _operation_s(one: EmulatedRound, costs: EmulatedCosts, pipeline: int, stage: int, kind: Kind, index: int) -> float:
    return one.operation_s(costs, Op(pipeline, stage, index, kind))


def _communicator(
    one: EmulatedRound, pipeline: int, step: int, costs: EmulatedCosts, device: EmulatedDevice, post: Post
) -> EmulatedCommunicator:
    ranks = one.pipelines[pipeline].ranks
    return EmulatedCommunicator(
        pipeline, ranks, step, post=post, device=device,
        seconds=lambda micro_batch: costs.message(one.shapes[pipeline][micro_batch].size),
    )  # fmt: skip


def _record_messages(
    one: EmulatedRound, stages: dict[tuple[int, int], Any], costs: EmulatedCosts, recorder: SpanRecorder
) -> None:
    """As a real rank does that has not trained before, for the smallest micro-batch and the largest."""
    for number, stage in stages:
        pipeline, order = one.pipelines[number], sorted(one.shapes[number], key=lambda one: one.size)
        if stage == pipeline.num_stages - 1:
            continue
        for shape in {order[0], order[-1]}:
            end_s = now_s()
            name = f"{MESSAGE} {pipeline.name}.{stage}.0"
            recorder.add(Span(name, MESSAGE, end_s - costs.message(shape.size), end_s, shape_arguments(shape)))
