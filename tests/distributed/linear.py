"""Pipelines of linear layers, trained by the real communication, executor and optimizers, and without any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fuse.intrastage.communication import all_reduce_sum, open_model, open_pipelines, open_tensor_group
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.executor import execute
from fuse.intrastage.forward_only import ScorerStage
from fuse.intrastage.in_flight import InFlight
from fuse.intrastage.measure import measure
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.program import program_of
from fuse.intrastage.split_backward import SplitBackward
from fuse.micro_batch import Metrics, MicroBatch
from fuse.trace import SpanRecorder
from schedules import Pipeline, Problem, Schedule

TIMEOUT_S = 300.0
ADAMW = AdamWConfig(max_grad_norm=0.05)
_SIZE = 3
_NUM_STEPS = 2

Weights = dict[tuple[str, str], Tensor]
"""By model and name of the parameter."""


class LinearStage:
    """A linear layer and a tanh. The first layer's bias and the last's are tied. See `TrainedStage`.

    tensor_group: devices that meet in every operation, as tensor-parallel ones do.
    """

    def __init__(self, model: str, stage: int, num_stages: int, *, splits: bool, tensor_group: Any = None) -> None:
        self._stage, self._num_stages, self._tensor_group = stage, num_stages, tensor_group
        generator = torch.Generator().manual_seed(sum(model.encode()) * 100 + stage)
        self._layer = nn.Linear(_SIZE, _SIZE)
        nn.init.normal_(self._layer.weight, generator=generator)
        nn.init.constant_(self._layer.bias, 0.1)
        self._in_flight = InFlight(SplitBackward(self._layer) if splits else None)
        self.metrics: dict[int, Metrics] = {}
        self.tied_names = frozenset({"tied"} if num_stages > 1 and stage in (0, num_stages - 1) else ())
        self.undecayed_names = self.sharded_names = frozenset[str]()
        self.model_shapes: Mapping[str, torch.Size] = {}

    @property
    def can_split_backward(self) -> bool:
        return self._in_flight.split is not None

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return torch.empty(len(micro_batch.input_ids), _SIZE)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        self._meet()
        entering = micro_batch.targets if stage_input is None else stage_input.requires_grad_(True)
        output = self._layer(entering).tanh()
        is_last = self._stage == self._num_stages - 1
        self._in_flight.add(index, stage_input, output.square().sum() if is_last else output)
        return None if is_last else output.detach()

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        self._meet()
        return self._in_flight.backward(index, output_grad)

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        self._meet()
        return self._in_flight.backward_input(index, output_grad)

    def backward_weight(self, index: int) -> None:
        self._in_flight.backward_weight(index)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield f"weight {self._stage}", self._layer.weight
        yield "tied" if self.tied_names else f"bias {self._stage}", self._layer.bias

    def freeze(self, names: Collection[str]) -> None:
        assert not names

    def _meet(self) -> None:
        if self._tensor_group is not None:
            all_reduce_sum(torch.ones(1), self._tensor_group, "a test")


class LinearScorer(LinearStage):
    """The same, forward alone. See `ForwardStage`."""

    def infer(self, micro_batch: MicroBatch, stage_input: Tensor | None, read: Any) -> Tensor:
        self._meet()
        with torch.no_grad():
            output: Tensor = self._layer(micro_batch.targets if stage_input is None else stage_input).tanh()
        return output


@dataclass(frozen=True)
class Training:
    """Models whose pipelines are the schedule's. models: by pipeline, whose replica it is."""

    schedule: Schedule
    models: tuple[str, ...]
    tensor_parallel_size: int = 1

    @staticmethod
    def of_each(schedule: Schedule, tensor_parallel_size: int = 1) -> Training:
        """Every pipeline is a model of its own."""
        names = tuple(pipeline.name for pipeline in schedule.problem.pipelines)
        return Training(schedule, names, tensor_parallel_size)

    @property
    def pipelines(self) -> tuple[Pipeline, ...]:
        return self.schedule.problem.pipelines

    @property
    def num_devices(self) -> int:
        return self.schedule.problem.num_ranks * self.tensor_parallel_size

    def micro_batches(self) -> list[list[MicroBatch]]:
        """By pipeline."""
        return [_batches_of(one.num_micro_batches, number) for number, one in enumerate(self.pipelines)]

    def stage(self, number: int, stage: int, tensor_group: Any = None) -> LinearStage:
        pipeline = self.pipelines[number]
        return LinearStage(
            self.models[number], stage, pipeline.num_stages, splits=pipeline.can_split, tensor_group=tensor_group
        )

    def run(self, device: int) -> Weights:
        """What a device's process does: opens groups, profiles, trains. Returns the weights that are there."""
        rank = device // self.tensor_parallel_size
        tensor_group = open_tensor_group(self.tensor_parallel_size, TIMEOUT_S)
        self._profile_alone(rank, tensor_group)
        stages: dict[tuple[int, int], Any] = {
            (number, stage): self.stage(number, stage, tensor_group)
            for number, pipeline in enumerate(self.pipelines)
            for stage, owner in enumerate(pipeline.ranks)
            if owner == rank and not pipeline.is_forward_only
        }
        trained = [(pipeline.name, pipeline.ranks) for pipeline in self.pipelines if not pipeline.is_forward_only]
        pipelines = [(pipeline.name, pipeline.ranks) for pipeline in self.pipelines]
        communicators = open_pipelines(pipelines, TIMEOUT_S, self.tensor_parallel_size)
        optimizers = {model: self._optimizer(model, stages) for model in self._trained_models}
        batches = self.micro_batches()
        measure(rank, trained, stages, [own[:1] for own in batches[: len(trained)]], communicators, repeats=1)
        scorers, found = self._scorers(rank, tensor_group)
        for _ in range(_NUM_STEPS):
            execute(program_of(self.schedule), rank, stages | scorers, batches, communicators, SpanRecorder())
            for optimizer in optimizers.values():
                optimizer.step(0.01)
        for (number, index), values in found.items():
            assert torch.equal(values, self._score(number, batches[number][index]))
        return {
            (self.models[number], name): parameter.detach()
            for (number, _), stage in stages.items()
            for name, parameter in stage.named_parameters()
        }

    @property
    def _trained_models(self) -> list[str]:
        return list(dict.fromkeys(m for m, one in zip(self.models, self.pipelines, strict=True) if one.backward_ticks))

    def _scorer(self, number: int, stage: int, tensor_group: Any = None) -> LinearScorer:
        return LinearScorer(
            self.models[number], stage, self.pipelines[number].num_stages, splits=False, tensor_group=tensor_group
        )

    def _scorers(
        self, rank: int, tensor_group: Any
    ) -> tuple[dict[tuple[int, int], ScorerStage], dict[tuple[int, int], Tensor]]:
        """Of forward-only pipelines, this rank's stages, and what they will make, by pipeline and micro-batch."""
        stages, found = {}, dict[tuple[int, int], Tensor]()
        for number, pipeline in enumerate(self.pipelines):
            for stage, owner in enumerate(pipeline.ranks):
                if owner == rank and pipeline.is_forward_only:
                    keep = None
                    if stage == pipeline.num_stages - 1:
                        keep = partial(lambda number, index, values: found.update({(number, index): values}), number)
                    stages[number, stage] = ScorerStage(self._scorer(number, stage, tensor_group), _unread, keep)
        return stages, found

    def _score(self, number: int, batch: MicroBatch) -> Tensor:
        """Without ranks, schedule or messages."""
        passed = None
        for stage in range(self.pipelines[number].num_stages):
            passed = self._scorer(number, stage).infer(batch, passed, _unread)
        assert passed is not None
        return passed

    def _profile_alone(self, rank: int, tensor_group: Any) -> Profile:
        """As `measure_layer_costs` does."""
        num_stages = self.pipelines[0].num_stages
        stages: dict[tuple[int, int], Any] = {(0, one): self.stage(0, one, tensor_group) for one in range(num_stages)}
        batches = self.micro_batches()[0][:1]
        return measure(rank, [("alone", (rank,) * num_stages)], stages, [batches], (), repeats=1, times_only=True)

    def _optimizer(self, model: str, stages: Mapping[tuple[int, int], Any]) -> ModelOptimizer:
        numbers = [number for number, one in enumerate(self.models) if one == model]
        groups = open_model([self.pipelines[one].ranks for one in numbers], TIMEOUT_S, self.tensor_parallel_size)
        own = {(numbers.index(number), stage): held for (number, stage), held in stages.items() if number in numbers}
        return ModelOptimizer(model, own, groups, ADAMW)

    def expected(self) -> Weights:
        """The weights after the same steps with no rank, no schedule and no message."""
        weights: Weights = {}
        for model in self._trained_models:
            numbers = [number for number, one in enumerate(self.models) if one == model]
            stages: list[Any] = [
                self.stage(numbers[0], stage) for stage in range(self.pipelines[numbers[0]].num_stages)
            ]
            optimizer = ModelOptimizer(model, {(0, stage): held for stage, held in enumerate(stages)}, None, ADAMW)
            for _ in range(_NUM_STEPS):
                for number in numbers:
                    _accumulate(stages, self.micro_batches()[number])
                optimizer.step(0.01)
            for held in stages:
                weights |= {(model, name): parameter.detach() for name, parameter in held.named_parameters()}
        return weights


