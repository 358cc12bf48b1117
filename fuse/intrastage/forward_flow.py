"""Forward-only pipelines: micro-batches flow through the stages of several models at once, in ticks.

A tick takes every micro-batch under way through one stage; new ones enter at stage 0. All ranks are told in the same
order what enters, so each knows where everything is, and takes its own part. Micro-batches that enter one after
another follow one another through the stages, whoever they belong to: nothing is drained between them, and pipelines
of opposite directions fill each other's ends.

Why no ranks ever wait for one another in a circle: there is one order of everything that all of them walk. It is ticks;
within a tick first what is computed, then the messages that this made, both by pipeline and stage. What is computed
needs messages of the tick before. A rank waits for nothing that comes after its step in this order, so the argument of
`fuse.intrastage.message_order` holds here, even if every send and every receive blocks until it is through. Training
may use the same communicators once nothing is under way, for then all messages have arrived.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fuse.intrastage.communication import Communicator, Transfer
from fuse.intrastage.executor import MOST_IN_FLIGHT
from fuse.intrastage.stage import ForwardStage, Readout
from fuse.micro_batch import MicroBatch
from fuse.trace import SpanRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPipeline:
    """A model's stages, of which this rank has some.

    ranks: of each stage. stages: those held here. communicator: of hidden states from stage to stage.
    read: what the last stage gives of a micro-batch. category: of its spans.
    """

    name: str
    ranks: tuple[int, ...]
    stages: Mapping[int, ForwardStage]
    communicator: Communicator
    read: Readout
    category: str = "infer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A micro-batch that enters a pipeline. key: names it in results. sizes: that its spans tell."""

    pipeline: int
    key: Hashable
    micro_batch: MicroBatch
    sizes: Mapping[str, object]
    number: int = 0
    stage: int = 0


_Place = tuple[int, int]
"""Pipeline and stage: each holds one micro-batch at a time."""


class ForwardFlow:
    """What is under way through the pipelines, as one rank sees it; all ranks make the same calls in the same order."""

    def __init__(self, rank: int, pipelines: Sequence[ForwardPipeline], recorder: SpanRecorder) -> None:
        self._rank, self._pipelines, self._recorder = rank, tuple(pipelines), recorder
        self._passages: list[Passage] = []
        self._num_entered = 0
        self._inputs: dict[_Place, Tensor] = {}
        self._in_flight: dict[tuple[_Place, bool], Transfer] = {}  # by receiving stage, and whether it is received here

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return not self._passages

    def tick(self, entering: Iterable[Passage] = ()) -> list[tuple[Hashable, Tensor]]:
        """Take all that is under way, and what enters, one stage on.

        entering: at most one for each pipeline.

        Returns what last stages on this rank gave, by key.

        Raises: CommunicationError when a peer died or did not answer in time.
        """
        for one in entering:
            self._passages.append(replace(one, number=self._num_entered))
            self._num_entered += 1
        self._passages.sort(key=lambda one: (one.pipeline, one.stage))
        outputs = {
            _place(one): self._compute(one) for one in self._passages if self._rank_of(*_place(one)) == self._rank
        }
        results = [
            (one.key, outputs.pop(_place(one)))
            for one in self._passages
            if self._is_last(one) and _place(one) in outputs
        ]
        self._finish_messages()
        self._passages = [replace(one, stage=one.stage + 1) for one in self._passages if not self._is_last(one)]
        for one in self._passages:
            self._hand_over(one, outputs)
        if self.is_empty:
            self._finish_messages()
        return results

    def _rank_of(self, pipeline: int, stage: int) -> int:
        return self._pipelines[pipeline].ranks[stage]

    def _is_last(self, one: Passage) -> bool:
        return one.stage == len(self._pipelines[one.pipeline].ranks) - 1

    def _compute(self, one: Passage) -> Tensor:
        pipeline = self._pipelines[one.pipeline]
        received = None if one.stage == 0 else self._take_input(_place(one))
        sizes = {**one.sizes, "stage": one.stage, "stages": len(pipeline.ranks)}
        with self._recorder.span(pipeline.name, pipeline.category, **sizes):
            return pipeline.stages[one.stage].infer(one.micro_batch, received, pipeline.read)

    def _take_input(self, place: _Place) -> Tensor:
        if place in self._inputs:
            return self._inputs.pop(place)
        return self._in_flight.pop((place, True)).wait()

    def _hand_over(self, one: Passage, outputs: Mapping[_Place, Tensor]) -> None:
        """Have the stage that a micro-batch comes to get what the one before it made, as far as this rank is in it."""
        place, source = _place(one), (one.pipeline, one.stage - 1)
        maker, user = self._rank_of(*source), self._rank_of(*place)
        pipeline = self._pipelines[one.pipeline]
        told: Any = {"micro_batch": one.number, "op": f"F {pipeline.name}.{one.stage}.{one.number}"}
        if maker == user == self._rank:
            self._inputs[place] = outputs[source]
        elif maker == self._rank:
            self._make_room()
            sent = pipeline.communicator.send(outputs[source], stage=source[1], **told)
            self._in_flight[place, False] = sent
        elif user == self._rank:
            self._make_room()
            buffer = pipeline.stages[one.stage].boundary(one.micro_batch)
            self._in_flight[place, True] = pipeline.communicator.receive(buffer, stage=one.stage, **told)

    def _make_room(self) -> None:
        """Wait for the oldest messages, where as many are in flight as may be."""
        while len(self._in_flight) >= MOST_IN_FLIGHT:
            self._finish_oldest()

    def _finish_messages(self) -> None:
        """Wait for those of the tick before: what was received has been used by now, and what was sent has arrived."""
        while self._in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        place, is_received = key = next(iter(self._in_flight))
        tensor = self._in_flight.pop(key).wait()
        if is_received:
            self._inputs[place] = tensor


def _place(one: Passage) -> _Place:
    return one.pipeline, one.stage
