"""Pipelines of tiny models over the ranks of a world, and one process that does the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.intrastage.communication import PipelineCommunicators, open_model, open_pipelines
from fuse.intrastage.executor import execute
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.program import program_of
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.trace import SpanRecorder
from schedules import Pipeline, Problem, Schedule

from ..tiny_models import ModelKind, build, classifier, language_model, spread
from .forked import TIMEOUT_S

SIZES: Mapping[str, Any] = {"num_hidden_layers": 5}
MODELS: dict[str, ModelKind] = {
    "llama": language_model(**SIZES, num_key_value_heads=2),
    "qwen2 tied": language_model("qwen2", **SIZES, tie_word_embeddings=True),
    "qwen3": language_model("qwen3", **SIZES),
    "neox": language_model("gpt_neox", **SIZES),
    "llama classifier": classifier(**SIZES, num_key_value_heads=2),
    "neox classifier": classifier("gpt_neox", **SIZES),
}
LAYERS = {1: ((0, 5),), 2: ((0, 1), (1, 5)), 4: ((0, 1), (1, 3), (3, 4), (4, 5))}
ADAMW = AdamWConfig(weight_decay=0.1, max_grad_norm=0.05)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return (head(hidden) * micro_batch.targets).square().mean(), {}


@cache
def full_model(name: str) -> PreTrainedModel:
    """Everyone's: it stays as it is."""
    model: PreTrainedModel = spread(build(MODELS[name], seed=5))
    return model


def full_weights(name: str) -> dict[str, Tensor]:
    return {key: one.detach() for key, one in full_model(name).named_parameters()}


@cache
def full_gradients(name: str, count: int, seed: int) -> Mapping[str, Tensor]:
    """Of the whole model on `batches_of(count, seed)`."""
    model = copy.deepcopy(full_model(name))
    add_gradients(model, batches_of(count, seed))
    return {key: one.grad for key, one in model.named_parameters() if one.grad is not None}


def batches_of(count: int, seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of different lengths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        rows, tokens = 1 + index % 2, 3 + 4 * (index % 3)
        batches.append(
            MicroBatch(
                input_ids=torch.randint(0, 64, (rows, tokens), generator=generator),
                head_index=torch.arange(1, rows * tokens, 2),
                targets=torch.randn(len(range(1, rows * tokens, 2)), 1, generator=generator),
            )
        )
    return batches


def add_gradients(model: PreTrainedModel, batches: Sequence[MicroBatch]) -> None:
    head = model.get_output_embeddings() or model.score
    for batch in batches:
        hidden = model.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)[batch.head_index]
        loss(hidden, head, batch)[0].backward()


@cache
def _communicators(pipelines: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[PipelineCommunicators, ...]:
    """Those that this process has opened for these pipelines; all ranks ask in the same order."""
    return tuple(open_pipelines(pipelines, TIMEOUT_S))


@dataclass(frozen=True)
class Run:
    """Some models' pipelines on this world. `models` names each pipeline's model; equal names are replicas."""

    rank: int
    problem: Problem
    models: tuple[str, ...]

    @staticmethod
    def of(rank: int, world: int, placed: Sequence[tuple[str, Sequence[int], int]]) -> Run:
        pipelines = tuple(
            Pipeline(
                name=f"{name.replace(' ', '-')}.{index}",
                ranks=tuple(ranks),
                num_micro_batches=count,
                forward_ticks=(1,) * len(ranks),
                backward_ticks=(2,) * len(ranks),
            )
            for index, (name, ranks, count) in enumerate(placed)
        )
        return Run(rank, Problem(num_ranks=world, pipelines=pipelines), tuple(name for name, _, _ in placed))

    def build(self) -> dict[tuple[int, int], TransformersStage]:
        """This rank's stages by (pipeline, stage), with the full models' weights."""
        stages = {}
        for number, (name, pipeline) in enumerate(zip(self.models, self.problem.pipelines, strict=True)):
            for stage, owner in enumerate(pipeline.ranks):
                if owner == self.rank:
                    layer_range = LAYERS[pipeline.num_stages][stage]
                    stages[number, stage] = TransformersStage(
                        *MODELS[name],
                        stage=stage,
                        num_stages=pipeline.num_stages,
                        loss=loss,
                        layer_range=layer_range,
                        split_backward=pipeline.can_split,
                    )
                    stages[number, stage].load_state_dict(full_model(name).state_dict())
        return stages

    def batches(self) -> list[list[MicroBatch]]:
        return [batches_of(one.num_micro_batches, seed) for seed, one in enumerate(self.problem.pipelines)]

    def communicators(self) -> tuple[PipelineCommunicators, ...]:
        return _communicators(tuple((one.name, one.ranks) for one in self.problem.pipelines))

    def optimizers(self, stages: Mapping[tuple[int, int], TransformersStage]) -> dict[str, ModelOptimizer]:
        """One per model, with this rank's stages by (replica, stage)."""
        optimizers = {}
        for name in dict.fromkeys(self.models):
            numbers = [number for number, model in enumerate(self.models) if model == name]
            groups = open_model([self.problem.pipelines[number].ranks for number in numbers], TIMEOUT_S)
            own = {(numbers.index(number), s): stage for (number, s), stage in stages.items() if number in numbers}
            optimizers[name] = ModelOptimizer(name, own, groups, ADAMW)
        return optimizers

    def gradient_difference(self, schedule: Schedule, recorder: SpanRecorder | None = None) -> float:
        """Largest difference between the stages' gradients after the schedule and one process's; ties left apart."""
        stages, recorder = self.build(), recorder or SpanRecorder()
        execute(program_of(schedule), self.rank, stages, self.batches(), self.communicators(), recorder)
        worst = 0.0
        for number, name in enumerate(self.models):
            expected = full_gradients(name, self.problem.pipelines[number].num_micro_batches, number)
            for key, stage in stages.items():
                if key[0] == number:
                    for parameter_name, parameter in stage.named_parameters():
                        if parameter_name not in stage.tied_names:
                            difference = (parameter.grad - expected[parameter_name]).abs().max().item()
                            worst = max(worst, difference)
        return worst
