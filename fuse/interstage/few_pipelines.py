"""Samples on engines of as few pipelines as hold them, so that the others come free as wholes, to train.

A pipeline trains early while none of its devices has samples. Engines are alike to a policy for samples, whatever
pipelines they are of: of 32 engines the last 8 samples may be on all of 4 pipelines of 8, though one would hold them.
So all samples of a pipeline move, engine by engine, to free engines of others, where that pays.

What it brings is devices that train until the pipeline's own samples would have ended, as far as there is work for
more of them than train anyway. What it costs is the delay of each sample that moves, which is as likely as any other
that is live to be the last, and so to delay the rollout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuse.interstage.costs import CostModel, migration_s
from fuse.interstage.migration import Action, Migrate, Policy, RolloutState, Room, evens_out, free_devices
from fuse.interstage.tail import spare_s

_CAUTION = 4
"""Devices that come free must save so many times what the moves cost: not all of their time is used to train."""
_WAITS = 6
"""Device-seconds to keep for training, over those of its operations: it fills no pipeline, and samples may end soon."""


def on_few_pipelines(
    policy: Policy, pipelines: Sequence[Sequence[int]], costs: CostModel | None, *, can_transfer: bool = True
) -> Policy:
    """The policy as it is to be where the devices of each of these pipelines train together; itself where all the same.

    costs: of moves; None before they are known.
    """
    if costs is None or len(pipelines) == 1 or all(len(one) == 1 for one in pipelines):
        return policy
    return OnFewPipelines(policy, tuple(map(tuple, pipelines)), costs, can_transfer)


@dataclass(frozen=True, slots=True, eq=False)
class OnFewPipelines:
    """A policy, and before each of its decisions moves that empty pipelines.

    pipelines: devices of each, of which each device is in one at most.
    """

    policy: Policy
    pipelines: tuple[tuple[int, ...], ...]
    costs: CostModel
    can_transfer: bool

    @property
    def evens_out(self) -> bool:
        """As of the policy."""
        return evens_out(self.policy)

    def spare_s(self, state: RolloutState) -> float:
        """As of the policy."""
        return spare_s(self.policy, state)

    def __call__(self, state: RolloutState) -> list[Action]:
        moves = self._gather(state) if len(state.live) and state.live.movable.all() else []
        return [*moves, *self.policy(_moved(state, moves))]

    def _gather(self, state: RolloutState) -> list[Migrate]:
        """Moves that empty pipelines, those with the fewest engines in use first."""
        counts, idle, room = state.num_live(), set(free_devices(state)) - {*np.flatnonzero(state.lost)}, Room(state)
        left_s = spare_s(self.policy, state) if idle else 0.0
        if not 0 < left_s < math.inf:  # there is no time to train, or the policy knows of none
            return []
        used = sorted(
            (one for one in self.pipelines if counts[list(one)].any()),
            key=lambda one: (np.count_nonzero(counts[list(one)]), counts[list(one)].sum()),
        )
        num_free = sum(len(one) for one in self.pipelines if one not in used)
        wanted_s = _WAITS * self._work_s(state)
        moves: list[Migrate] = []
        kept: set[int] = set()  # devices to which samples move
        while len(used) > 1:
            emptied = used.pop(0)
            targets = [device for one in reversed(used) for device in one if device in idle]
            sources = [device for device in emptied if counts[device]]
            own = [
                Migrate(sample, source, target)
                for source, target in zip(sources, targets, strict=False)
                for sample in state.live.ids[state.live.devices == source].tolist()
            ]
            is_worth_it = self._pays(state, own, len(emptied), left_s, wanted_s - num_free * left_s)
            can_move = len(targets) >= len(sources) and kept.isdisjoint(emptied)
            if not can_move or not is_worth_it or not _fit(state, room, own):
                break
            moves += own
            kept.update(targets[: len(sources)])
            idle -= kept
            num_free += len(emptied)
        return moves

    def _work_s(self, state: RolloutState) -> float:
        """About the device-seconds to train on what is finished: a token takes three forwards, as of models that score.

        What of it has been trained is not seen here, so that this is too much rather than too little.
        """
        ended = state.ended.response_tokens
        return self.costs.inference_token_s * float(ended.sum() + len(ended) * state.live.prompt_tokens.mean())

    def _pays(
        self, state: RolloutState, moves: Sequence[Migrate], num_devices: int, left_s: float, missing_s: float
    ) -> bool:
        """Whether devices that come free until their samples would have ended are worth the moves.

        left_s: until all samples are expected to have ended. Of n alike, the last of m ends after a part H(m) / H(n) of
        that, if they end at a constant rate. missing_s: device-seconds that there is work for.
        """
        num_live = len(state.live)
        context = state.live.context_tokens[np.isin(state.live.ids, [move.sample for move in moves])]
        moves_s = self.costs.hand_out_s + migration_s(self.costs, context, can_transfer=self.can_transfer)
        move_s = float(moves_s.sum())
        freed_s = min(missing_s, num_devices * left_s * _harmonic(len(moves)) / _harmonic(num_live))
        return freed_s / state.num_devices > _CAUTION * move_s / num_live


def _moved(state: RolloutState, moves: Sequence[Migrate]) -> RolloutState:
    """As it is once samples are on their way."""
    if not moves:
        return state
    live, targets = state.live, {move.sample: move.target for move in moves}
    devices = [targets.get(sample, device) for sample, device in zip(live.ids.tolist(), live.devices, strict=True)]
    movable = live.movable & ~np.isin(live.ids, list(targets))
    return replace(state, live=replace(live, devices=np.array(devices), movable=movable))


def _fit(state: RolloutState, room: Room, moves: Sequence[Migrate]) -> bool:
    """Whether the targets hold what is moved, which is accounted for as far as they do."""
    prompt_tokens = dict(zip(state.live.ids.tolist(), state.live.prompt_tokens.tolist(), strict=True))
    for move in moves:
        if not room.fits(move.target, prompt_tokens[move.sample]):
            return False
        room.move(move.source, move.target, prompt_tokens[move.sample])
    return True


def _harmonic(number: int) -> float:
    return float((1 / np.arange(1, number + 1)).sum())
