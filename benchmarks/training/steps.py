"""Real training steps of actor and critic, serial and fused in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from fuse.algorithms.policy_loss import PolicyTargets, clipped_policy_loss
from fuse.algorithms.value_loss import ValueTargets, clipped_value_loss
from fuse.benchmarks.llama import llama_config
from fuse.benchmarks.training.batches import Task, Workload
from fuse.benchmarks.training.rows import Side, medians, side_of
from fuse.benchmarks.training.worker import TrainingWorker
from fuse.intrastage.cost_profile import Profile, merge
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import place
from fuse.intrastage.planned_times import planned_times
from fuse.intrastage.training_schedule import Plan, fused_schedule, serial_schedule
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingSettings
from fuse.training.steps import OptimizerStep
from fuse.workers.calls import Worker, gather
from fuse.workers.cluster import Cluster

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WARMUP = 1
_CONTEXT = 8192
_CLASSES = {"actor": LlamaForCausalLM, "critic": LlamaForSequenceClassification}

SETTINGS = TrainingSettings(
    backend="transformers",
    split_backward=True,
    losses={
        "actor": partial(clipped_policy_loss, temperature=1.0, cliprange=0.2),
        "critic": partial(clipped_value_loss, vf_coef=0.1, cliprange=0.2),
    },
    targets={"actor": PolicyTargets, "critic": ValueTargets},
    layout=RaggedLayout(),
    adamw=AdamWConfig(max_grad_norm=1.0),
    autocast=None,
    gradient_checkpointing=False,
    timeout_s=120.0,
)


class Trainers:
    """Training workers on all devices, which build one pair of models after the other."""

    def __init__(self, workers: Sequence[Worker[TrainingWorker]]) -> None:
        count = len(workers)
        self._workers = workers
        self._placement = (*place("actor", count, count), *place("critic", count, count, reverse=True))

    @classmethod
    @contextmanager
    def start(cls, num_devices: int) -> Iterator[Trainers]:
        """One worker per device, in a cluster of their own.

        Raises:
            ValueError: there are fewer devices.
        """
        with Cluster(num_devices) as cluster:
            devices = range(num_devices)
            workers = [cluster.spawn("training worker", one, TrainingWorker, one, SETTINGS) for one in devices]
            trainers = cls(workers)
            port = workers[0].call(TrainingWorker.serve_store, cluster.host(0)).result()
            trainers._on_all(TrainingWorker.connect, cluster.host(0), port, num_devices)
            yield trainers

    def build(self, layers: Mapping[str, int], *, hidden_size: int, vocab_size: int) -> None:
        """Random Llamas of so many layers, spread evenly over the devices, in place of those before."""
        options = {"context": _CONTEXT, "hidden_size": hidden_size, "vocab_size": vocab_size, "num_labels": 1}
        specs = {
            model: ModelSpec(
                model_class=_CLASSES[model], config=llama_config(num_layers=num_layers, **options), dtype=torch.float32
            )
            for model, num_layers in layers.items()
        }
        self._on_all(TrainingWorker.place, specs, self._placement)

    def profile(self, load: Workload) -> Profile:
        """What every stage costs on micro-batches of all kinds."""
        return merge(self._on_all(TrainingWorker.profile, load.experience, load.buckets()))

    def compare(
        self, load: Workload, task: Task, profile: Profile, *, repeats: int, solve_s: float
    ) -> tuple[Side, Side]:
        """Take the task's step by the serial and by the fused schedule, in turn."""
        count = len(task.micro_batches)
        shapes = [load.shape(samples) for samples in task.micro_batches]
        middle = sorted(shapes, key=lambda shape: shape.size)[count // 2]
        schedules = {
            "serial": serial_schedule(self._placement, count),
            "fused": fused_schedule(profile, self._placement, count, middle, time_limit_s=solve_s),
        }
        plans = {side: Plan(schedule, profile) for side, schedule in schedules.items()}
        step = OptimizerStep(micro_batches=task.micro_batches, weight=1 / count)
        by_rank = self._on_all(TrainingWorker.alternate, load.experience, step, plans, repeats, _WARMUP)
        names = [replica.name for replica in self._placement]
        sides = {}
        for side, schedule in schedules.items():
            planned = planned_times(schedule, profile, names, [shapes] * len(names))
            by_repeat = list(zip(*(steps[side] for steps in by_rank), strict=True))
            sides[side] = medians([side_of(schedule, planned, step) for step in by_repeat])
        return sides["serial"], sides["fused"]

    def _on_all(
        self, method: Callable[Concatenate[TrainingWorker, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> list[_T]:
        return gather([worker.call(method, *args, **kwargs) for worker in self._workers])
