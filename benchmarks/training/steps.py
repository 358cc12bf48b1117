"""Real training steps of actor and critic, serial and fused in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from fuse.benchmarks.llama import llama_config
from fuse.benchmarks.training.batches import Task, Workload
from fuse.benchmarks.training.contention import contended_times
from fuse.benchmarks.training.rows import Side, medians, side_of, together
from fuse.benchmarks.training.settings import SETTINGS
from fuse.benchmarks.training.worker import TrainingWorker
from fuse.benchmarks.training.world import World, started
from fuse.intrastage.cost_profile import Profile, merge
from fuse.intrastage.micro_batch_number import Work, median_gap_s, soonest
from fuse.intrastage.placement import place, replicas_of
from fuse.intrastage.planned_times import PlannedTimes
from fuse.intrastage.training_schedule import Plan, fused_schedule, serial_schedule
from fuse.training.model_spec import ModelSpec
from fuse.training.rounds import Round, rounds
from fuse.training.steps import OptimizerStep
from schedules import Schedule

_WARMUP = 1
_CONTEXT = 8192
_CLASSES = {"actor": LlamaForCausalLM, "critic": LlamaForSequenceClassification}


class Trainers:
    """Training workers on all devices, which build one pair of models after the other."""

    def __init__(self, world: World[TrainingWorker]) -> None:
        self._world, count = world, world.size
        self._placement = (*place("actor", count, count), *place("critic", count, count, reverse=True))

    @classmethod
    @contextmanager
    def start(cls, num_devices: int) -> Iterator[Trainers]:
        """Raises: as `started`."""
        with started(TrainingWorker, num_devices, SETTINGS) as world:
            yield cls(world)

    def build(self, layers: Mapping[str, int], *, hidden_size: int, vocab_size: int) -> None:
        """Random Llamas of so many layers, spread evenly over the devices, in place of those before."""
        options = {"context": _CONTEXT, "hidden_size": hidden_size, "vocab_size": vocab_size, "num_labels": 1}
        specs = {
            model: ModelSpec(
                model_class=_CLASSES[model], config=llama_config(num_layers=num_layers, **options), dtype=torch.float32
            )
            for model, num_layers in layers.items()
        }
        self._world.call(TrainingWorker.place, specs, self._placement)

    def profile(self, load: Workload, *, in_turn: bool = False) -> Profile:
        """What every stage costs on micro-batches of all kinds. in_turn: on one rank while the others idle."""
        return merge(self._world.call(TrainingWorker.profile, load.experience, load.buckets(), in_turn))

    def compare(
        self,
        load: Workload,
        task: Task,
        profile: Profile,
        alone: Profile,
        *,
        repeats: int,
        solve_s: float,
        critic_epochs: int = 1,
    ) -> tuple[dict[str, Side], dict[str, float]]:
        """Take the task's step by serial and by fused schedules, in turn; the critic takes it `critic_epochs` times.

        profile, alone: costs while all ranks compute, by which steps are planned, and while the others idle.

        Returns both sides, and how many times as many micro-batches as were drawn each trained in.
        """
        step = OptimizerStep(micro_batches=task.micro_batches, weight=1 / len(task.micro_batches))
        steps = {"actor": [step], "critic": [step] * critic_epochs}

        def fused(work: Work) -> Schedule:
            replicas = replicas_of(self._placement, work.counts)
            return fused_schedule(profile, replicas, work.counts, work.typical, time_limit_s=solve_s)

        def serial(work: Work) -> Schedule:
            return serial_schedule(replicas_of(self._placement, work.counts), work.counts)

        drawn = {name: rounds(steps, dict.fromkeys(steps, 1), is_fused=name == "fused") for name in ("serial", "fused")}
        gap_s = self._gap_s(load, drawn["serial"], serial) if load.chooses_number else 0.0
        ways: dict[str, list[tuple[Round, Plan]]] = {}
        times: dict[str, float] = {}
        for side, schedule in {"serial": serial, "fused": fused}.items():
            times[side] = self._times(load, drawn[side], profile, schedule, gap_s) if load.chooses_number else 1.0
            of_side = load.prepared(drawn[side], times[side])
            plans = {
                one.counts: Plan(schedule(work), profile) for one, work in zip(of_side, load.work(of_side), strict=True)
            }
            ways[side] = [(one, plans[one.counts]) for one in of_side]
        for_ranks = {side: [(one, plan.for_ranks) for one, plan in way] for side, way in ways.items()}
        by_rank = self._world.call(TrainingWorker.alternate, load.experience, for_ranks, repeats, _WARMUP)
        sides = {}
        for side, way in ways.items():
            planned = [self._planned(load, profile, alone, one, plan) for one, plan in way]
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
        return sides, times

    def _gap_s(self, load: Workload, drawn: Sequence[Round], schedule: Callable[[Work], Schedule]) -> float:
        """What lies between two operations, from a step of which nothing else is kept."""
        of_step = load.prepared(drawn)
        way = [(one, Plan(schedule(work)).for_ranks) for one, work in zip(of_step, load.work(of_step), strict=True)]
        by_rank = self._world.call(TrainingWorker.alternate, load.experience, {"serial": way}, 1, 0)
        return median_gap_s([span for of_rank in by_rank for one in of_rank["serial"][0] for span in one.spans])

    def _times(
        self,
        load: Workload,
        drawn: Sequence[Round],
        profile: Profile,
        schedule: Callable[[Work], Schedule],
        gap_s: float,
    ) -> float:
        def works(times: float) -> list[Work]:
            return load.work(load.prepared(drawn, times))

        least_tokens = min(one.shape.size for one in profile.stages)
        return soonest(works, profile, self._placement, schedule, least_tokens=least_tokens, gap_s=gap_s)

    def _planned(self, load: Workload, profile: Profile, alone: Profile, one: Round, plan: Plan) -> PlannedTimes:
        replicas = replicas_of(self._placement, one.counts)
        shapes = [[load.shape(samples) for samples in one.parts[replica.model].micro_batches] for replica in replicas]
        return contended_times(plan.schedule, profile, alone, [replica.name for replica in replicas], shapes)
