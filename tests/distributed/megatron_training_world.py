"""Optimizer steps and training states of Megatron stages in several layouts, against one process of transformers
stages. A program of `programs.py`.

One world per layout, one after the other; devices write what they measured to DIRECTORY/{layout}-{device}.json.
Every world loads the training states that the worlds before it saved. The tests assert on what was measured.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fuse.intrastage.communication import open_model, open_pipelines, open_tensor_group
from fuse.intrastage.executor import execute
from fuse.intrastage.measure import measure
from fuse.intrastage.megatron_stage import MegatronStage
from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.program import program_of
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.trace import SpanRecorder
from fuse.training.state import load_state, save_state
from schedules import Pipeline, Problem, random_problems

from .forked import TIMEOUT_S, run_alone, run_world
from .megatron_world import LEARNING_RATE, SHARED, shared_model
from .pipelines import Run, batches_of, loss

ADAMW = AdamWConfig(weight_decay=0.1, max_grad_norm=0.05, eps=1e-6)
"""AdamW divides by the gradient's own size: with the default eps it makes much of rounding where that is tiny."""
NUM_MICRO_BATCHES = 2
NUM_STEPS = 3
REFERENCE = "reference.pt"
STAGE_LAYERS = {1: ((0, 3),), 2: ((0, 1), (1, 3))}


@dataclass(frozen=True)
class Layout:
    """Every model in `num_replicas` pipelines of `num_stages` stages, each shared by `tensor_parallel_size` devices."""

    num_stages: int
    tensor_parallel_size: int
    num_replicas: int = 1

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.num_replicas

    def placements(self, reverse: bool) -> list[tuple[int, ...]]:
        """The rank of each stage, by replica."""
        step = -1 if reverse else 1
        starts = range(0, self.num_ranks, self.num_stages)
        return [tuple(range(start, start + self.num_stages))[::step] for start in starts]


LAYOUTS = {
    "pipeline": Layout(2, 1),
    "tensor": Layout(1, 2),
    "one": Layout(1, 1),
    "both": Layout(2, 2),
    "replicas": Layout(1, 2, 2),
}


def logprob_loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    logprobs, _ = token_logprobs(hidden, head, torch.arange(len(hidden)) * 7 % 64, 0.7)
    return -(logprobs * micro_batch.targets.squeeze(-1)).mean(), {}


class Training:
    """One device's part of all models' training."""

    def __init__(self, device: int, layout: Layout, tensor_group: object, seed: int) -> None:
        tensor_size = layout.tensor_parallel_size
        placements = {name: layout.placements(reverse=number % 2 == 1) for number, name in enumerate(SHARED)}
        self.pipelines = [(name, ranks) for name, replicas in placements.items() for ranks in replicas]
        self.run = Run(
            device // tensor_size,
            Problem(
                num_ranks=layout.num_ranks,
                pipelines=tuple(
                    Pipeline(
                        name=f"{name.replace(' ', '-')}.{number}",
                        ranks=ranks,
                        num_micro_batches=NUM_MICRO_BATCHES // layout.num_replicas,
                        forward_ticks=(1,) * len(ranks),
                        backward_ticks=(2,) * len(ranks),
                        input_grad_ticks=(1,) * len(ranks),
                        weight_grad_ticks=(1,) * len(ranks),
                    )
                    for number, (name, ranks) in enumerate(self.pipelines)
                ),
            ),
            tuple(name for name, _ in self.pipelines),
        )
        self.stages = {
            (number, stage): MegatronStage(
                *SHARED[name],
                stage=stage,
                num_stages=layout.num_stages,
                layer_range=STAGE_LAYERS[layout.num_stages][stage],
                loss=loss if "classifier" in name else logprob_loss,
                split_backward=True,
                tensor_group=tensor_group,
            )
            for number, (name, ranks) in enumerate(self.pipelines)
            for stage, rank in enumerate(ranks)
            if rank == self.run.rank
        }
        for (number, _), stage in self.stages.items():
            stage.load_state_dict(shared_model(self.pipelines[number][0], seed).state_dict())
        self.communicators = open_pipelines(self.pipelines, TIMEOUT_S, tensor_size)
        self.optimizers = {}
        for name, replicas in placements.items():
            own = {
                (replicas.index(self.pipelines[number][1]), stage): held
                for (number, stage), held in self.stages.items()
                if self.pipelines[number][0] == name
            }
            groups = open_model(replicas, TIMEOUT_S, tensor_size)
            self.optimizers[name.replace(" ", "_")] = ModelOptimizer(name, own, groups, ADAMW)

    def micro_batches(self, step: int) -> list[list[MicroBatch]]:
        """By pipeline: replicas share out those of their model."""
        num_replicas = NUM_MICRO_BATCHES // self.run.problem.pipelines[0].num_micro_batches
        replica = [name for name, _ in self.pipelines]
        return [
            batches_of(NUM_MICRO_BATCHES, seed=step)[replica[:number].count(name) :: num_replicas]
            for number, name in enumerate(replica)
        ]

    def step(self, step: int) -> dict[str, float]:
        """A random schedule with halved backwards, then an optimizer step of each model; returns the norms."""
        schedule = random_problems.random_schedule(self.run.problem, random.Random(step))
        rank = self.run.rank
        execute(program_of(schedule), rank, self.stages, self.micro_batches(step), self.communicators, SpanRecorder())
        return {name: one.step(LEARNING_RATE / (step + 1)) for name, one in self.optimizers.items()}

    def exported(self) -> dict[str, Tensor]:
        """Weights of the stages held, by model and Hugging Face name."""
        return {
            f"{self.pipelines[number][0].replace(' ', '_')}.{key}": tensor.clone()
            for (number, _), stage in self.stages.items()
            for key, tensor in stage.export_weights()
        }

    def state(self) -> dict[str, Tensor]:
        """What this device saves, by model, part and Hugging Face name."""
        return {
            f"{name}.{part}.{key}": tensor.clone()
            for name, optimizer in self.optimizers.items()
            for part in optimizer.STATE_PARTS
            for key, tensor in optimizer.export_state(part).items()
        }


