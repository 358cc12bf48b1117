"""Measures a rank's part of a profile: its stages' operations as training runs them, and messages to its neighbours."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fuse.intrastage.communication import PipelineCommunicators
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts, TransferCosts, shape_of
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch
from schedules import Kind


def measure(
    rank: int,
    pipelines: Sequence[tuple[str, Sequence[int]]],
    stages: Mapping[tuple[int, int], Stage],
    micro_batches: Sequence[Sequence[MicroBatch]],
    communicators: Sequence[PipelineCommunicators],
    *,
    repeats: int = 5,
    tick_s: float = 1e-5,
    times_only: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    in_turn: bool = False,
) -> Profile:
    """This rank's stages, and the messages it starts; all ranks call this at once, so that they contend as in training.

    pipelines: name and ranks of each, as given to `open_pipelines`.
    stages: this rank's, by (pipeline, stage); between two optimizer steps, with no micro-batch on its way.
    micro_batches: by pipeline, one of each shape; a last stage computes its loss on it.
    repeats: times are medians over so many, after one that warms up.
    times_only: memory is left out; a backward that can be split runs in halves only, whose sum is then its time.
    clock: seconds that stages are timed in; `time.process_time` where others use the core meanwhile.
    in_turn: one rank after the other computes, so that none contends.

    Parameters stay as they are, and have no gradients afterwards.

    Raises:
        ValueError: nothing would be measured.
        CommunicationError: a peer died or did not answer in time.
    """
    if repeats < 1 or tick_s <= 0:
        raise ValueError(f"repeats is {repeats} and tick_s {tick_s}: measure at least once, in ticks that last")
    # First: later, ranks that have few stages would wait for the others.
    transfers = [
        TransferCosts(pipeline=name, stage=stage, shape=shape, ticks=_ticks([seconds], tick_s))
        for name, stage, shape, seconds in measure_messages(
            rank, pipelines, stages, micro_batches, communicators, repeats=repeats
        )
    ]
    costs: list[StageCosts] = []
    turns = range(1 + max(max(ranks) for _, ranks in pipelines)) if in_turn else ()
    for _ in itertools.takewhile(lambda turn: turn < rank, turns):
        dist.barrier()
    for (number, stage), held in sorted(stages.items(), key=lambda item: item[0]):
        name, ranks = pipelines[number]
        for micro_batch in micro_batches[number]:
            bench = _Bench(held, micro_batch, clock, has_previous=stage > 0, has_next=stage < len(ranks) - 1)
            costs.append(bench.costs(name, stage, repeats, tick_s, times_only=times_only))
    for _ in turns[rank:]:
        dist.barrier()
    return Profile(tick_s=tick_s, stages=tuple(costs), transfers=tuple(transfers))


def measure_messages(
    rank: int,
    pipelines: Sequence[tuple[str, Sequence[int]]],
    stages: Mapping[tuple[int, int], Stage],
    micro_batches: Sequence[Sequence[MicroBatch]],
    communicators: Sequence[PipelineCommunicators],
    *,
    repeats: int,
) -> Iterator[tuple[str, int, Shape, float]]:
    """Messages from this rank's stages to the next: pipeline, stage, shape, and seconds one way, their median.

    All ranks exhaust this at once; arguments are those of `measure`.
    """
    for number, (name, ranks) in enumerate(pipelines):
        for stage, pair in enumerate(itertools.pairwise(ranks)):
            if rank not in pair or pair[0] == pair[1]:
                continue
            held = stages[number, stage + pair.index(rank)]
            for micro_batch in micro_batches[number]:
                boundary = held.boundary(micro_batch)
                exchange = _ping if rank == pair[0] else _pong
                times = [exchange(communicators[number], stage, boundary) for _ in range(1 + repeats)][1:]
                if rank == pair[0]:
                    yield name, stage, shape_of(micro_batch), statistics.median(times)


def _ping(pair: PipelineCommunicators, stage: int, boundary: Tensor) -> float:
    """Send to the next stage and wait for the answer; half the seconds that takes.

    Both ends have the messages in the order they are made, and so do pairs: the answer's receive comes after the send.
    """
    answer = torch.empty_like(boundary)
    _wait_for(boundary.device)
    start_s = time.perf_counter()
    pair.forward.send(boundary, stage=stage, micro_batch=0, op="a measurement").wait()
    pair.backward.receive(answer, stage=stage, micro_batch=0, op="a measurement").wait()
    _wait_for(boundary.device)
    return (time.perf_counter() - start_s) / 2


def _pong(pair: PipelineCommunicators, stage: int, boundary: Tensor) -> float:
    """The next stage's side of `_ping`; how long that took is not known here."""
    received = pair.forward.receive(boundary, stage=stage + 1, micro_batch=0, op="a measurement").wait()
    pair.backward.send(received, stage=stage + 1, micro_batch=0, op="a measurement").wait()
    return 0.0


