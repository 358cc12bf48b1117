"""The spans of an update, read while devices are at something else, so that the next update does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from fuse.driver.engines import Engines
from fuse.driver.model_start import Models
from fuse.driver.planned_spans import PlannedSpans
from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.trace import Span
from fuse.workers.calls import Future, gather
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle

_T = TypeVar("_T")

Spans = list[list[Span]]
"""Of each worker of a kind."""


class UpdateSpans:
    """Reads in parts: of engines while devices train, of model workers while weights travel, and what comes after.

    models: gives model workers and what plans their training. Of each update that, and `rollouts`, learn once.
    """

    def __init__(self, engines: Engines, models: Callable[[], Models], rollouts: RolloutPlanner) -> None:
        self._engines, self._models, self._rollouts = engines, models, rollouts
        self._asked: list[Future[list[Span]]] = []
        self._planned: PlannedSpans | None = None
        self._read: list[tuple[Spans, Spans]] = []

    def ask_engines(self) -> None:
        """A rollout is over; returns at once."""
        self._asked = [engine.drain_spans() for engine in self._engines.workers]

    def read_after(self, make: Callable[[], _T], planned: PlannedSpans | None = None) -> Callable[[], _T]:
        """Training is over: has something made of it, then reads what was recorded until now.

        planned: when its operations were to run.
        """
        self._planned = planned

        def made() -> _T:
            result = make()
            models = self._of_models()
            engines = [_told(asked) for asked in self._asked]
            self._learn(models, engines)
            self._read.append((models, engines))
            return result

        return made

    def drain(self) -> dict[str, dict[str, list[Span]]]:
        """Spans since the last call, by device and worker.

        Raises: WorkerError when a model worker died.
        """
        last = self._rest()
        if not self._read:
            self._learn(*last)
        parts, self._read = [*self._read, last], []
        models = _joined([of_models for of_models, _ in parts])
        engines = _joined([of_engines for _, of_engines in parts])
        pairs = enumerate(zip(self._engines.by_device(engines), models, strict=True))
        return {f"device{index}": {"generation": generation, "model": model} for index, (generation, model) in pairs}

    def forget(self) -> None:
        """Drop all spans since they were drained last: nothing is learnt from them, and no trace has them."""
        self._rest()

    def _learn(self, models: Spans, engines: Spans) -> None:
        self._models().planner.observe([span for spans in models for span in spans])
        for spans in (*models, *engines):
            self._rollouts.observe_spans(spans)
        self._rollouts.weigh()

    def _of_models(self) -> Spans:
        spans = gather([worker.drain_spans() for worker in self._models().workers])
        planned, self._planned = self._planned, None
        return spans if planned is None else planned.beside(spans)

    def _rest(self) -> tuple[Spans, Spans]:
        return self._of_models(), self._engines.call(GenerationHandle.drain_spans)


def _joined(parts: Sequence[Spans]) -> Spans:
    """Of each worker, what all parts have."""
    return [[*chain.from_iterable(of_worker)] for of_worker in zip(*parts, strict=True)]


def _told(asked: Future[list[Span]]) -> list[Span]:
    """Of an engine that died before it told, nothing is known."""
    try:
        return asked.result()
    except WorkerError as error:
        if not error.is_death:
            raise
        return []
