"""What an update trains before its last samples are there: who is asked to, and what becomes of it in the update.

The gradients stay with the model workers until the update's optimizer steps, whose first one finds the rest to train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fuse.algorithms.algorithm import LEAST_TOKENS
from fuse.algorithms.batch import Experience
from fuse.driver.fleet_settings import FleetSettings
from fuse.interstage.tail import Sharing, TailSettings, Train, micro_batch_tokens, time_tokens, train_early
from fuse.intrastage.placement import Replica
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.roles import GENERATING
from fuse.sample import Sample, SampleState
from fuse.training.rounds import RankRound, Round
from fuse.training.tail import EarlyPiece, FirstStep
from fuse.workers.calls import Future, gather
from fuse.workers.model_handle import ModelHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPlan:
    """What an update may train early.

    step: its first optimizer step of the role that does. known: of samples that models have scored, those whose rewards
    are known, too.
    """

    step: FirstStep
    known: Callable[[Sequence[Sample]], Sequence[Sample]]


@dataclass(slots=True, eq=False)
class Job:
    """A piece under way. devices: of the rollout. calls: that have not ended, by rank. told: by rank, of the others.

    stage_tokens: as of `time_tokens`. factor: how many times as long it should take as on devices that do nothing else.
    """

    piece: EarlyPiece
    devices: tuple[int, ...]
    stage_tokens: int
    factor: float
    calls: dict[Future[RankRound], tuple[int, ModelHandle]]
    told: dict[int, RankRound] = field(default_factory=dict)


class Tail:
    """Has replicas train what of an update's first step may be trained early.

    workers: of all devices. replicas: of the role, all of them. tensor_parallel_size: devices of a rank.
    engine_devices: of an engine, which are one device of a rollout. sharing: as of `TailSettings`. packs: as of
    `Layout`.
    """

    def __init__(
        self,
        plan: TailPlan,
        workers: Sequence[ModelHandle],
        replicas: Sequence[Replica],
        *,
        tensor_parallel_size: int = 1,
        engine_devices: int = 1,
        sharing: Sharing | None = None,
        packs: bool = False,
    ) -> None:
        self._step, self._known, self._workers = plan.step, plan.known, workers
        self._tensor_parallel_size, self._engine_devices = tensor_parallel_size, engine_devices
        self._num_replicas, self._packs = len(replicas), packs
        self._ranks: dict[int, tuple[int, ...]] = {}
        for replica in replicas:  # of opposite ones, which share devices, the first
            if not any(rank in own for own in self._ranks.values() for rank in replica.ranks):
                self._ranks[replica.index] = tuple(dict.fromkeys(replica.ranks))
        self._settings = TailSettings(
            micro_batch_size=plan.step.micro_batch_size,
            num_stages=max(len(ranks) for ranks in self._ranks.values()),
            num_kept=self._num_replicas * plan.step.num_parts,
            num_replicas=len(self._ranks),
            sharing=sharing,
        )
        self._told: list[dict[int, RankRound]] = []  # by piece, by rank
        self._token_s: float | None = None
        self._early: list[Round] = []
        self.report: dict[str, float] = {}
        """Of the update, once it is trained."""

    @property
    def num_stages(self) -> int:
        """Of a replica."""
        return self._settings.num_stages

    @property
    def pipelines(self) -> tuple[tuple[int, ...], ...]:
        """Devices of the rollout that train together, of each replica."""
        return tuple(map(self._devices, self._ranks))

    @property
    def num_trained(self) -> int:
        """Samples that have been given to replicas."""
        return self._step.num_samples - self._step.num_left

    def start(
        self,
        decoding: Mapping[int, int],
        samples: Sequence[Sample],
        max_new_tokens: int,
        within_s: Callable[[], float] = lambda: math.inf,
    ) -> list[Job]:
        """Have replicas train whose devices are free, or decode a few samples where that pays.

        decoding: by device of the rollout that does nothing else, how many it decodes. samples: of the update, scored
        or not. max_new_tokens: the most of any response. within_s: as of `train_early`, asked where something could be
        trained.
        """
        devices = {replica: self._devices(replica) for replica in self._ranks} if decoding else {}
        by_replica = {
            replica: max(decoding[device] for device in own)
            for replica, own in devices.items()
            if all(device in decoding for device in own)
        }
        takers = self._settings.takers(by_replica)
        if not takers or self._step.num_left <= self._settings.num_kept:
            return []  # nothing could be, and there is no need to look
        width = max(len(sample.response_ids) for sample in samples)
        ready = self._step.ready(self._indices_known(samples, width, max_new_tokens))
        if len(ready) <= self._settings.num_kept:
            return []
        tokens = np.array([len(sample.prompt_ids) + sample.length for sample in samples])
        actions = train_early(*(ready, tokens, takers, self._settings), token_s=self._token_s, within_s=within_s())
        return [
            self._job(action, samples, width, tokens)
            for action in actions
            if sum(samples[sample].length for own in action.micro_batches for sample in own) >= LEAST_TOKENS
        ]

    def _indices_known(self, samples: Sequence[Sample], width: int, max_new_tokens: int) -> set[int]:
        """Of samples of which all is known that depends on no other."""
        scored = [sample for sample in samples if sample.state is SampleState.SCORED]
        known = {
            sample.id
            for sample in self._known(scored)
            if not self._step.early.needs_longer or len(sample.response_ids) < width or width >= max_new_tokens
        }
        return {index for index, sample in enumerate(samples) if sample.id in known}

    def _job(self, action: Train, samples: Sequence[Sample], width: int, tokens: NDArray[np.int64]) -> Job:
        piece = self._step.take(action.replica, action.micro_batches, samples, width)
        calls = {}
        for rank in self._ranks[action.replica]:
            for lane in range(self._tensor_parallel_size):
                worker = self._workers[rank * self._tensor_parallel_size + lane]
                call = worker.accumulate(self._step.early.role, piece.replica, piece.experience, piece.part)
                calls[call] = rank, worker
        stage_tokens = time_tokens(micro_batch_tokens(piece.micro_batches, tokens), self.num_stages)
        job = Job(piece, self._devices(action.replica), stage_tokens, action.factor, calls)
        self._told.append(job.told)
        return job

    def took(self, job: Job, seconds: float) -> None:
        """Learn what a piece that is over took."""
        self._token_s = seconds / job.stage_tokens / job.factor

    def _devices(self, replica: int) -> tuple[int, ...]:
        """Of the rollout."""
        size = self._tensor_parallel_size
        devices = [rank * size + lane for rank in self._ranks[replica] for lane in range(size)]
        return tuple(dict.fromkeys(device // self._engine_devices for device in devices))

    # When all samples are known

    def rest(
        self, experience: Experience, drawn: Sequence[Round], dealt: Sequence[Round], planner: TrainingPlanner
    ) -> Sequence[Round]:
        """The rounds that are left to train; gradients of what has been trained are what they are in the whole step.

        drawn, dealt: the update's rounds as they were drawn, and as they would be trained.
        """
        if not self._step.pieces:
            return dealt
        scale = self._step.scale(experience, drawn)
        if scale != 1:
            gather([worker.scale_gradients(self._step.early.role, scale) for worker in self._workers])
        self._early = self._step.early_rounds(experience, drawn)
        count, halves = self._num_replicas, planner.is_fused
        return self._step.rest(experience, drawn, dealt, num_replicas=count, halves=halves, packs=self._packs)

    def whole(
        self, experience: Experience, rounds: Sequence[Round], results: Sequence[Sequence[RankRound]]
    ) -> tuple[list[Round], list[list[RankRound]]]:
        """The update's rounds with what was trained early first, and what each device told of them.

        rounds, results: of the rest.
        """
        role = self._step.early.role
        sizes = [len(prompt) + length for prompt, length in zip(experience.prompts, experience.lengths, strict=True)]
        early, late = _num_tokens(self._early, sizes), _num_tokens(rounds, sizes)
        self.report = {
            "tail/share": early / (early + late),
            "tail/first_step_share": early / sum(sizes[sample] for sample in self._step.samples),
        }
        nothing = RankRound(metrics={}, gradient_norms={}, said={role: ()})
        told = []
        for device, own in enumerate(results):
            rank = device // self._tensor_parallel_size
            of_pieces = [by_rank.get(rank, nothing) for by_rank in self._told]
            told.append([*(replace(one, said={role: one.said.get(role, ())}) for one in of_pieces), *own])
        return [*self._early, *rounds], told


def tail_of(
    plan: TailPlan | None,
    settings: FleetSettings,
    workers: Sequence[ModelHandle],
    planner: TrainingPlanner,
    late_columns: Collection[str],
) -> Tail | None:
    """What trains early in a rollout; None where nothing can.

    That is where memory has no room for engines and training at once, micro-batches are trained as they were drawn or
    are to show what they cost, log-probabilities that the loss needs come later, or a model that trains through a
    pipeline scores through it, too.
    """
    if plan is None or settings.engines_sleep or settings.offloads_training or planner.is_learning:
        return None
    role = plan.step.early.role
    if settings.training.units.get(role) != 1 or (role == GENERATING and late_columns):
        return None
    replicas = [one for one in planner.placement if one.model == role]
    if settings.scoring.is_sharded and any(len(one.ranks) > 1 for one in replicas):
        return None
    return Tail(
        plan,
        workers,
        replicas,
        tensor_parallel_size=settings.training.tensor_parallel_size,
        engine_devices=settings.engine_devices,
        sharing=settings.tail_sharing,
        packs=settings.training.layout.packs,
    )


def _num_tokens(rounds: Sequence[Round], sizes: Sequence[int]) -> int:
    """That are trained on, by all roles."""
    parts = [part for one in rounds for part in one.parts.values()]
    of_samples = sum(sizes[sample] for part in parts for own in part.micro_batches for sample in own)
    return of_samples + sum(text.num_tokens for part in parts for text in part.auxiliary)
