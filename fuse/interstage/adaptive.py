"""The policy that plans again as samples finish, from the remaining-length model and the costs.

Each plan answers three questions. How many engines are to decode: as many as end the rollout soonest by a fluid model
of what is ahead, on the mean of a few draws of it; some are given up now only if no later change would do better. Which
samples go where: while one engine holds up the end, rather than all the work that is left, samples move one by one as
long as the expected end comes earlier by it. How much is scored at once: half of what a free device has yet to do, so
that all devices end together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel, fastest, migration_s
from fuse.interstage.fluid import Outlook, best_num_engines
from fuse.interstage.lengths import RemainingLengths
from fuse.interstage.migration import (
    Action,
    LiveSamples,
    Migrate,
    RolloutState,
    Room,
    consolidate,
    feed,
    free_devices,
)

Floats = NDArray[np.float64]

_LEAST_MOVE_GAIN = 1e-4
"""Part of the time to come that the move of one sample must save."""
_CAUTION = 2
"""A move must save its sample this many times the delay that it brings, for more moves may follow."""
_SHARPNESS = 16
"""A sample's predicted end, as a part of the last one, to this power: in proportion to the chance that it ends last."""
_TRUST = 0.5
"""To this power it counts that siblings make a sample likelier to be long: groups are not quite as is assumed."""
_MAX_MOVES = 64
"""Moves in one plan that only even out engines; the next finish plans again."""
_LEAST_TOKEN_S = 1e-12
_NUM_DRAWS = 4
"""Draws of what is ahead that a plan is made for: how long the longest sample is matters, and varies the most."""
_FINISHES = 32
"""About so many finishes are planned for until half of the live samples are left; with fewer live, every one is."""
_PIECE = 0.5
"""A device is given this part of what it has yet to score at once."""
_LEAST_PIECE = 2.0
"""A piece takes at least this many times what a micro-batch costs and what it takes to hand it out."""
_HAND_OUT_S = 5e-3
"""From the end of a piece to the start of the next, by way of the controller, where it has not been measured."""
_HOLDS_UP = 0.85
"""An engine holds up the rollout if it ends after this part of the time to come."""


