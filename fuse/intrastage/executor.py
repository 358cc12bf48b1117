"""Runs a schedule: walks one rank's operations, over all pipelines at once.

Receives are posted ahead and sends stay in flight, so a rank waits only where the schedule makes it wait.
The executor knows stages and messages; of models, losses and PPO it knows nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

import schedules
from fuse.intrastage.communication import Communicator, PipelineCommunicators, Transfer
from fuse.intrastage.planned_times import PlannedTimes, operation_name
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch
from fuse.trace import Span, SpanRecorder, now_s
from schedules import Kind, Op, Schedule

_RECEIVES_AHEAD = 2
"""Receives posted per channel: one arrives while the one before it is used, so a send never waits for its receiver."""


def execute(
    schedule: Schedule,
    rank: int,
    stages: Mapping[tuple[int, int], Stage],
    micro_batches: Sequence[Sequence[MicroBatch]],
    communicators: Sequence[PipelineCommunicators],
    trace: SpanRecorder,
    *,
    planned: PlannedTimes | None = None,
) -> None:
    """Run `schedule.ranks[rank]`; afterwards the stages' parameters hold the gradients of all micro-batches, added up.

    stages: this rank's stages by (pipeline, stage).
    micro_batches, communicators: by pipeline; a data-parallel replica is a pipeline with micro-batches of its own.
    trace: gets one span per operation, which starts when its input is there; `wait_s` says how long it had to wait.
    planned: of this schedule; spans then say when they were to run (`planned_start_s`, `planned_end_s`, from the
        step's first operation).

    Raises:
        ValueError: the schedule is illegal, or splits a backward of a stage that cannot; nothing has run here.
        CommunicationError: a peer died or did not answer in time.
    """
    _check(schedule)
    _check_splits(schedule, rank, stages)
    expected_counts = [pipeline.num_micro_batches for pipeline in schedule.problem.pipelines]
    assert [len(batches) for batches in micro_batches] == expected_counts
    run = _Run(schedule, rank, stages, micro_batches, communicators)
    for op in schedule.ranks[rank]:
        ready_s = now_s()
        received = run.take_input(op)
        arrived_s = now_s()
        run.post_after(op)
        start_s = now_s()
        result = run.compute(op, received)
        end_s = now_s()
        if result is not None:
            run.hand_on(op, result)
        sequences, tokens = micro_batches[op.pipeline][op.micro_batch].input_ids.shape
        arguments: dict[str, object] = {
            "tokens": sequences * tokens,
            "sequences": sequences,
            "wait_s": arrived_s - ready_s,
        }
        if planned is not None:
            arguments |= {"planned_start_s": planned.start_s[op], "planned_end_s": planned.end_s[op]}
        trace.add(Span(run.name(op), "train", start_s, end_s, arguments))
    run.finish()


@lru_cache(maxsize=64)
def _check(schedule: Schedule) -> None:
    schedules.check(schedule)


def _check_splits(schedule: Schedule, rank: int, stages: Mapping[tuple[int, int], Stage]) -> None:
    for op in schedule.ranks[rank]:
        if op.kind is Kind.I and not stages[op.pipeline, op.stage].can_split_backward:
            raise ValueError(
                f"schedule splits a backward ({op}) of a stage that cannot: build the stage with split_backward=True, "
                f"or leave input_grad_ticks and weight_grad_ticks out of the problem"
            )


_Channel = tuple[int, int, bool]
"""Pipeline, receiving stage, and whether forward: the messages of a communicator between two neighbouring stages."""

_Message = tuple[int, int, int, bool]
"""Pipeline, receiving stage, micro-batch, and whether forward; B and I take and make the same messages."""


class _Run:
    """Messages of one walk: posted receives, results handed over on this rank, sends in flight."""

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
        self._local: dict[_Message, Tensor] = {}
        self._sends: dict[int, dict[_Message, Transfer]] = {}  # by the rank that receives
        self._posted: dict[_Message, Transfer] = {}
        self._unposted: dict[_Channel, deque[Op]] = {}
        for op in schedule.ranks[rank]:
            source = self._source_stage(op)
            if source is not None and self._pipelines[op.pipeline].ranks[source] != rank:
                self._unposted.setdefault(_channel_into(op), deque()).append(op)
        for channel in self._unposted:
            for _ in range(_RECEIVES_AHEAD):
                self._post_next(channel)

    def name(self, op: Op) -> str:
        return operation_name(self._problem, op)

    def take_input(self, op: Op) -> Tensor | None:
        """What the operation needs from its neighbour; waits for it. None at the end of the pipeline it starts from."""
        source = self._source_stage(op)
        if source is None:
            return None
        message = _message_into(op)
        if message in self._local:
            return self._local.pop(message)
        received = self._posted.pop(message).wait()
        self._release(self._pipelines[op.pipeline].ranks[source], (op.pipeline, source, *message[2:]))
        return received

    def post_after(self, op: Op) -> None:
        """Post the receive that follows the operation's in its channel."""
        if _channel_into(op) in self._unposted and op.kind is not Kind.W:
            self._post_next(_channel_into(op))

    def compute(self, op: Op, received: Tensor | None) -> Tensor | None:
        stage = self._stages[op.pipeline, op.stage]
        if op.kind is Kind.F:
            return stage.forward(op.micro_batch, self._micro_batches[op.pipeline][op.micro_batch], received)
        if op.kind is Kind.W:
            stage.backward_weight(op.micro_batch)
            return None
        backward = stage.backward_input if op.kind is Kind.I else stage.backward
        return backward(op.micro_batch, received)

    def hand_on(self, op: Op, result: Tensor) -> None:
        """Give the result to the neighbouring stage, on this rank or another."""
        ranks = self._pipelines[op.pipeline].ranks
        target = op.stage + (1 if op.kind is Kind.F else -1)
        message = op.pipeline, target, op.micro_batch, op.kind is Kind.F
        if ranks[target] == ranks[op.stage]:
            self._local[message] = result
        else:
            transfer = self._communicator(op).send(result, stage=op.stage, micro_batch=op.micro_batch, op=self.name(op))
            self._sends.setdefault(ranks[target], {})[message] = transfer

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        for transfers in self._sends.values():
            for transfer in transfers.values():
                transfer.wait()
        assert not self._posted
        assert not self._local

    def _release(self, rank: int, last: _Message) -> None:
        """Let go of what `rank` has long received: what it used before the operation `last`, whose result is here."""
        transfers, positions = self._sends.get(rank, {}), self._positions.of(rank)
        for message in [one for one in transfers if positions[one] <= positions[last]]:
            transfers.pop(message).wait()

    def _post_next(self, channel: _Channel) -> None:
        """Post the channel's next receive; a legal schedule uses messages in the order they are sent."""
        if self._unposted[channel]:
            op = self._unposted[channel].popleft()
            buffer = self._stages[op.pipeline, op.stage].boundary(self._micro_batches[op.pipeline][op.micro_batch])
            self._posted[_message_into(op)] = self._communicator(op).receive(
                buffer, stage=op.stage, micro_batch=op.micro_batch, op=self.name(op)
            )

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


def _channel_into(op: Op) -> _Channel:
    return op.pipeline, op.stage, op.kind is Kind.F


def _message_into(op: Op) -> _Message:
    return op.pipeline, op.stage, op.micro_batch, op.kind is Kind.F
