"""A device's process in `fuse bench training`: trains by several plans in turn, and says when everything happened."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from fuse.algorithms.batch import Experience
from fuse.intrastage import communication
from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.placement import Replica
from fuse.intrastage.training_schedule import RankPlan
from fuse.trace import Span, SpanRecorder, now_s
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TrainingRank, TrainingSettings
from fuse.training.rounds import Round

LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True)
class TimedRound:
    """One round on one rank; times are of `fuse.trace.now_s`."""

    start_s: float
    end_s: float
    spans: list[Span]


Way = Sequence[tuple[Round, RankPlan]]
"""To train: rounds of optimizer steps, and how each is scheduled."""


class TrainingWorker:
    """Runs on one device, as rank `rank`. Call `serve_store` on rank 0, then the rest on all ranks at once."""

    def __init__(self, rank: int, settings: TrainingSettings) -> None:
        torch.set_num_threads(1)
        self._rank, self._settings = rank, settings
        self._recorder = SpanRecorder()

    def serve_store(self, host: str) -> int:
        """Open the store at which the ranks meet; returns its port."""
        self._store = communication.serve_store(host, self._settings.timeout_s)
        return self._store.port

    def connect(self, host: str, port: int, world_size: int) -> None:
        """Join the world."""
        communication.connect(self._rank, world_size, host, port, torch.device("cpu"), self._settings.timeout_s)

    def place(self, specs: Mapping[str, ModelSpec], placement: tuple[Replica, ...]) -> None:
        """Build the stages that belong here, with random weights, in place of those before."""
        cpu = torch.device("cpu")
        self._training = TrainingRank(self._rank, cpu, specs, placement, self._settings, self._recorder)
        for model, spec in specs.items():
            torch.manual_seed(0)
            self._training.load_weights(model, spec.model_class(spec.config).state_dict())

    def profile(self, experience: Experience, micro_batches: Sequence[Sequence[int]], in_turn: bool) -> Profile:
        """This rank's part of the profile on these micro-batches, one of each shape. in_turn: while others idle."""
        profile = self._training.profile(experience, micro_batches, in_turn=in_turn)
        self._recorder.drain()
        return profile

    def alternate(
        self, experience: Experience, ways: Mapping[str, Way], repeats: int, warmup: int
    ) -> dict[str, list[list[TimedRound]]]:
        """Train each way in turn, as `_in_turn` has it: [repeats][rounds]."""

        def train(one: Round, plan: RankPlan) -> None:
            self._training.train(experience, [one], [dict.fromkeys(one.parts, LEARNING_RATE)], {one.counts: plan})

        steps = {name: [partial(train, *one) for one in way] for name, way in ways.items()}
        return self._in_turn(steps, repeats, warmup)

    def _in_turn(
        self, ways: Mapping[str, Sequence[Callable[[], None]]], repeats: int, warmup: int = 1
    ) -> dict[str, list[list[TimedRound]]]:
        """Do the rounds of each way in turn, `warmup` times that do not count and then `repeats` times.

        All ranks begin a way together. Returns [repeats][rounds] of each.
        """
        timed: dict[str, list[list[TimedRound]]] = {name: [] for name in ways}
        gc.collect()
        for repeat in range(warmup + repeats):
            for name, way in ways.items():
                dist.barrier()
                rounds = [self._timed(take) for take in way]
                if repeat >= warmup:
                    timed[name].append(rounds)
        return timed

    def _timed(self, take: Callable[[], None]) -> TimedRound:
        start_s = now_s()
        take()
        return TimedRound(start_s, now_s(), self._recorder.drain())
