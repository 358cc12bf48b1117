"""Samples on engines of as few pipelines as hold them, so that the others come free as wholes, to train.

A pipeline trains early while none of its devices has samples. Where the last samples are is a choice between engines
that are alike, which a policy for samples makes without regard to pipelines: of 32 engines the last 8 samples are on
nearly all of 4 pipelines, though one would hold them. So what another policy decides is changed in two ways.

Devices that come into use, to decode or to score, are those of the pipelines that are in use most: free devices are
interchangeable, and the rollout is the same.

And all samples of a pipeline move, engine by engine, to free engines of others, where that pays. Each sample that moves
is the last one with the same probability as any other that is live, and its delay then delays the rollout. The devices
gained are a part of all: they train so much earlier as the pipeline's own samples would have kept them from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel, cheaper_migration
from fuse.interstage.migration import (
    Action,
    Infer,
    Migrate,
    Policy,
    Release,
    RolloutState,
    Room,
    evens_out,
    free_devices,
)
from fuse.interstage.tail import spare_s

Ints = NDArray[np.int64]

_CAUTION = 4
"""A pipeline that comes free must save so many times what the moves cost: not all of its time is used to train."""


@dataclass(frozen=True, slots=True, eq=False)
class OnFewPipelines:
    """A policy whose samples are on few pipelines.

    policy: for all else. pipelines: devices of each, of which each device is in one at most. costs: of moves; None
    before they are known, when no sample moves for this.
    """

    policy: Policy
    pipelines: tuple[tuple[int, ...], ...]
    costs: CostModel | None
    can_transfer: bool = True

    @property
    def evens_out(self) -> bool:
        """As of the policy."""
        return evens_out(self.policy)

    def spare_s(self, state: RolloutState) -> float:
        """As of the policy."""
        return spare_s(self.policy, state)

    def __call__(self, state: RolloutState) -> list[Action]:
        if not len(state.live):
            return self.policy(state)
        moves = self._gather(state)
        after = _moved(state, moves)
        return [*moves, *self._in_order_of_use(after, self.policy(after))]

    def _gather(self, state: RolloutState) -> list[Migrate]:
        """Moves that empty pipelines, those with the fewest engines in use first."""
        if self.costs is None or len(self.pipelines) == 1 or not state.live.movable.all():
            return []
        counts, idle, moves = state.num_live(), set(free_devices(state)), list[Migrate]()
        used = sorted(
            (one for one in self.pipelines if counts[list(one)].any()),
            key=lambda one: (np.count_nonzero(counts[list(one)]), counts[list(one)].sum()),
        )
        room, left_s = Room(state), None
        while len(used) > 1:
            emptied = used.pop(0)
            targets = [device for one in reversed(used) for device in one if device in idle and not state.lost[device]]
            sources = [device for device in emptied if counts[device]]
            if len(targets) < len(sources):
                break
            own = [
                Migrate(sample, source, target)
                for source, target in zip(sources, targets, strict=False)
                for sample in state.live.ids[state.live.devices == source].tolist()
            ]
            left_s = spare_s(self.policy, state) if left_s is None else left_s
            if not self._pays(state, len(emptied), own, left_s):
                break
            moves += own
            idle -= set(targets[: len(sources)])
        return moves

    def _pays(self, state: RolloutState, num_devices: int, moves: Sequence[Migrate], left_s: float) -> bool:
        """Whether devices that come free for the time until their samples would have ended are worth the moves.

        left_s: until all samples are expected to have ended. Of n alike, the last of m ends after a part H(m) / H(n) of
        that, if they end at a constant rate.
        """
        assert self.costs is not None
        num_live = len(state.live)
        context = dict(zip(state.live.ids.tolist(), state.live.context_tokens.tolist(), strict=True))
        move_s = sum(
            self.costs.hand_out_s
            + cheaper_migration(self.costs, context[move.sample], can_transfer=self.can_transfer).seconds
            for move in moves
        )
        freed_s = left_s * _harmonic(len(moves)) / _harmonic(num_live)
        return num_devices / state.num_devices * freed_s > _CAUTION * move_s / num_live

    def _in_order_of_use(self, state: RolloutState, actions: Sequence[Action]) -> list[Action]:
        """The actions with free devices exchanged, so that those of pipelines in use come into use first."""
        is_used = (_counts_after(state, actions) > 0) | (state.inferring_tokens > 0)
        free = [device for device in free_devices(state) if not state.lost[device]]
        decoding = list(dict.fromkeys(one.target for one in actions if isinstance(one, Migrate) and one.target in free))
        scoring = [one.device for one in actions if isinstance(one, Infer) and one.device in free]
        if not decoding and len(scoring) == len(free):
            return list(actions)
        in_use = {device: int(np.count_nonzero(is_used[list(own)])) for own in self.pipelines for device in own}
        by_use = sorted(free, key=lambda device: (-in_use.get(device, 0), device))
        places = dict(zip([*decoding, *(one for one in scoring if one not in decoding)], by_use, strict=False))
        return [exchanged for one in actions for exchanged in _exchanged(one, places, state)]


def _exchanged(action: Action, places: dict[int, int], state: RolloutState) -> list[Action]:
    """With other devices in place of some; only what is released scores."""
    if isinstance(action, Migrate):
        return [replace(action, target=places.get(action.target, action.target))]
    if isinstance(action, Release):
        return [] if action.device in places else [action]
    device = places.get(action.device, action.device)
    infer = replace(action, device=device)
    return [infer] if action.device not in places or state.released[device] else [Release(device), infer]


def _moved(state: RolloutState, moves: Sequence[Migrate]) -> RolloutState:
    """Where samples are when they have moved."""
    if not moves:
        return state
    live, targets = state.live, {move.sample: move.target for move in moves}
    devices = [targets.get(sample, device) for sample, device in zip(live.ids.tolist(), live.devices, strict=True)]
    movable = live.movable & ~np.isin(live.ids, list(targets))
    return replace(state, live=replace(live, devices=np.array(devices), movable=movable))


def _counts_after(state: RolloutState, actions: Sequence[Action]) -> Ints:
    counts = state.num_live()
    for action in actions:
        if isinstance(action, Migrate):
            counts[action.source] -= 1
    return counts


def _harmonic(number: int) -> float:
    return float((1 / np.arange(1, number + 1)).sum())
