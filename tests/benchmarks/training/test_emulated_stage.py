"""An emulated stage waits as long as its operations take, and passes on what stages pass on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fuse.benchmarks.training import emulated_stage
from fuse.benchmarks.training.emulated_stage import EmulatedStage, measure_oversleep
from fuse.intrastage.executor import execute
from fuse.intrastage.program import program_of
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch
from fuse.trace import SpanRecorder
from schedules import Kind, Op, Pipeline, Problem, Schedule

SECONDS = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.25, Kind.W: 0.75}
NOTHING = MicroBatch(
    input_ids=torch.zeros(1, 1, dtype=torch.int64), head_index=torch.zeros(1, dtype=torch.int64), targets=None
)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(emulated_stage, "time", SimpleNamespace(sleep=slept.append))  # others sleep by the real one
    return slept


def test_a_schedule_of_emulated_stages_waits_for_each_operation(slept: list[float]) -> None:
    pipeline = Pipeline(
        name="actor",
        ranks=(0, 0),
        num_micro_batches=1,
        forward_ticks=(1, 1),
        backward_ticks=(2, 2),
        input_grad_ticks=(1, 1),
        weight_grad_ticks=(1, 1),
    )
    ops = tuple(map(Op.parse, ("F0.0.0", "F0.1.0", "I0.1.0", "B0.0.0", "W0.1.0")))
    stages: dict[tuple[int, int], Stage] = {
        (0, stage): EmulatedStage(SECONDS, is_first=stage == 0, is_last=stage == 1, oversleep_s=0.25)
        for stage in range(2)
    }
    schedule = Schedule(Problem(num_ranks=1, pipelines=(pipeline,)), (ops,))
    execute(program_of(schedule), 0, stages, [[NOTHING]], [], SpanRecorder())
    assert slept == [0.75, 0.75, 1.0, 1.75, 0.5]


def test_without_halves_the_backward_stays_whole() -> None:
    assert EmulatedStage(SECONDS, is_first=True, is_last=True).can_split_backward
    assert not EmulatedStage({Kind.F: 1.0, Kind.B: 2.0}, is_first=True, is_last=True).can_split_backward


def test_ends_of_a_pipeline_pass_nothing_on(slept: list[float]) -> None:
    first, last = (EmulatedStage(SECONDS, is_first=not one, is_last=bool(one)) for one in range(2))
    hidden = first.forward(0, NOTHING, None)
    assert hidden is not None
    assert hidden.shape == first.boundary(NOTHING).shape
    assert last.forward(0, NOTHING, hidden) is None
    gradient = last.backward(0, None)
    assert gradient is not None
    assert first.backward(0, gradient) is None


def test_sleeping_takes_longer_than_asked() -> None:
    assert measure_oversleep(1e-3, repeats=3) > 0
