"""What a rank records of a step so that later ones can be planned: messages, and the memory of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fuse.intrastage.cost_profile import shape_of
from fuse.intrastage.measure import measure_messages
from fuse.intrastage.observed import MESSAGE, shape_arguments
from fuse.micro_batch import MicroBatch
from fuse.trace import Span, SpanRecorder, now_s
from fuse.training.running import Running
from schedules import Problem

_MESSAGES = 3


def record_messages(
    recorder: SpanRecorder,
    rank: int,
    problem: Problem,
    running: Running,
    micro_batches: Sequence[Sequence[MicroBatch]],
) -> None:
    """Record what a message to the next stage takes, for each pipeline's smallest and largest micro-batch."""
    numbers = {name: number for number, (name, _) in enumerate(running.pipelines)}
    ends = [sorted(own, key=lambda one: shape_of(one).size) for own in micro_batches]
    by_shape = [list({shape_of(one): one for one in (own[0], own[-1])}.values()) for own in ends]
    messages = measure_messages(
        rank, running.pipelines, running.stages, by_shape, running.communicators, repeats=_MESSAGES
    )
    for name, stage, shape, seconds in messages:
        number = numbers[name]
        micro_batch = next(one for one in by_shape[number] if shape_of(one) == shape)
        record_observed(recorder, MESSAGE, problem, number, stage, micro_batch, seconds, {})


def record_observed(
    recorder: SpanRecorder,
    category: str,
    problem: Problem,
    pipeline: int,
    stage: int,
    micro_batch: MicroBatch,
    seconds: float,
    sizes: Mapping[str, object],
) -> None:
    """Record a span that tells what a micro-batch costs; see `fuse.intrastage.observed`."""
    name, end_s = f"{category} {problem.pipelines[pipeline].name}.{stage}.0", now_s()
    arguments = shape_arguments(shape_of(micro_batch)) | dict(sizes)
    recorder.add(Span(name, category, end_s - seconds, end_s, arguments))
