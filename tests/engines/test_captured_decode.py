"""Captured decode steps: when, and that replays find all memory where it was. Graphs need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.driver import engine_choice
from fuse.engines.captured_decode import CapturedSteps, Step
from fuse.engines.transformers import TransformersEngine
from fuse.training.model_spec import ModelSpec

from .driving import Outputs, assert_same, collect, run
from .test_transformers import request

BuildModel = Callable[..., PreTrainedModel]
REQUESTS = [
    request(index, *shape, temperature=0.9) for index, shape in enumerate([(1, 50), (5, 20), (40, 40), (5, 60)])
]


class Replays:
    """Captures the steps of an engine, as far as a CPU can: they run anew, on memory that must not have moved."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.num_captures = self.num_replays = 0

    def __call__(self, step: Step) -> Step:
        self.num_captures += 1
        captured = list(self._addresses())

        def replay() -> Tensor:
            assert list(self._addresses()) == captured, "memory has moved since the capture"
            self.num_replays += 1
            return step()

        return replay

    def _addresses(self) -> Iterator[int]:
        engine = self._engine
        yield from (one.data_ptr() for one in engine._model.parameters())
        yield from (one.data_ptr() for layer in engine._cache._layers for one in (layer.keys, layer.values))
        yield from (
            engine._rows.inputs.token_ids.data_ptr(),
            engine._rows.inputs.positions.data_ptr(),
            len(engine._rows),
        )


def test_tokens_are_those_of_an_engine_without(build_model: BuildModel) -> None:
    """While buffers grow, samples come and go, the engine sleeps and its weights change."""
    weights = build_model(seed=1).state_dict()
    expected, engine = (TransformersEngine(build_model(), max_batch=2) for _ in range(2))
    replays = Replays(engine)
    engine._captured = CapturedSteps(replays)
    for sleeps in (False, True):
        assert run(engine, REQUESTS) == run(expected, REQUESTS)
        for one in (engine, expected):
            if sleeps:
                one.sleep()
            one.load_weights({name: weight.clone() for name, weight in weights.items()})
    assert run(engine, REQUESTS) == run(expected, REQUESTS)
    assert 10 < 2 * replays.num_captures < replays.num_replays


def test_what_was_captured_before_buffers_grew_is_not_replayed(build_model: BuildModel) -> None:
    """One row, then three, for which there is no room, and the one again."""
    requests = [request(0, 1, 40), request(1, 5, 3), request(2, 7, 3)]
    engine = TransformersEngine(build_model(), max_batch=4)
    replays = Replays(engine)
    engine._captured = CapturedSteps(replays)
    engine.submit(requests[0])
    outputs: Outputs = {}
    for _ in range(8):
        collect(outputs, engine.step())
    assert replays.num_replays > 0
    run(engine, requests[1:], outputs)
    assert_same(outputs, run(TransformersEngine(build_model(), max_batch=4), requests))
    assert replays.num_captures == 2


def step_of(calls: list[str], name: str) -> Step:
    def step() -> Tensor:
        calls.append(name)
        return torch.zeros(())

    return step


def test_a_kind_is_captured_when_it_comes_again_and_again() -> None:
    calls: list[str] = []

    def capture(step: Step) -> Step:
        calls.append("capture")
        return step_of(calls, "replay")

    steps = CapturedSteps(capture)
    for kind in "aaabaaaaaab" + "a":
        steps.run(kind, step_of(calls, kind))
    assert calls == [*"aaabaaaa", "capture", "replay", "replay", "b", "replay"]
    steps.clear()
    steps.run("a", step_of(calls, "a"))
    assert calls[-1] == "a"


def test_only_the_latest_graphs_are_kept() -> None:
    calls: list[str] = []
    steps = CapturedSteps(lambda step: step)
    for kind in range(9):
        for _ in range(5):
            steps.run(kind, step_of(calls, "step"))
    assert list(steps._graphs) == list(range(1, 9))


def test_graphs_are_for_gpus(build_model: BuildModel) -> None:
    with pytest.raises(ValueError, match="captures_decode: the model is on cpu"):
        TransformersEngine(build_model(), captures_decode=True)


def test_the_option_of_a_run_reaches_the_engine(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    monkeypatch.setattr(engine_choice, "get_state_dict", lambda _: model.state_dict())
    factory = engine_choice.choose_engine("transformers", max_batch=1, captures_decode=True)
    with pytest.raises(ValueError, match="captures_decode: the model is on cpu"):
        factory(ModelSpec.of(model), [], "cpu")
