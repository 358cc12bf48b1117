"""Real training steps of actor and critic, serial and fused in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from fuse.benchmarks.llama import llama_config
from fuse.benchmarks.training.batches import Task, Workload
from fuse.benchmarks.training.rows import Side, medians, side_of, together
from fuse.benchmarks.training.settings import SETTINGS
from fuse.benchmarks.training.worker import TrainingWorker, Way
from fuse.driver.early_start import IMPORTED
from fuse.intrastage.cost_profile import Profile, merge
from fuse.intrastage.placement import Counts, Replica, place, replicas_of
from fuse.intrastage.planned_times import PlannedTimes, planned_times
from fuse.intrastage.training_schedule import Plan, fused_schedule, serial_schedule
from fuse.training.model_spec import ModelSpec
from fuse.training.rounds import Round, rounds
from fuse.training.steps import OptimizerStep
from fuse.workers.calls import Worker, gather
from fuse.workers.cluster import Cluster
from schedules import Schedule

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WARMUP = 1
_CONTEXT = 8192
_CLASSES = {"actor": LlamaForCausalLM, "critic": LlamaForSequenceClassification}


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
        with Cluster(num_devices, imported=IMPORTED) as cluster:
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
        self,
        load: Workload,
        task: Task,
        profile: Profile,
        *,
        repeats: int,
        solve_s: float,
        critic_epochs: int = 1,
    ) -> tuple[Side, Side]:
        """Take the task's step by serial and by fused schedules, in turn; the critic takes it `critic_epochs` times."""
        step = OptimizerStep(micro_batches=task.micro_batches, weight=1 / len(task.micro_batches))
        steps = {"actor": [step], "critic": [step] * critic_epochs}
        shapes = sorted(map(load.shape, load.micro_batches(task)), key=lambda shape: shape.size)
        middle = shapes[len(shapes) // 2]

        def fused(replicas: tuple[Replica, ...], counts: Counts) -> Schedule:
            return fused_schedule(profile, replicas, counts, middle, time_limit_s=solve_s)

        schedulers: dict[str, Callable[[tuple[Replica, ...], Counts], Schedule]]
        schedulers = {"serial": serial_schedule, "fused": fused}
        ways: dict[str, Way] = {}
        for side, schedule in schedulers.items():
            of_side = load.prepared(rounds(steps, dict.fromkeys(steps, 1), is_fused=side == "fused"))
            counts = dict.fromkeys(one.counts for one in of_side)
            plans = {one: Plan(schedule(replicas_of(self._placement, one), one), profile) for one in counts}
            ways[side] = [(one, plans[one.counts]) for one in of_side]
        by_rank = self._on_all(TrainingWorker.alternate, load.experience, ways, repeats, _WARMUP)
        sides = {}
        for side, way in ways.items():
            planned = [self._planned(load, profile, one, plan) for one, plan in way]
            by_repeat = zip(*(timed[side] for timed in by_rank), strict=True)
            sides[side] = medians(
                [
                    together(
                        [
                            side_of(plan.schedule, times, ranks)
                            for (_, plan), times, ranks in zip(way, planned, zip(*of_ranks, strict=True), strict=True)
                        ],
                        [timed for of_rank in of_ranks for timed in of_rank],
                    )
                    for of_ranks in by_repeat
                ]
            )
        return sides["serial"], sides["fused"]

    def _planned(self, load: Workload, profile: Profile, one: Round, plan: Plan) -> PlannedTimes:
        replicas = replicas_of(self._placement, one.counts)
        shapes = [[load.shape(samples) for samples in one.parts[replica.model].micro_batches] for replica in replicas]
        return planned_times(plan.schedule, profile, [replica.name for replica in replicas], shapes)

    def _on_all(
        self, method: Callable[Concatenate[TrainingWorker, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> list[_T]:
        return gather([worker.call(method, *args, **kwargs) for worker in self._workers])
