"""What `fuse.driver.update_spans` reads, and when."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.driver.update_spans import UpdateSpans
from fuse.trace import Span
from fuse.workers.errors import WorkerError


class Recording:
    """A worker, and the call that drains it. error: by which the next call ends."""

    def __init__(self, name: str) -> None:
        self.name, self.spans, self.error = name, list[Span](), None

    def record(self, category: str) -> None:
        self.spans.append(Span(f"{self.name}: {category}", category, 0.0, 1.0))

    def drain_spans(self) -> Any:
        drained, self.spans = self.spans, []
        error = self.error

        def result() -> list[Span]:
            if error is not None:
                raise error
            return drained

        return SimpleNamespace(result=result, has_ended=True)


class Learner:
    """Hears what a planner of training does, or one of rollouts."""

    def __init__(self) -> None:
        self.heard: list[list[str]] = []
        self.num_weighed = 0

    def observe(self, spans: Any) -> None:
        self.heard.append([span.name for span in spans])

    observe_spans = observe

    def weigh(self) -> None:
        self.num_weighed += 1


@pytest.fixture
def run() -> Any:
    engines, models = [Recording("engine 0"), Recording("engine 1")], [Recording("model 0"), Recording("model 1")]
    training, rollouts = Learner(), Learner()
    of_engines = SimpleNamespace(
        workers=engines,
        call=lambda method: [method(one).result() for one in engines],
        by_device=lambda found: found,
    )
    made: Any = UpdateSpans
    spans = made(of_engines, lambda: SimpleNamespace(workers=models, planner=training), rollouts)
    return SimpleNamespace(spans=spans, engines=engines, models=models, training=training, rollouts=rollouts)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: engines and models here are no handles of workers."""

    def gather(futures: Sequence[Any]) -> list[Any]:
        return [one.result() for one in futures]

    monkeypatch.setattr("fuse.driver.update_spans.gather", gather)
    monkeypatch.setattr("fuse.driver.update_spans.GenerationHandle", Recording)


def take_update(run: Any) -> dict[str, dict[str, list[Span]]]:
    for engine in run.engines:
        engine.record("generate")
    run.spans.ask_engines()
    for model in run.models:
        model.record("train")
    planned: Any = SimpleNamespace(beside=lambda spans: [[one._replace(end_s=2.0) for one in own] for own in spans])
    assert run.spans.read_after(lambda: "reports", planned)() == "reports"
    for engine in run.engines:
        engine.record("weights")
    for model in run.models:
        model.record("copies")
    drained: dict[str, dict[str, list[Span]]] = run.spans.drain()
    return drained


def test_parts_of_an_update_are_put_together_and_taught_once(run: Any) -> None:
    for update in range(1, 3):
        drained = take_update(run)
        assert {
            device: {worker: [span.category for span in spans] for worker, spans in of_device.items()}
            for device, of_device in drained.items()
        } == {device: {"generation": ["generate", "weights"], "model": ["train", "copies"]} for device in drained}
        assert list(drained) == ["device0", "device1"]
        assert [[span.end_s for span in of_device["model"]] for of_device in drained.values()] == [[2.0, 1.0]] * 2
        assert run.training.heard == [["model 0: train", "model 1: train"]] * update
        assert len(run.rollouts.heard) == 4 * update
        assert run.rollouts.num_weighed == update


def test_an_update_without_training_is_read_and_taught_at_its_end(run: Any) -> None:
    run.engines[1].record("generate")
    assert [span.category for span in run.spans.drain()["device1"]["generation"]] == ["generate"]
    assert ["engine 1: generate"] in run.rollouts.heard
    run.engines[1].record("generate")
    run.spans.forget()
    assert run.spans.drain()["device1"]["generation"] == []


def test_an_engine_that_dies_before_it_tells_has_told_nothing(run: Any) -> None:
    dying = run.engines[0]
    dying.record("generate")
    dying.error = WorkerError(0, "generation worker", "killed", is_death=True)
    run.spans.ask_engines()
    dying.error = None  # another takes its place
    run.spans.read_after(lambda: None)()
    drained = run.spans.drain()
    assert drained["device0"]["generation"] == []

    dying.error = WorkerError(0, "generation worker", "ValueError: wrong")
    run.spans.ask_engines()
    with pytest.raises(WorkerError, match="wrong"):
        run.spans.read_after(lambda: None)()


def test_a_span_arrives_as_it_was() -> None:
    span = Span("F actor.0.1", "train", 1.0, 2.5, {"tokens": 3})
    assert pickle.loads(pickle.dumps(span)) == span  # noqa: S301