@dataclass(frozen=True, slots=True, eq=False)
class Adaptive:
    """`adaptive`: as many engines decode as finish everything soonest, and their loads are kept even."""

    costs: CostModel
    lengths: RemainingLengths
    can_transfer: bool = True

    evens_out: ClassVar[bool] = True

    def __call__(self, state: RolloutState) -> list[Action]:
        if not len(state.live):
            return feed(state, (), least_tokens=self._least_tokens)
        is_due = _is_due(state.live) and state.num_devices > 1
        if not is_due and not (state.finished_tokens.sum() >= self._least_tokens and free_devices(state)):
            return []
        return replace(self, lengths=self.lengths.given(state.live, state.ended))._plan(state, is_due)

    def _plan(self, state: RolloutState, is_due: bool) -> list[Action]:
        ends_s, end_s = self._ends(state)
        moves = self._moves(state, ends_s, end_s) if is_due else []
        piece_tokens = _PIECE * end_s / max(self.costs.inference_token_s, _LEAST_TOKEN_S)
        return [*moves, *feed(state, moves, max(piece_tokens, self._least_tokens), self._least_tokens)]

    def spare_s(self, state: RolloutState) -> float:
        """Seconds from when all is scored, if all devices share that, to the expected end of the last sample."""
        ends_s, end_s = replace(self, lengths=self.lengths.given(state.live, state.ended))._ends(state)
        return max(0.0, float(ends_s.max()) - end_s)

    @property
    def _least_tokens(self) -> float:
        """Of a piece, while more is to come."""
        least_s = _LEAST_PIECE * (self.costs.inference_s + (self.costs.hand_out_s or _HAND_OUT_S))
        return least_s / max(self.costs.inference_token_s, _LEAST_TOKEN_S)

    def _moves(self, state: RolloutState, ends_s: Floats, end_s: float) -> list[Migrate]:
        free = [device for device in free_devices(state) if not state.lost[device]]
        num_engines = int(np.count_nonzero(state.num_live()[~state.lost]))
        num_wanted = self._num_engines(state, num_engines, len(free))
        if num_wanted < num_engines:
            costs, context = self._typical_costs(state.live, num_wanted), state.live.context_tokens.astype(np.float64)
            loads = costs.sample_s + costs.context_s * context
            return consolidate(state, num_wanted, loads)
        if num_wanted > num_engines or ends_s.max() > _HOLDS_UP * end_s:
            return self._even_out(state, self._forecast(state, num_wanted), free[: num_wanted - num_engines])
        return []

    def _num_engines(self, state: RolloutState, num_engines: int, num_free: int) -> int:
        live, counts = state.live, state.num_live()
        context = np.bincount(live.devices, weights=live.context_tokens, minlength=state.num_devices)
        widest = int(np.argmax(live.context_tokens))
        levels = np.random.default_rng(0).random((_NUM_DRAWS, len(live)))
        # Each sample is to be as likely as any other to be among the last: the fluid model knows of no sample that is
        # told to be long, nor that it sits on one engine with its siblings, which are long, too.
        lengths = self.lengths.untold()
        outlook = Outlook(
            costs=self.costs,
            remaining=lengths.quantile(live.ids, live.response_tokens, levels),
            live=counts[counts > 0],
            context_tokens=context[counts > 0],
            widest=(widest, int(live.context_tokens[widest])),
            backlog_tokens=float(state.finished_tokens.sum() + state.inferring_left.sum()),
            num_devices=state.num_devices,
            max_batch=state.limits.max_batch,
            can_transfer=self.can_transfer,
        )
        return best_num_engines(outlook, min(len(live), num_engines + num_free))

    def _ends(self, state: RolloutState) -> tuple[Floats, float]:
        """Seconds until each device is done with what it has now, [devices], and until all are done with everything.

        Devices that are done score what the others finish. The second figure is the level to which that work fills up
        the devices' ends.
        """
        costs, live = self.costs, state.live
        ends_s = costs.inference_token_s * state.inferring_left
        tokens = float(state.finished_tokens.sum())
        if len(live):
            counts = state.num_live()
            mean = self.lengths.expected(live.ids, live.response_tokens)
            # The median of the longest of n alike is where each of them is with probability 0.5 ** (1 / n).
            far = self.lengths.quantile(live.ids, live.response_tokens, 0.5 ** (1 / counts[live.devices]))
            steps = np.zeros(state.num_devices)
            np.maximum.at(steps, live.devices, far)
            busy_s = ends_s

            def until_ends(one: CostModel) -> Floats:
                own_s = mean * (one.sample_s + one.context_s * (live.context_tokens + mean / 2))
                decode_s = np.bincount(live.devices, own_s, minlength=state.num_devices)
                together_s: Floats = busy_s + steps * one.step_s + decode_s
                return together_s

            ends_s = fastest(costs, until_ends)
            tokens += float((live.context_tokens + mean).sum())
        in_order = np.sort(ends_s)
        levels_s = (costs.inference_token_s * tokens + np.cumsum(in_order)) / np.arange(1, len(in_order) + 1)
        return ends_s, float(levels_s[np.flatnonzero(levels_s >= in_order)[-1]])

    def _typical_costs(self, live: LiveSamples, num_engines: int) -> CostModel:
        """Of a batch of the mean size."""
        return self.costs.at(len(live) / num_engines, float(live.context_tokens.sum()) / num_engines)

    def _forecast(self, state: RolloutState, num_engines: int) -> _Forecast:
        """Of samples on so many engines."""
        costs, live = self.costs, state.live
        untold = self.lengths.untold()
        # The median of the longest of n alike is where each of them is with probability 0.5 ** (1 / n).
        far = untold.quantile(live.ids, live.response_tokens, 0.5 ** (1 / len(live)))
        chance, untold_chance = (one.chance(live.ids, live.response_tokens, far - 1) for one in (self.lengths, untold))
        context = live.context_tokens
        prefill_s = costs.prefill_token_s * context / _num_sharing(live)
        # The median of the shorter of two alike: a sample told to be long adds to the steps of others until these end.
        shared = untold.quantile(live.ids, live.response_tokens, 1 - 0.5**0.5)

        def own_s(one: CostModel, tokens: Floats) -> Floats:
            return tokens * (one.sample_s + one.context_s * (context + tokens / 2)) + prefill_s

        inference_s = costs.inference_s + costs.inference_token_s * (context + far)
        return _Forecast(
            alone_s=fastest(costs, lambda one: far * one.step_s + own_s(one, far) + inference_s),
            shared_s=own_s(self._typical_costs(live, num_engines), shared),
            likelier=(chance / untold_chance) ** _TRUST,
        )

    def _even_out(self, state: RolloutState, forecast: _Forecast, fresh: list[int]) -> list[Migrate]:
        """Move samples from engines whose samples are likely to end last to those, or `fresh` devices, that are not.

        A move relieves the samples on the source of the moved one's share of their steps. It burdens the samples on the
        target, and delays the moved one. Each sample counts by how near its predicted end is to the last one, and by
        how much likelier than others of its age it is to come as far.
        """
        live, costs, counts = state.live, self.costs, state.num_live()
        devices = np.array(sorted({*np.flatnonzero((counts > 0) & ~state.lost).tolist(), *fresh}))
        if len(devices) < 2:
            return []
        sample_s = forecast.shared_s
        load_s = np.bincount(live.devices, weights=sample_s, minlength=state.num_devices)
        end_s = forecast.alone_s + load_s[live.devices] - sample_s
        weight = (end_s / end_s.max()) ** _SHARPNESS * forecast.likelier
        weight /= weight.sum()
        at_stake = np.bincount(live.devices, weights=weight, minlength=state.num_devices)
        recompute_s = costs.prefill_s + costs.prefill_token_s * live.context_tokens
        move_s = np.where(live.started, migration_s(costs, live.context_tokens, can_transfer=self.can_transfer), 0.0)
        stall_s = np.where(live.started & (move_s < recompute_s), 0.0, move_s)
        least_s = _LEAST_MOVE_GAIN * float(end_s.max())
        typical_s, typical_weight = float(sample_s.mean()), 1 / len(live)

        room, can_move = Room(state), live.movable.copy()
        moves: list[Migrate] = []
        for _ in range(_MAX_MOVES):
            burden = at_stake[devices] * typical_s + load_s[devices] * typical_weight
            source, target = int(devices[np.argmax(burden)]), int(devices[np.argmin(burden)])
            here = np.flatnonzero((live.devices == source) & can_move)
            if not len(here) or source == target:
                break
            mates_s = (at_stake[source] - weight[here]) * sample_s[here]
            others_s = at_stake[target] * (sample_s[here] + stall_s[here])
            own_s = weight[here] * (load_s[source] - sample_s[here] - load_s[target] - _CAUTION * move_s[here])
            gain_s = mates_s - others_s + own_s - move_s[here] / state.num_devices
            best = int(np.argmax(gain_s))
            index = int(here[best])
            if gain_s[best] <= least_s or not room.fits(target, int(live.prompt_tokens[index])):
                break
            room.move(source, target, int(live.prompt_tokens[index]))
            for device, sign in ((source, -1), (target, 1)):
                load_s[device] += sign * sample_s[index]
                at_stake[device] += sign * weight[index]
            can_move[index] = False
            moves.append(Migrate(int(live.ids[index]), source, target))
        return moves


@dataclass(frozen=True, slots=True, eq=False)
class _Forecast:
    """Seconds of each live sample, [live].

    alone_s: from now to its score, if it were the longest of all, as samples of its age go, and alone on its engine.
    shared_s: what it adds to the steps that it shares with one like it.
    likelier: how many times as likely it is to be that long, by what is told of its prompt, as far as that is trusted.
    """

    alone_s: Floats
    shared_s: Floats
    likelier: Floats


def _num_sharing(live: LiveSamples) -> Floats:
    """With how many samples each shares the prefill that it waits for, [live]; without end where it waits for none."""
    _, places = np.unique(live.devices * (live.prompts.max() + 1) + live.prompts, return_inverse=True)
    is_there = np.bincount(places, weights=live.started)[places] > 0
    return np.where(is_there, np.inf, np.bincount(places)[places])


def _is_due(live: LiveSamples) -> bool:
    """Whether to plan: at the start, and at each finish but where so many are live that one hardly counts."""
    return len(live) > 0 and (len(live) % (1 + len(live) // _FINISHES) == 0 or not live.started.any())
