"""The executor on one rank: what it refuses, in which order it works, what it records. Several: tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.intrastage.executor import execute
from fuse.intrastage.observed import drift_of
from fuse.intrastage.planned_times import times_of, with_planned
from fuse.intrastage.program import program_of
from fuse.micro_batch import MicroBatch
from fuse.trace import Span, SpanRecorder
from schedules import Kind, Op, Pipeline, Problem, Schedule
from schedules.baselines import one_f_one_b

BATCHES = [
    MicroBatch(input_ids=torch.zeros(1, tokens, dtype=torch.int64), head_index=torch.tensor([0]), targets=None)
    for tokens in (3, 4)
]
PIPELINE = Pipeline(name="actor", ranks=(0, 0), num_micro_batches=2, forward_ticks=(1, 1), backward_ticks=(2, 2))


class RecordingStage:
    """Adds its number to what passes; its calls show what the executor asked for."""

    def __init__(self, number: int, is_last: bool, calls: list[str], can_split: bool = True) -> None:
        self.number, self.is_last, self.calls, self.can_split_backward = number, is_last, calls, can_split
        self.model_shapes: dict[str, torch.Size] = {}
        self.tied_names = self.undecayed_names = frozenset[str]()

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        raise AssertionError("nothing is received on a single rank")

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        self.calls.append(f"F{self.number}.{index} {None if stage_input is None else stage_input.tolist()}")
        return None if self.is_last else torch.tensor([10.0 * self.number + index])

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        return self._backward("B", index, output_grad)

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        return self._backward("I", index, output_grad)

    def backward_weight(self, index: int) -> None:
        self.calls.append(f"W{self.number}.{index}")

    def _backward(self, kind: str, index: int, output_grad: Tensor | None) -> Tensor | None:
        self.calls.append(f"{kind}{self.number}.{index} {None if output_grad is None else output_grad.tolist()}")
        return None if self.number == 0 else torch.tensor([-1.0 - index])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())


def run(schedule: Schedule, can_split: bool = True) -> tuple[list[str], SpanRecorder]:
    calls: list[str] = []
    stages = {(0, 0): RecordingStage(0, False, calls), (0, 1): RecordingStage(1, True, calls, can_split)}
    recorder = SpanRecorder()
    execute(program_of(schedule), 0, stages, [BATCHES], [], recorder)
    return calls, recorder


def schedule_of(*texts: str) -> Schedule:
    return Schedule(Problem(num_ranks=1, pipelines=(PIPELINE,)), (tuple(map(Op.parse, texts)),))


LEGAL = ("F0.0.0", "F0.1.0", "B0.1.0", "F0.0.1", "F0.1.1", "B0.0.0", "B0.1.1", "B0.0.1")


def test_operations_run_in_the_schedules_order_with_their_neighbours_results() -> None:
    calls, _ = run(schedule_of(*LEGAL))
    assert calls == [
        "F0.0 None",
        "F1.0 [0.0]",
        "B1.0 None",
        "F0.1 None",
        "F1.1 [1.0]",
        "B0.0 [-1.0]",
        "B1.1 None",
        "B0.1 [-2.0]",
    ]


def test_spans_name_the_operation_and_its_tokens() -> None:
    _, recorder = run(schedule_of(*LEGAL))
    spans = recorder.drain()
    assert [span.name for span in spans[:2]] == ["F actor.0.0", "F actor.1.0"]
    assert {span.category for span in spans} == {"train"}
    assert [span.arguments["tokens"] for span in spans] == [3, 3, 3, 4, 4, 3, 4, 4]
    assert all(float(span.arguments["wait_s"]) >= 0 for span in spans)


def test_spans_say_when_the_operation_was_planned() -> None:
    schedule = schedule_of(*LEGAL)
    planned = [(float(index), index + 0.5) for index in range(8)]
    _, recorder = run(schedule)
    optimizer = Span("step actor", "optimizer", 0.0, 1.0)
    of_step = [*recorder.drain(), optimizer]
    told = with_planned(of_step + of_step, [*[None] * 8, *planned])
    assert told[:9] == of_step, "nothing was planned of the first step"
    assert told[-1] is optimizer
    spans = told[9:-1]
    assert [span.arguments["planned_start_s"] for span in spans] == [float(index) for index in range(8)]
    assert [span.arguments["planned_end_s"] for span in spans] == [index + 0.5 for index in range(8)]
    assert [(span.name, span.start_s, span.arguments["tokens"]) for span in spans] == [
        (span.name, span.start_s, span.arguments["tokens"]) for span in of_step[:-1]
    ]


class FakeDevice:
    """Works later than it is asked to, as a GPU does, one operation after the other."""

    def __init__(self, takes_s: Mapping[Op, float]) -> None:
        self.takes_s, self.done_s, self.num_waits = takes_s, 100.0, 0

    def run(self, op: Op) -> None:
        self.done_s += self.takes_s[op]

    def mark(self) -> float:
        return self.done_s

    def seconds(self, marks: Sequence[float]) -> list[float]:
        self.num_waits += 1
        return list(marks)


class FakeDeviceStage(RecordingStage):
    def __init__(self, number: int, is_last: bool, device: FakeDevice) -> None:
        super().__init__(number, is_last, [])
        self.device = device

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        self.device.run(Op.parse(f"F0.{self.number}.{index}"))
        return super().forward(index, micro_batch, stage_input)

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        self.device.run(Op.parse(f"B0.{self.number}.{index}"))
        return super().backward(index, output_grad)


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_a_plan_carried_out_exactly_on_a_device_does_not_drift(slower: float) -> None:
    """Times are the device's, not those of the host, which has asked for everything at once."""
    schedule = schedule_of(*LEGAL)
    seconds = {op: 0.25 if op.kind is Kind.F else 0.5 + 0.1 * op.stage for op in schedule.ranks[0]}
    planned = times_of(schedule, seconds, (0.0,))
    device = FakeDevice({op: slower * second if op.stage == 1 else second for op, second in seconds.items()})
    stages = {(0, number): FakeDeviceStage(number, number == 1, device) for number in range(2)}
    recorder = SpanRecorder(device)
    execute(program_of(schedule), 0, stages, [BATCHES], [], recorder)
    assert device.num_waits == 0, "a step does not wait for the device"
    spans = with_planned(recorder.drain(), planned.of_rank(0))
    assert device.num_waits == 1
    drift = drift_of(spans)
    assert drift is not None
    if slower == 1:
        assert drift == pytest.approx(0, abs=1e-9)
        starts = [span.start_s - 100 for span in spans]
        assert starts == pytest.approx(planned.start_s[0])
    else:
        assert drift > 0.3


