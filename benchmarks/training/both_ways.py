"""Steps of an actor without a critic: two opposite replicas against plain 1F1B, on the same micro-batches in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from transformers import LlamaForCausalLM

from fuse.algorithms.batch import Experience
from fuse.benchmarks.llama import llama_config
from fuse.benchmarks.options import Row
from fuse.benchmarks.training.batches import Task, Workload
from fuse.benchmarks.training.contention import contended_times
from fuse.benchmarks.training.rows import Side, medians, row_of, side_of
from fuse.benchmarks.training.settings import SETTINGS
from fuse.benchmarks.training.worker import LEARNING_RATE, TimedRound, TrainingWorker
from fuse.benchmarks.training.world import World, started
from fuse.intrastage.cost_profile import Profile, merge
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.placement import Replica, place, replica_micro_batches
from fuse.intrastage.training_schedule import Plan, RankPlan, fused_schedule, serial_schedule
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank
from fuse.training.rounds import Round, rounds
from fuse.training.steps import OptimizerStep

PLAIN, BOTH = "plain", "both ways"
_WARMUP = 1
_CONTEXT = 8192


class BothWaysWorker(TrainingWorker):
    """A training worker that holds its stages of the actor in several placements at once."""

    def place_each(self, spec: ModelSpec, placements: Mapping[str, tuple[Replica, ...]]) -> None:
        """Build the stages that belong here, with the same random weights in each placement."""
        self._trainings: dict[str, TrainingRank] = {}
        for name, placement in placements.items():
            training = TrainingRank(
                self._rank, torch.device("cpu"), {"actor": spec}, placement, self._settings, self._recorder
            )
            torch.manual_seed(0)
            training.load_weights("actor", spec.model_class(spec.config).state_dict())
            self._trainings[name] = training

    def profile_each(
        self, experience: Experience, micro_batches: Sequence[Sequence[int]], in_turn: bool
    ) -> dict[str, Profile]:
        """This rank's part of each placement's profile. in_turn: while others idle."""
        profiles = {
            name: training.profile(experience, micro_batches, in_turn=in_turn)
            for name, training in self._trainings.items()
        }
        self._recorder.drain()
        return profiles

    def take_turns(
        self, experience: Experience, step: Round, plans: Mapping[str, RankPlan], repeats: int
    ) -> dict[str, list[list[TimedRound]]]:
        """Take the step in each placement in turn, as `_in_turn` has it."""

        def train(name: str, plan: RankPlan) -> None:
            self._trainings[name].train(experience, [step], [{"actor": LEARNING_RATE}], {step.counts: plan})

        return self._in_turn({name: [partial(train, name, plan)] for name, plan in plans.items()}, repeats)


class BothWays:
    """Workers on all devices, which hold one actor twice: in one pipeline, and in two opposite replicas."""

    def __init__(self, world: World[BothWaysWorker]) -> None:
        plain = place("actor", world.size, world.size)
        self._world = world
        self._placements = {PLAIN: plain, BOTH: with_opposites(plain)}

    @classmethod
    @contextmanager
    def start(cls, num_devices: int) -> Iterator[BothWays]:
        """Raises: as `started`."""
        with started(BothWaysWorker, num_devices, SETTINGS) as world:
            yield cls(world)

    def build(self, num_layers: int, *, hidden_size: int, vocab_size: int) -> None:
        """A random Llama, spread evenly over the devices."""
        config = llama_config(num_layers=num_layers, context=_CONTEXT, hidden_size=hidden_size, vocab_size=vocab_size)
        spec = ModelSpec(model_class=LlamaForCausalLM, config=config, dtype=torch.float32)
        self._world.call(BothWaysWorker.place_each, spec, self._placements)

    def profiles(self, load: Workload, *, in_turn: bool = False) -> dict[str, Profile]:
        """What every stage costs on micro-batches of all kinds, by placement. in_turn: on one rank at a time."""
        of_ranks = self._world.call(BothWaysWorker.profile_each, load.experience, load.buckets(), in_turn)
        return {name: merge(of_rank[name] for of_rank in of_ranks) for name in self._placements}

    def row(
        self,
        load: Workload,
        task: Task,
        profiles: Mapping[str, Profile],
        alone: Mapping[str, Profile],
        layers: int,
        *,
        repeats: int,
        solve_s: float,
    ) -> Row:
        """Take the task's step in both placements, in turn. The row is of `row_of`: serial is plain 1F1B.

        predicted_ratio: each side's planned operations with its own measured setup, sums of gradients and optimizer.
        """
        sides = self._sides(load, task, profiles, alone, repeats=repeats, solve_s=solve_s)
        plain, both = sides[PLAIN], sides[BOTH]
        tokens = [load.shape(samples).size for samples in load.micro_batches(task)]
        row = row_of(BOTH, {"actor": layers, "critic": 0}, task, tokens, plain, both, padding=load.padding(task))
        plain_ms, both_ms = (one["planned_ms"] + one["setup_ms"] + one["optimizer_ms"] for one in (plain, both))
        predicted = plain_ms / both_ms
        return row | {
            "predicted_ratio": predicted,
            "gain_share": (row["ratio"] - 1) / (predicted - 1) if predicted != 1 else 1.0,
        }

    def _sides(
        self,
        load: Workload,
        task: Task,
        profiles: Mapping[str, Profile],
        alone: Mapping[str, Profile],
        *,
        repeats: int,
        solve_s: float,
    ) -> dict[str, Side]:
        count = len(task.micro_batches)
        shapes = [load.shape(samples) for samples in load.micro_batches(task)]
        middle = sorted(shapes, key=lambda shape: shape.size)[count // 2]
        schedules = {
            PLAIN: serial_schedule(self._placements[PLAIN], count),
            BOTH: fused_schedule(profiles[BOTH], self._placements[BOTH], count, middle, time_limit_s=solve_s),
        }
        plans = {name: Plan(schedule).for_ranks for name, schedule in schedules.items()}
        whole = OptimizerStep(micro_batches=task.micro_batches, weight=1 / count)
        (step,) = load.prepared(rounds({"actor": [whole]}, {"actor": 1}, is_fused=True))
        by_rank = self._world.call(BothWaysWorker.take_turns, load.experience, step, plans, repeats)
        sides = {}
        for name, schedule in schedules.items():
            replicas = self._placements[name]
            dealt = [[shapes[i] for i in replica_micro_batches(count, len(replicas), one.index)] for one in replicas]
            names = [one.name for one in replicas]
            planned = contended_times(schedule, profiles[name], alone[name], names, dealt)
            by_repeat = zip(*(steps[name] for steps in by_rank), strict=True)
            sides[name] = medians([side_of(schedule, planned, [one for (one,) in ranks]) for ranks in by_repeat])
        return sides