def _unread(*_: Any) -> Tensor:
    raise AssertionError("these stages have no head")


def _accumulate(stages: Sequence[Any], batches: Sequence[MicroBatch]) -> None:
    for index, batch in enumerate(batches):
        passed = None
        for stage in stages:
            passed = stage.forward(index, batch, passed)
        for stage in reversed(stages):
            passed = stage.backward(index, passed)


def _batches_of(count: int, seed: int) -> list[MicroBatch]:
    """Of different numbers of rows, so that a message that meets another's receive has the wrong shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        MicroBatch(
            input_ids=torch.zeros(1 + index % 4, 1, dtype=torch.int64),
            head_index=torch.tensor([0]),
            targets=torch.randn(1 + index % 4, _SIZE, generator=generator),
        )
        for index in range(count)
    ]


def problem_of(
    num_ranks: int, placed: Sequence[tuple[str, Sequence[int], int]], *, splits: bool = False
) -> tuple[Problem, tuple[str, ...]]:
    """placed: by pipeline, its model, its stages' ranks and its number of micro-batches. And the pipelines' models.

    The last stage is slow, as one with a large head is: what is sent to it piles up.
    """
    counts = Counter[str]()
    pipelines = []
    for model, ranks, count in placed:
        ones = (1,) * len(ranks)
        forward = (*ones[1:], 3)
        pipelines.append(
            Pipeline(
                name=f"{model}.{counts[model]}",
                ranks=tuple(ranks),
                num_micro_batches=count,
                forward_ticks=forward,
                backward_ticks=tuple(2 * ticks for ticks in forward),
                input_grad_ticks=forward if splits else None,
                weight_grad_ticks=forward if splits else None,
            )
        )
        counts[model] += 1
    return Problem(num_ranks=num_ranks, pipelines=tuple(pipelines)), tuple(model for model, _, _ in placed)