def compute_reference(path: Path) -> None:
    """Write norms and weights after each step of transformers stages in this process alone."""
    torch.set_num_threads(1)
    found = []
    stages = {
        name: TransformersStage(
            *SHARED[name], stage=0, num_stages=1, loss=loss if "classifier" in name else logprob_loss
        )
        for name in SHARED
    }
    optimizers = {name: ModelOptimizer(name, {(0, 0): stage}, None, ADAMW) for name, stage in stages.items()}
    for name, stage in stages.items():
        stage.load_state_dict(shared_model(name, 3).state_dict())
    for step in range(NUM_STEPS):
        norms, weights = {}, {}
        for name, stage in stages.items():
            for index, batch in enumerate(batches_of(NUM_MICRO_BATCHES, seed=step)):
                stage.forward(index, batch, None)
                stage.backward(index, None)
            norms[name.replace(" ", "_")] = optimizers[name].step(LEARNING_RATE / (step + 1))
            for key, tensor in stage.export_weights():
                weights[f"{name.replace(' ', '_')}.{key}"] = tensor.clone()
        found.append((norms, weights))
    torch.save(found, path)


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max((tensor - expected[name]).abs().max().item() for name, tensor in got.items())


def check(device: int, layout_name: str, directory: Path) -> dict[str, float | str]:
    layout = LAYOUTS[layout_name]
    group = open_tensor_group(layout.tensor_parallel_size, TIMEOUT_S)
    training, resumed = Training(device, layout, group, seed=3), Training(device, layout, group, seed=8)
    found: dict[str, float | str] = {"norms": 0.0, "weights": 0.0, "loaded": 0.0, "num_loaded": 0}

    for saved in sorted(directory.glob("state-*")):
        load_state(saved, resumed.optimizers)
        expected: dict[str, Tensor] = {}
        for path in directory.glob(f"saved-{saved.name}-*.safetensors"):
            expected |= load_file(path)
        loaded = resumed.state()
        found["loaded"] = max(found["loaded"], difference(loaded, expected) if loaded else 0.0)
        found["num_loaded"] += len(loaded)

    start = training.exported()
    for step, (norms, weights) in enumerate(torch.load(directory / REFERENCE)):
        got = training.step(step)
        found["norms"] = max(found["norms"], *(abs(got[name] / norm - 1) for name, norm in norms.items()))
        exported = training.exported()
        found["weights"] = max(found["weights"], difference(exported, weights))
        if step == 1:
            save_state(directory / f"state-{layout_name}", training.optimizers)
            state = training.state()
            save_file(state, directory / f"saved-state-{layout_name}-{device}.safetensors")
    found["moved"] = min((exported[name] - start[name]).abs().max().item() for name in start)
    found["clipped"] = min(norms.values()) / ADAMW.max_grad_norm

    load_state(directory / f"state-{layout_name}", resumed.optimizers)
    resumed.step(2)
    resumed_state, state = resumed.state(), training.state()
    found["resumed"] = difference(resumed_state, state) if state else 0.0
    found["steps"] = min(optimizer.num_steps for optimizer in resumed.optimizers.values())
    copies = hashlib.sha256()
    for _, stage in sorted(training.stages.items()):
        for name, parameter in stage.named_parameters():
            if name not in stage.sharded_names:
                copies.update(parameter.detach().numpy().tobytes())
    found["copies"] = copies.hexdigest()

    shapes = [batches_of(1)] * len(training.pipelines)
    profile = measure(training.run.rank, training.pipelines, training.stages, shapes, training.communicators, repeats=1)
    assert len(profile.stages) == len(training.stages)
    assert all(cost.input_grad_ticks and cost.weight_grad_bytes for cost in profile.stages)
    return found


def main(directory: Path) -> None:
    for name in SHARED:
        shared_model(name, 3), shared_model(name, 8)  # once for all processes
    run_alone(lambda: compute_reference(directory / REFERENCE))
    for name, layout in LAYOUTS.items():

        def found(device: int, name: str = name) -> dict[str, float | str]:
            return check(device, name, directory)

        run_world(name, layout.num_ranks * layout.tensor_parallel_size, found, directory)