class _Bench:
    """A stage and a micro-batch to run it on, over and over; neighbours' results are made up."""

    def __init__(
        self,
        stage: Stage,
        micro_batch: MicroBatch,
        clock: Callable[[], float],
        *,
        has_previous: bool,
        has_next: bool,
    ) -> None:
        self._stage, self._micro_batch, self._clock = stage, micro_batch, clock
        self._has_previous, self._has_next = has_previous, has_next
        self._device = stage.boundary(micro_batch).device
        self._seconds: dict[Kind, list[float]] = {kind: [] for kind in Kind}

    def costs(self, pipeline: str, stage: int, repeats: int, tick_s: float, *, times_only: bool) -> StageCosts:
        parameters = [parameter for _, parameter in self._stage.named_parameters()]
        assert all(parameter.grad is None for parameter in parameters), "gradients wait for a step"
        for repeat in range(1 + repeats):
            if not (times_only and self._stage.can_split_backward):
                self._run_whole()
            if self._stage.can_split_backward:
                self._run_halves()
            if repeat == 0:
                self._seconds = {kind: [] for kind in Kind}
        activation_bytes, weight_grad_bytes = (0, 0) if times_only else self._memory()
        for parameter in parameters:
            parameter.grad = None
        ticks = {kind: _ticks(seconds, tick_s) for kind, seconds in self._seconds.items() if seconds}
        ticks.setdefault(Kind.B, ticks.get(Kind.I, 0) + ticks.get(Kind.W, 0))
        return StageCosts(
            pipeline=pipeline,
            stage=stage,
            shape=shape_of(self._micro_batch),
            forward_ticks=ticks[Kind.F],
            backward_ticks=ticks[Kind.B],
            input_grad_ticks=ticks.get(Kind.I),
            weight_grad_ticks=ticks.get(Kind.W),
            activation_bytes=activation_bytes,
            weight_grad_bytes=weight_grad_bytes,
        )

    def _run_whole(self) -> None:
        stage_input, output_grad = self._boundary(self._has_previous), self._boundary(self._has_next)
        with self._timed(Kind.F):
            self._stage.forward(0, self._micro_batch, stage_input)
        with self._timed(Kind.B):
            self._stage.backward(0, output_grad)

    def _run_halves(self) -> None:
        stage_input, output_grad = self._boundary(self._has_previous), self._boundary(self._has_next)
        with self._timed(Kind.F):
            self._stage.forward(0, self._micro_batch, stage_input)
        with self._timed(Kind.I):
            self._stage.backward_input(0, output_grad)
        with self._timed(Kind.W):
            self._stage.backward_weight(0)

    def _memory(self) -> tuple[int, int]:
        """Bytes of a micro-batch from F to B, and from I to W; gradients of parameters exist already."""
        with LiveMemory() as live:
            stage_input = self._boundary(self._has_previous)
            self._stage.forward(0, self._micro_batch, stage_input)
            activation_bytes = live.bytes
            output_grad = self._boundary(self._has_next)
            if not self._stage.can_split_backward:
                self._stage.backward(0, output_grad)
                return activation_bytes, 0
            self._stage.backward_input(0, output_grad)
            del stage_input, output_grad
            weight_grad_bytes = live.bytes
            self._stage.backward_weight(0)
        return activation_bytes, weight_grad_bytes

    def _boundary(self, exists: bool) -> Tensor | None:
        return torch.randn_like(self._stage.boundary(self._micro_batch)) if exists else None

    @contextmanager
    def _timed(self, kind: Kind) -> Iterator[None]:
        _wait_for(self._device)
        start_s = self._clock()
        yield
        _wait_for(self._device)
        self._seconds[kind].append(self._clock() - start_s)


def _wait_for(device: torch.device) -> None:
    """Until it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ticks(seconds: Sequence[float], tick_s: float) -> int:
    """Their median, and at least one tick."""
    return max(1, round(statistics.median(seconds) / tick_s))