def split_schedule(*texts: str) -> Schedule:
    splittable = replace(PIPELINE, input_grad_ticks=(1, 1), weight_grad_ticks=(1, 1))
    return Schedule(Problem(num_ranks=1, pipelines=(splittable,)), (tuple(map(Op.parse, texts)),))


SPLIT = ("F0.0.0", "F0.1.0", "I0.1.0", "F0.0.1", "B0.0.0", "F0.1.1", "B0.1.1", "W0.1.0", "I0.0.1", "W0.0.1")


def test_halves_of_a_backward_run_where_the_schedule_has_them() -> None:
    """A whole backward takes the gradient that an input half made, and the other way round."""
    calls, recorder = run(split_schedule(*SPLIT))
    assert calls[2:] == [
        "I1.0 None",
        "F0.1 None",
        "B0.0 [-1.0]",
        "F1.1 [1.0]",
        "B1.1 None",
        "W1.0",
        "I0.1 [-2.0]",
        "W0.1",
    ]
    assert [span.name for span in recorder.drain()][-3:] == ["W actor.1.0", "I actor.0.1", "W actor.0.1"]


def test_a_stage_that_cannot_split_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"splits a backward \(I0\.1\.0\) .*split_backward=True.*input_grad_ticks"):
        run(split_schedule(*SPLIT), can_split=False)


class Mailbox:
    """A direction of a pipeline: whatever is asked for is there. most_held: of what was sent and not let go."""

    def __init__(self) -> None:
        self.held = self.most_held = self.num_sent = 0

    def send(self, tensor: Tensor, **_: object) -> Letter:
        self.num_sent += 1
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        return Letter(tensor, self)

    def receive(self, buffer: Tensor, **_: object) -> Letter:
        return Letter(buffer, None)


class Letter:
    def __init__(self, tensor: Tensor, sent: Mailbox | None) -> None:
        self.tensor, self._sent = tensor, sent

    def wait(self) -> Tensor:
        if self._sent is not None:
            self._sent.held -= 1
        return self.tensor


class Receiving(RecordingStage):
    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize("rank", range(4))
def test_what_was_sent_is_let_go_once_the_neighbour_has_used_it(rank: int) -> None:
    pipeline = Pipeline(
        name="actor", ranks=(0, 1, 2, 3), num_micro_batches=24, forward_ticks=(1,) * 4, backward_ticks=(2,) * 4
    )
    schedule = one_f_one_b(Problem(num_ranks=4, pipelines=(pipeline,)))
    stages = {(0, rank): Receiving(rank, rank == 3, [])}
    forward, backward = Mailbox(), Mailbox()
    pair: Any = SimpleNamespace(forward=forward, backward=backward)
    execute(program_of(schedule), rank, stages, [[BATCHES[0]] * 24], [pair], SpanRecorder())
    for mailbox, sends in ((forward, rank < 3), (backward, rank > 0)):
        assert mailbox.num_sent == 24 * sends
        assert mailbox.held == 0
        assert mailbox.most_held <= 4, "of as many micro-batches as are under way"
